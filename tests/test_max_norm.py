"""The norm of Pᵀg over all layers, clipped: against NumPy, and what follows from where it is clipped."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPSGD, BNPreconditioner, fold_normalization
from bnp_optim.tracking import Tracker
from tests.conftest import backward, hook_count, inputs, mlp, same, train, wrap
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer

LR, BETA = 0.05, 0.9


def momentum(model: nn.Module, **options: Any) -> BNPreconditioner:
    return BNPreconditioner(torch.optim.SGD(model.parameters(), lr=LR, momentum=BETA), model, **options)


def numpy_training(model: nn.Module, data: list[Tensor], max_norm: float) -> tuple[list[np.ndarray], list[float]]:
    """Weights and biases after SGD with momentum in z, and the norms of Pᵀg before they were clipped."""
    model = copy.deepcopy(model).double()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    references = [ReferenceBNP(ReferenceLayer("linear", tuple(m.weight.shape), bias=True)) for m in linear]
    seen: dict[nn.Module, Tensor] = {}
    for m in linear:
        m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach()))
    buffers: list[np.ndarray] = []
    norms = []
    for x in data:
        model.zero_grad()
        backward(model, x.double())
        in_z = []
        for m, reference in zip(linear, references, strict=True):
            reference.observe(seen[m].numpy())
            reference.commit()
            in_z += [g for g in reference.to_z(m.weight.grad.numpy(), m.bias.grad.numpy()) if g is not None]
        norms.append(float(np.sqrt(sum((g**2).sum() for g in in_z))))
        clipped = [g * min(1.0, max_norm / norms[-1]) for g in in_z]
        buffers = [BETA * b + g for b, g in zip(buffers, clipped, strict=True)] if buffers else clipped
        for i, (m, reference) in enumerate(zip(linear, references, strict=True)):
            dw, db = reference.from_z(-LR * buffers[2 * i], -LR * buffers[2 * i + 1])
            with torch.no_grad():
                m.weight += torch.from_numpy(dw)
                m.bias += torch.from_numpy(db)  # type: ignore[arg-type]
    return [p.detach().numpy() for p in model.parameters()], norms


@pytest.mark.parametrize("max_norm", [0.3, 0.6, 100.0])
def test_training_is_that_of_numpy(max_norm: float) -> None:
    model, data = mlp().double(), [x.double() * 3 for x in inputs(12)]
    expected, norms = numpy_training(model, data, max_norm)
    cut = sum(norm > max_norm for norm in norms)
    assert cut == 0 if max_norm == 100 else 2 <= cut < 12  # the case is what it says
    train(model, momentum(model, max_norm=max_norm), data)
    for found, wanted in zip(model.parameters(), expected, strict=True):
        # torch divides by the norm + 1e-6
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=2e-5, atol=2e-6)


def test_none_and_a_norm_that_is_never_reached_are_the_same() -> None:
    plain, bounded = mlp(), mlp()
    train(plain, momentum(plain), inputs(8))
    train(bounded, momentum(bounded, max_norm=1e9), inputs(8))
    for a, b in zip(plain.parameters(), bounded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_clipped_does_not_depend_on_the_units_of_folded_inputs() -> None:
    """Which clipping g does: in other units the same data has other gradients."""
    units = torch.tensor([1e3, 1.0, 1e-2, 30.0], dtype=torch.float64)
    data = [x.double() for x in inputs(12)]

    def outputs(scale: Tensor, *, raw: bool) -> Tensor:
        model = mlp().double()
        fold_normalization(model, torch.cat(data) * scale, var_eps=1e-12)
        optimizer = momentum(model, var_eps=1e-12, **({} if raw else {"max_norm": 0.5}))
        for x in data:
            optimizer.zero_grad()
            backward(model, x * scale)
            if raw:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return model(data[0] * scale).detach()

    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(outputs(units, raw=False), outputs(one, raw=False), rtol=1e-5, atol=1e-7)
    assert (outputs(units, raw=True) - outputs(one, raw=True)).abs().max() > 0.05


def test_parameters_that_pass_through_neither_count_nor_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = momentum(model, max_norm=1e-3)
    norm = model[1]
    backward(model, inputs(1)[0])
    before = norm.weight.grad.clone(), norm.weight.detach().clone()
    optimizer.step()
    assert torch.equal(norm.weight.grad, before[0]) and float(before[0].norm()) > 1e-3
    torch.testing.assert_close(norm.weight.detach(), before[1] - LR * before[0])
    cut = torch.cat([p.grad.flatten() for i in (0, 2) for p in model[i].parameters()])
    assert float(cut.norm()) == pytest.approx(1e-3, rel=2e-3)


def test_auto_picks_the_form_that_has_something_to_clip() -> None:
    assert "mode='gradient'" in repr(wrap(mlp()))
    model, other = mlp(), mlp()
    optimizer = wrap(model, max_norm=0.5)
    assert "mode='two_sided'" in repr(optimizer)
    train(model, optimizer, inputs(6))
    train(other, BNPSGD(other, lr=0.1, max_norm=0.5), inputs(6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"max_norm": "1"}, TypeError, ("max_norm", "'1'", "such as 1.0, or None")),
        ({"max_norm": True}, TypeError, ("max_norm", "True", "such as 1.0, or None")),
        ({"max_norm": 0}, ValueError, ("max_norm", "0", "above 0")),
        ({"max_norm": float("nan")}, ValueError, ("max_norm", "nan", "above 0")),
        ({"max_norm": float("inf")}, ValueError, ("max_norm", "inf", "or None")),
        ({"max_norm": 1.0, "mode": "gradient"}, ValueError, ("1.0", "mode='gradient'", "clip_grad_norm_")),
    ],
)
def test_what_cannot_be_clipped_is_refused(
    options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    model = mlp()
    with pytest.raises(error) as caught:
        wrap(model, **options)
    assert all(part in str(caught.value) for part in parts)
    assert hook_count(model) == 0


def test_sharded_weights_are_refused_before_anything_is_attached() -> None:
    """With real ones: tests/distributed/sharded_parallel.py."""
    model = mlp()
    with (
        mock.patch.object(Tracker, "sharded", True),
        pytest.raises(ValueError, match=r"max_norm is 1\.0, but weights are sharded.*clip_grad_norm_"),
    ):
        wrap(model, max_norm=1.0)
    assert hook_count(model) == 0


def test_copies_and_checkpoints_go_on_clipping() -> None:
    model, data = mlp(), inputs(10)
    optimizer = momentum(model, max_norm=0.2)
    train(model, optimizer, data[:5])
    twin, copied = copy.deepcopy((model, optimizer))
    resumed = mlp()
    resumed.load_state_dict(model.state_dict())
    loaded = momentum(resumed, max_norm=0.2)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the buffers otherwise
    for m, o in ((model, optimizer), (twin, copied), (resumed, loaded)):
        train(m, o, data[5:])
    for m in (twin, resumed):
        assert same(list(m.parameters()), list(model.parameters()))
    free = mlp()
    train(free, momentum(free), data)
    assert not same(list(free.parameters()), list(model.parameters()))


def test_a_pickle_of_before_there_was_an_option_is_not_clipped() -> None:
    model = mlp()
    optimizer = momentum(model)
    state = optimizer.__getstate__()
    del state["settings"]["max_norm"]
    old = BNPreconditioner.__new__(BNPreconditioner)
    old.__setstate__(state)
    assert old._z._max_norm is None


def test_a_gradient_that_is_not_finite_stays_one() -> None:
    """As after ``clip_grad_norm_``: what skips such steps must see them."""
    model = mlp()
    optimizer = momentum(model, max_norm=1.0)
    backward(model, inputs(1)[0])
    model[2].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert bool(model[2].weight.grad.isnan().any())
