"""Which samples count: those whose gradient is in ``.grad`` at ``step()``, once each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp, same


def wrap(model: nn.Module, **options: Any) -> BNPreconditioner:
    return BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def count(optimizer: BNPreconditioner, layer: str = "0") -> int:
    return int(optimizer.statistics[layer].count)


def assert_same_statistics(a: BNPreconditioner, b: BNPreconditioner, rtol: float = 1e-6) -> None:
    assert a.statistics.keys() == b.statistics.keys()
    for name, mine in a.statistics.items():
        other = b.statistics[name]
        assert int(mine.count) == int(other.count), name
        torch.testing.assert_close(mine.mean, other.mean, rtol=rtol, atol=rtol)
        torch.testing.assert_close(mine.variance, other.variance, rtol=rtol, atol=rtol)


def assert_same_weights(a: nn.Module, b: nn.Module, rtol: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("step_scale", ["trace", "spectral", "fan_in", None])
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


def test_positions_are_samples_for_linear() -> None:
    rows, sequence = mlp().double(), mlp().double()
    a, b = wrap(rows), wrap(sequence)
    for x in inputs(4, batch=10):
        for model, optimizer, shaped in ((rows, a, x), (sequence, b, x.view(1, 10, 4))):
            optimizer.zero_grad()
            backward(model, shaped.double())
            optimizer.step()
    assert count(b) == 40
    assert_same_statistics(a, b, 1e-12)
    assert_same_weights(rows, sequence, 1e-12)


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


@pytest.mark.parametrize("by", ["optimizer", "model", "in place"])
def test_a_skipped_step_never_was(by: str) -> None:
    """The user (or GradScaler) skips a step and zeroes: the next step's N and statistics know nothing of it."""
    with_skip, without = mlp(), mlp()
    a, b = wrap(with_skip), wrap(without)
    for i, x in enumerate(inputs(6)):
        if i == 3:
            backward(with_skip, x * 100)
            if by == "model":
                with_skip.zero_grad()
            else:
                a.zero_grad(set_to_none=by == "optimizer")
            continue
        for model, optimizer in ((with_skip, a), (without, b)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert same(a.state_dict(), b.state_dict())
    assert same(dict(with_skip.state_dict()), dict(without.state_dict()))


def test_two_optimizers_of_a_gan() -> None:
    """The discriminator's forward for the generator's loss reaches its weights, but that gradient is dropped."""
    torch.manual_seed(0)
    generator, discriminator = nn.Sequential(nn.Linear(2, 4)), nn.Sequential(nn.Linear(4, 1))
    reference = copy.deepcopy(discriminator)
    opt_g, opt_d, opt_r = wrap(generator), wrap(discriminator), wrap(reference)
    noise = torch.Generator().manual_seed(1)
    for real in inputs(4):
        z = torch.randn(8, 2, generator=noise)
        fake = generator(z)
        for d, optimizer in ((discriminator, opt_d), (reference, opt_r)):
            d.zero_grad()
            (d(real).mean() - d(fake.detach()).mean()).backward()
            optimizer.step()
        generator.zero_grad()
        discriminator(fake).mean().backward()  # leaves a gradient, and samples, in the discriminator
        opt_g.step()
    assert count(opt_d) == 4 * 16
    assert count(opt_g) == 4 * 8
    assert same(opt_d.state_dict(), opt_r.state_dict())
    assert same(dict(discriminator.state_dict()), dict(reference.state_dict()))


def test_frozen_and_partly_frozen_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    optimizer = wrap(model)
    frozen = [p.clone() for p in (*model[0].parameters(), model[1].weight, model[2].bias)]
    x = inputs(1)[0]
    backward(model, x)
    expected = model[1].bias.grad.clone()
    optimizer.step()
    assert [count(optimizer, str(i)) for i in range(4)] == [0, 0, 8, 8]
    assert all(map(torch.equal, frozen, (*[p.detach() for p in model[0].parameters()], model[1].weight, model[2].bias)))
    assert torch.equal(model[1].bias.grad, expected)  # a bias without its weight passes through
    rows = {row.name: (row.preconditioned, row.why) for row in optimizer.coverage()}
    assert rows["0.weight"] == (False, "frozen")
    assert rows["2.weight"] == (True, "rank-one P: its bias is frozen")
    assert not rows["1.bias"][0]


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_batch_changes_no_statistics(position: int, poison: float) -> None:
    """Each layer's input in turn; the step is skipped, and training goes on as if the batch had not been."""

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 1)]
            )
            self.at = -1

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1)
            known = 0
            for layer in self.layers:
                if not isinstance(layer, nn.Flatten):
                    if known == self.at:
                        mask = torch.zeros_like(x)
                        mask.view(-1)[1] = poison
                        x = x + mask
                    known += 1
                x = layer(x)
            return x

    torch.manual_seed(0)
    poisoned = Poisoned()
    clean = copy.deepcopy(poisoned)
    a, b = wrap(poisoned, step_scale="spectral"), wrap(clean, step_scale="spectral")
    for i, x in enumerate(inputs(6)):
        if i in (0, 3):
            before = a.state_dict()["state"]
            poisoned.at = position
            backward(poisoned, x)
            with torch.no_grad():
                keep = [p.clone() for p in poisoned.parameters()]
            a.step()  # taken, not skipped: the parameters go bad, the statistics must not
            after = a.state_dict()["state"]
            if i:
                assert same(before, after)
            else:
                assert all(int(s.count) == 0 for s in a.statistics.values())
            with torch.no_grad():
                for p, k in zip(poisoned.parameters(), keep, strict=True):
                    p.copy_(k)
            poisoned.at = -1
            a.zero_grad()
            continue
        for model, optimizer in ((poisoned, a), (clean, b)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert_same_statistics(a, b, 0)
    assert same(dict(poisoned.state_dict()), dict(clean.state_dict()))


def test_stat_interval_measures_every_kth_step() -> None:
    model = mlp()
    optimizer = wrap(model, stat_interval=3)
    counts = []
    for x in inputs(7):
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
        counts.append(count(optimizer))
    assert counts == [8, 8, 8, 16, 16, 16, 24]


def test_remove_hooks_keeps_the_statistics() -> None:
    model = mlp()
    optimizer = wrap(model)
    first, second = inputs(2)
    backward(model, first)
    optimizer.step()
    optimizer.remove_hooks()
    before = optimizer.statistics
    optimizer.zero_grad()
    backward(model, second)
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert same([vars(s) for s in before.values()], [vars(s) for s in optimizer.statistics.values()])
    assert not torch.equal(model[0].weight.grad, raw)
    assert not model[0]._forward_hooks
    assert not model[0].weight._backward_hooks
