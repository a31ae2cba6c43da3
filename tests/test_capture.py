"""Which samples count: those whose gradient is in ``.grad`` at ``step()``, once each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import (
    assert_same_statistics,
    assert_same_weights,
    backward,
    count,
    inputs,
    mlp,
    same,
    wrap,
)


@pytest.mark.parametrize("step_scale", ["trace", "common", "spectral", "fan_in", None])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_micro_batches_are_one_batch(step_scale: Any, mode: Any) -> None:
    whole, parts = mlp().double(), mlp().double()
    a, b = wrap(whole, step_scale=step_scale, mode=mode), wrap(parts, step_scale=step_scale, mode=mode)
    for x in inputs(5, batch=12):
        x = x.double()
        a.zero_grad()
        backward(whole, x)
        a.step()
        b.zero_grad()
        for piece in x.split([3, 1, 8]):
            (parts(piece).square().sum() / (12 * 3)).backward()
        b.step()
    assert count(b) == 60
    assert_same_statistics(a, b, 1e-12)
    assert_same_weights(whole, parts, 1e-12)


def test_statistics_see_positions_and_n_counts_sequences() -> None:
    """Of a Linear: a batch of two sequences of five has the statistics of ten rows, and q² that of N = 2."""
    rows, sequence = mlp().double(), mlp().double()
    a, b = wrap(rows), wrap(sequence)
    (x,) = inputs(1, batch=10)
    for model, optimizer, shaped in ((rows, a, x), (sequence, b, x.view(2, 5, 4))):
        backward(model, shaped.double())
        optimizer.step()
    assert count(b) == 10
    assert_same_statistics(a, b, 1e-12)
    values = x.double().numpy()
    floored = values.var(0) + 1e-2 * values.var(0).max() + 1e-4
    trace = 1 + ((values - values.mean(0)) ** 2 / floored).sum(1).mean()
    for optimizer, n in ((a, 10), (b, 2)):
        q2 = float(optimizer.state_dict()["state"][0]["bnp_q2"])
        assert q2 == pytest.approx(max(trace / n, 1), rel=1e-9)
    assert trace / 2 > 1 > trace / 10


class Twice(nn.Module):
    """One layer applied to two inputs, or two layers with the same parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 3) if tied else self.first
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2)
        return torch.cat([self.first(left), self.second(right)])


@pytest.mark.parametrize("tied", [False, True], ids=["called twice", "tied"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_pooled_inputs(tied: bool, mode: Any) -> None:
    torch.manual_seed(3)
    pooled = Twice(tied).double()
    plain = nn.Sequential(copy.deepcopy(pooled.first))
    a, b = wrap(pooled, mode=mode), wrap(plain, mode=mode)
    assert len(a.statistics) == 1
    for x in inputs(5):
        for model, optimizer in ((pooled, a), (plain, b)):
            optimizer.zero_grad()
            backward(model, x.double())
            optimizer.step()
    assert count(a, "first") == 40
    torch.testing.assert_close(a.statistics["first"].variance, b.statistics["0"].variance, rtol=1e-12, atol=0)
    assert_same_weights(pooled.first, plain[0], 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
            self.head = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.head(x)
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.recompute else self.body(x)

        recompute = True

    torch.manual_seed(0)
    recomputed = Checkpointed()
    plain = copy.deepcopy(recomputed)
    plain.recompute = False
    a, b = wrap(recomputed), wrap(plain)
    for x in inputs(4):
        for model, optimizer in ((recomputed, a), (plain, b)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert same(a.state_dict(), b.state_dict())
    assert count(a, "body.0") == 32
    assert same(dict(recomputed.state_dict()), dict(plain.state_dict()))


def test_a_module_used_inside_and_outside_a_reentrant_checkpoint() -> None:
    layer = nn.Linear(4, 4)
    optimizer = wrap(nn.Sequential(layer))
    x = inputs(1)[0].requires_grad_()
    checkpoint(layer, layer(layer(x)), use_reentrant=True).sum().backward()
    optimizer.step()
    assert count(optimizer) == 24


def test_forwards_that_must_not_count() -> None:
    model = mlp()
    optimizer = wrap(model)
    x, y = inputs(2)
    with torch.no_grad():
        model(y)
    with torch.inference_mode():
        model(y)
    model.eval()(y)  # with grad, but no backward: an evaluation without no_grad
    torch.func.vmap(model)(y)
    torch.func.functional_call(model, dict(model.named_parameters()), (y,))
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (y,)).sum())(dict(model.named_parameters()))
    torch.autograd.grad(model(y.clone().requires_grad_()).sum(), [y.clone().requires_grad_()], allow_unused=True)
    adversarial = y.clone().requires_grad_()
    torch.autograd.grad(model(adversarial).sum(), adversarial)  # reaches the input, not the weights
    with optimizer.pause_statistics(), optimizer.pause_statistics():
        backward(model, y)
    optimizer.zero_grad()
    backward(model, x)
    optimizer.step()
    assert count(optimizer) == 8
    torch.testing.assert_close(optimizer.statistics["0"].mean, x.mean(0))


def test_gate_is_grad_mode_and_not_training() -> None:
    """Fine-tuning with frozen batch norm runs in eval mode; deep-river's forward runs before ``.train()``."""
    model = mlp().eval()
    optimizer = wrap(model)
    backward(model, inputs(1)[0])
    optimizer.step()
    assert count(optimizer) == 8


def test_a_graph_used_twice_counts_once() -> None:
    model = mlp()
    optimizer = wrap(model)
    loss = model(inputs(1)[0]).square().mean()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    optimizer.step()
    assert count(optimizer) == 8
    optimizer.zero_grad()
    loss = model(inputs(2)[1]).sum()
    loss.backward(retain_graph=True)
    model.zero_grad()  # its gradient is gone; the second one counts
    loss.backward()
    optimizer.step()
    assert count(optimizer) == 16


def test_gradient_penalty_counts_once() -> None:
    model = mlp()
    optimizer = wrap(model)
    x = inputs(1)[0].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (slope.square().mean() + model(x.detach()).mean()).backward()
    optimizer.step()
    # The slope depends on the first layer's output, so the double backward visits that forward's node; it does
    # not depend on the last layer's output, whose samples are those of the loss alone.
    assert count(optimizer) == 16
    assert count(optimizer, "2") == 8


def test_gradients_by_autograd_grad() -> None:
    a, b = mlp(), mlp()
    first, second = wrap(a), wrap(b)
    for x in inputs(3):
        first.zero_grad()
        backward(a, x)
        first.step()
        parameters = list(b.parameters())
        for p, g in zip(parameters, torch.autograd.grad(b(x).square().mean(), parameters), strict=True):
            p.grad = g
        second.step()
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("order", ["zero-forward-backward", "forward-zero-backward"])
@pytest.mark.parametrize("by", ["optimizer", "model", "in place"])
def test_zero_grad_clears_no_pending_forward(order: str, by: str) -> None:
    """Lightning zeroes between forward and backward."""
    model = mlp()
    optimizer = wrap(model)

    def zero() -> None:
        if by == "model":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=by == "optimizer")

    for x in inputs(3):
        if order.startswith("zero"):
            zero()
        loss = model(x).square().mean()
        if order.startswith("forward"):
            zero()
        loss.backward()
        optimizer.step()
    assert count(optimizer) == 24
