"""nn.MultiheadAttention in use: which samples count, and where the input of ``out_proj`` can be had."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.attention_cases import attention, counts, knows_hooks, sequences, train
from tests.conftest import assert_same_statistics, assert_same_weights, same, wrap

UNSEEN = "its layer's input was never seen so far"
# what torch.compile itself looks at
quiet_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
pytestmark = knows_hooks


@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_micro_batches_are_one_batch(mode: Any, step_scale: Any) -> None:
    whole = attention().double()
    parts = copy.deepcopy(whole)
    a, b = (wrap(m, mode=mode, step_scale=step_scale) for m in (whole, parts))
    for x in sequences(4):
        x, memory = x.double(), x.double().flip(1)[:, :3] * 2
        a.zero_grad()
        whole(x, memory, memory)[0].square().sum().backward()
        a.step()
        b.zero_grad()
        for piece, other in zip(x.split([1, 3]), memory.split([1, 3]), strict=True):
            parts(piece, other, other)[0].square().sum().backward()
        b.step()
    assert counts(a) == counts(b) == {"in_proj": 80, "out_proj": 80}
    assert_same_statistics(a, b, 1e-12)
    assert_same_weights(whole, parts, 1e-11)


def test_self_attention_is_a_linear_with_three_times_the_rows() -> None:
    """One input measured once: the same moments in all three groups, to the last bit; and those of the input."""
    model = attention()
    optimizer = wrap(model)
    (x,) = sequences(1)
    train(model, optimizer, [x])
    mean, variance = (
        optimizer.statistics["in_proj"].mean.view(3, 4),
        optimizer.statistics["in_proj"].variance.view(3, 4),
    )
    assert torch.equal(mean[0], mean[1]) and torch.equal(mean[0], mean[2])
    assert torch.equal(variance[0], variance[1]) and torch.equal(variance[0], variance[2])
    torch.testing.assert_close(mean[0], x.flatten(0, 1).mean(0))
    torch.testing.assert_close(variance[0], x.flatten(0, 1).var(0, correction=0))


def test_keyword_calls() -> None:
    a, b, c = attention(), attention(), attention()
    first, second, third = wrap(a), wrap(b), wrap(c)
    x, y, z = sequences(3)
    a(x, y, z)[0].sum().backward()
    b(value=z, query=x, key=y)[0].sum().backward()
    c(x, value=z, key=y, need_weights=False)[0].sum().backward()
    for optimizer in (first, second, third):
        optimizer.step()
    assert_same_statistics(first, second, 0)
    assert_same_statistics(first, third)


def test_only_the_weights_that_a_loss_reaches_count() -> None:
    model = attention()
    optimizer = wrap(model)
    (x,) = sequences(1)
    shares = model(x, x, x)[1]
    shares.square().sum().backward()
    optimizer.step()
    assert counts(optimizer) == {"in_proj": 20, "out_proj": 0}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_forwards_that_must_not_count() -> None:
    model = attention()
    optimizer = wrap(model)
    x, y = sequences(2)
    model(y, y, y)  # no backward
    with torch.no_grad():
        model.eval()(y, y, y)
        model.train()(y, y, y)
    torch.func.vmap(lambda z: model(z, z, z)[0])(y)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (y, y, y))[0].sum())(dict(model.named_parameters()))
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(5, 4)], layout=torch.strided)
    with torch.no_grad():
        model.eval()(nested, nested, nested)
    train(model.train(), optimizer, [x])
    assert counts(optimizer) == {"in_proj": 20, "out_proj": 20}


def test_one_observation() -> None:
    """The deviations of a single sample are rounding, and dropped: the weights see no step but by way of the bias."""
    model = attention()
    optimizer = wrap(model)
    train(model, optimizer, sequences(1, batch=1, length=1))
    assert counts(optimizer) == {"in_proj": 1, "out_proj": 1}
    assert model.in_proj_weight.grad is not None and model.in_proj_weight.grad.count_nonzero() == 0
    train(model, optimizer, sequences(3, batch=1, length=1, seed=5))
    assert all(p.isfinite().all() for p in model.parameters())


def test_fewer_observations_measured() -> None:
    model = attention()
    optimizer = wrap(model, max_observations=5)
    train(model, optimizer, sequences(3))
    assert counts(optimizer) == {"in_proj": 15, "out_proj": 15}


def test_a_reentrant_checkpoint_counts_once() -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    a, b = wrap(plain), wrap(model)
    for x in sequences(3):
        x.requires_grad_()
        a.zero_grad()
        plain(x, x, x)[0].square().mean().backward()
        a.step()
        b.zero_grad()
        checkpoint(lambda z: model(z, z, z)[0], x, use_reentrant=True).square().mean().backward()
        b.step()
    assert same(a.state_dict(), b.state_dict())
    assert_same_weights(plain, model, 0)


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu"])
def test_where_hooks_pack_what_autograd_keeps_out_proj_passes_through(how: str) -> None:
    """Unpacking would recompute the checkpoint in the middle of its own forward pass."""
    model = attention()
    optimizer = wrap(model)
    calls = []

    def run(z: Tensor) -> Tensor:
        calls.append(None)
        return model(z, z, z)[0]

    for x in sequences(2):
        optimizer.zero_grad()
        if how == "checkpoint":
            y = checkpoint(run, x, use_reentrant=False)
        else:
            with torch.autograd.graph.save_on_cpu():
                y = run(x)
        y.square().mean().backward()
        raw = model.out_proj.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.out_proj.weight.grad, raw)
    assert len(calls) == (4 if how == "checkpoint" else 2)
    assert counts(optimizer) == {"in_proj": 40, "out_proj": 0}
    assert optimizer.coverage()["out_proj.weight"].why == UNSEEN


def test_where_torch_does_not_tell_of_such_hooks_out_proj_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.6."""
    monkeypatch.setattr("bnp_optim.layers.attention._saved_tensor_hooks", None)
    monkeypatch.setattr("bnp_optim.capture._saved_tensor_hooks", None)
    model = attention()
    optimizer = wrap(model)
    train(model, optimizer, sequences(2))
    assert counts(optimizer) == {"in_proj": 40, "out_proj": 0}
    assert optimizer.coverage()["out_proj.weight"].why == UNSEEN


@quiet_dynamo
@pytest.mark.parametrize("kind", ["self", "cross", "one observation"])
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    plain = attention()
    model = copy.deepcopy(plain)
    a, b = (wrap(m, skip=["out_proj"]) for m in (plain, model))
    c = copy.deepcopy(plain)
    optimizer = wrap(c)
    first: Any = torch.compile(model, backend="eager", fullgraph=True)
    second: Any = torch.compile(c, backend="eager", fullgraph=True)
    shape = {"batch": 1, "length": 1} if kind == "one observation" else {}
    for x in sequences(3, **shape):
        memory = x[:, :3] - 1 if kind == "cross" else x
        for net, wrapper in ((plain, a), (first, b), (second, optimizer)):
            wrapper.zero_grad()
            net(x, memory, memory)[0].square().mean().backward()
            wrapper.step()
    assert_same_statistics(a, b, 1e-5)
    assert_same_weights(plain, model, 1e-5)
    assert_same_weights(plain, c, 1e-5)  # in a graph there are no nodes to look behind
    assert optimizer.coverage()["out_proj.weight"].why == UNSEEN
    torch._dynamo.reset()


def test_autocast() -> None:
    model = attention()
    optimizer = wrap(model)
    seen = []
    for x in sequences(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = model(x, x, x)
        seen.append(y.grad_fn.next_functions[0][0].next_functions[0][0]._saved_mat1.detach())
        y.float().square().mean().backward()
        optimizer.step()
        if len(seen) == 1:
            torch.testing.assert_close(optimizer.statistics["in_proj"].mean[:4], x.flatten(0, 1).mean(0))
            assert seen[0].dtype == torch.bfloat16
            torch.testing.assert_close(optimizer.statistics["out_proj"].mean, seen[0].float().mean(0))
            torch.testing.assert_close(optimizer.statistics["out_proj"].variance, seen[0].float().var(0, correction=0))
    assert counts(optimizer) == {"in_proj": 40, "out_proj": 40}
    assert optimizer.statistics["out_proj"].mean.dtype == torch.float32


def test_no_node_is_kept_alive() -> None:
    model = attention()
    optimizer = wrap(model)
    (x,) = sequences(1)
    y, shares = model(x, x, x)
    node = weakref.ref(y)
    saved = weakref.ref(y.grad_fn.next_functions[0][0].next_functions[0][0]._saved_mat1.untyped_storage())
    del y, shares
    gc.collect()
    assert node() is None and saved() is None
    train(model, optimizer, [x])
