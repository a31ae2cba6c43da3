"""step_divergence against steps that optimizers really make; grids, directions, and what it refuses."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import coordinates_of
from bnp_optim.diagnostics import STEP_SIZES, step_divergence
from tests.conftest import inputs, mlp, train, wrap
from tests.diagnostics.nets import closure

GRID = [0.01, 0.1, 1.0, 10.0]


def batch() -> tuple[Tensor, Tensor]:
    return inputs(1, seed=9)[0], torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def after_a_step(model: nn.Module, x: Tensor, y: Tensor, make: Any) -> float:
    """The relative loss of a copy after a real optimizer's step."""
    other = copy.deepcopy(model)
    optimizer = make(other)
    before = F.cross_entropy(other(x), y)
    before.backward()
    optimizer.step()
    return (F.cross_entropy(other(x), y) / before).item()


def test_along_the_gradient_it_is_sgd() -> None:
    """With dropout and batch statistics: one mask, and buffers that stay."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    x, y = batch()
    found = step_divergence(model, closure(model, x, y), step_sizes=GRID[::-1])
    assert found.step_sizes == tuple(GRID) and list(found.relative_losses) == ["gradient"]
    for size, loss in zip(GRID, found.relative_losses["gradient"], strict=True):
        expected = after_a_step(model, x, y, lambda m, lr=size: torch.optim.SGD(m.parameters(), lr=lr))
        assert loss == pytest.approx(expected, rel=1e-4)
    assert found.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_along_the_preconditioned_gradient_it_is_bnp_sgd_with_statistics_that_stay(mode: Any) -> None:
    model = mlp()
    optimizer = wrap(model, mode=mode)
    train(model, optimizer, inputs(5))
    optimizer.zero_grad()
    x, y = batch()
    found = step_divergence(model, closure(model, x, y), step_sizes=GRID, preconditioner=optimizer)
    assert list(found.relative_losses) == ["gradient", "preconditioned"]
    assert found.coordinates == "BNP's P on 51 of 51 parameters"
    start = [p.detach().clone() for p in model.parameters()]
    for size, loss in zip(GRID, found.relative_losses["preconditioned"], strict=True):
        optimizer.param_groups[0]["lr"] = size
        with optimizer.pause_statistics():
            before = F.cross_entropy(model(x), y)
            before.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss == pytest.approx((F.cross_entropy(model(x), y) / before).item(), rel=1e-4)
        with torch.no_grad():
            for p, s in zip(model.parameters(), start, strict=True):
                p.copy_(s)


@pytest.mark.parametrize("wrapped", [False, True])
def test_coordinates_of_adam_are_its_step_without_averages(wrapped: bool) -> None:
    """S Sᵀg by hand: P D⁻¹ Pᵀ g."""
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = BNPreconditioner(base, model) if wrapped else base
    train(model, optimizer, inputs(3))
    params, (x, y) = list(model.parameters()), batch()
    coordinates = coordinates_of(optimizer, params)
    found = step_divergence(model, closure(model, x, y), step_sizes=[0.05], preconditioner=coordinates)
    with optimizer.pause_statistics() if wrapped else torch.enable_grad():
        loss = F.cross_entropy(model(x), y)
        direction = list(torch.autograd.grad(loss, params))
    if wrapped:
        direction = coordinates[0].to_z(direction)
    for d, p in zip(direction, params, strict=True):
        state = base.state[p]
        d /= (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
    if wrapped:
        direction = coordinates[0].from_z(direction)
    with torch.no_grad():
        for p, d in zip(params, direction, strict=True):
            p -= 0.05 * d
        expected = (F.cross_entropy(model(x), y) / loss).item()
    assert found.relative_losses["preconditioned"] == (pytest.approx(expected, rel=1e-4),)


def test_a_quadratic_and_its_threshold() -> None:
    """L = w²/2 + 1 from w = 1: L(1 − α) is known, and exceeds 10³ · 1.5 beyond |1 − α| = √2998."""
    w = nn.Parameter(torch.ones(()))
    model = nn.Module()
    model.w = w
    grid = [1.0, 55.0, 56.0, 1e20, 1e30]
    found = step_divergence(model, lambda: w.square() / 2 + 1, step_sizes=grid)
    expected = [((1 - a) ** 2 / 2 + 1) / 1.5 for a in grid]
    assert found.relative_losses["gradient"][:3] == pytest.approx(expected[:3], rel=1e-5)
    assert found.relative_losses["gradient"][4] == math.inf  # beyond float32
    assert found.divergence == {"gradient": 56.0}
    assert step_divergence(model, lambda: w.square() / 2 + 1, step_sizes=[1.0]).divergence == {"gradient": math.inf}
    higher = step_divergence(model, lambda: w.square() / 2 + 1, step_sizes=grid, threshold=1.9e3)
    assert higher.divergence == {"gradient": 1e20}
    assert w.item() == 1


def test_a_loss_that_is_not_a_number_has_diverged() -> None:
    w = nn.Parameter(torch.ones(()))
    model = nn.Module()
    model.w = w
    found = step_divergence(model, lambda: (w + 1).log() + 1, step_sizes=[1.0, 10.0])
    assert found.relative_losses["gradient"][1] == math.inf and found.divergence["gradient"] == 10.0


def test_batches_weigh_by_their_samples_and_only_params_move() -> None:
    model, (x, y) = mlp(), batch()
    head = list(model[2].parameters())
    whole = step_divergence(model, (closure(model, x, y), 8), params=head, step_sizes=GRID)
    parts = [(closure(model, x[:5], y[:5]), 5), (closure(model, x[5:], y[5:]), 3)]
    found = step_divergence(model, parts, params=head, step_sizes=GRID)
    assert found.num_samples == whole.num_samples == 8
    assert found.relative_losses["gradient"] == pytest.approx(whole.relative_losses["gradient"], rel=1e-5)
    expected = after_a_step(model, x, y, lambda m: torch.optim.SGD(m[2].parameters(), lr=1.0))
    assert found.relative_losses["gradient"][2] == pytest.approx(expected, rel=1e-5)


def test_one_dropout_mask() -> None:
    """A step of size zero but for rounding gives the same loss, and a second call the same numbers."""
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    x, y = batch()
    first, second = (step_divergence(model, closure(model, x, y), step_sizes=[1e-9, 0.1]) for _ in range(2))
    assert first.relative_losses["gradient"][0] == pytest.approx(1, abs=1e-6)
    assert first == second


def test_inside_autocast() -> None:
    """Which keeps copies of the parameters in half precision, before and after."""
    model, (x, y) = mlp(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        found = step_divergence(model, closure(model, x, y), step_sizes=[30.0])
        assert torch.equal(model(x), before)
    outside = step_divergence(model, closure(model, x, y), step_sizes=[30.0])
    assert found.relative_losses["gradient"] == pytest.approx(outside.relative_losses["gradient"], rel=0.03)
    assert abs(found.relative_losses["gradient"][0] - 1) > 0.1


def test_half_precision_parameters_come_back() -> None:
    model, (x, y) = mlp().bfloat16(), batch()
    start = [p.detach().clone() for p in model.parameters()]
    found = step_divergence(model, closure(model, x.bfloat16(), y))
    assert found.step_sizes == STEP_SIZES and len(STEP_SIZES) == 13
    assert (STEP_SIZES[0], STEP_SIZES[1], STEP_SIZES[-1]) == (1e-4, 3.16e-4, 100)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_sizes": []}, ValueError, "step_sizes is empty"),
        ({"step_sizes": [0.1, -1.0]}, ValueError, "step_sizes[1] is -1.0, it must be a positive, finite number"),
        ({"step_sizes": [0.0]}, ValueError, "step_sizes[0] is 0.0"),
        ({"step_sizes": [math.nan]}, ValueError, "step_sizes[0] is nan"),
        ({"step_sizes": [math.inf]}, ValueError, "step_sizes[0] is inf"),
        ({"step_sizes": 0.1}, TypeError, "step_sizes is 0.1, it must be a sequence of numbers"),
        ({"step_sizes": ["0.1"]}, ValueError, "step_sizes[0] is '0.1'"),
        ({"threshold": 1}, ValueError, "threshold is 1, it must be above 1"),
        ({"direction": "sideways"}, ValueError, "direction is 'sideways'"),
        ({"direction": "preconditioned"}, ValueError, "preconditioner is None, but direction='preconditioned'"),
        ({"preconditioner": 3}, TypeError, "preconditioner is 3, it must be a BNPreconditioner"),
        ({"params": []}, ValueError, "params holds 0 parameters"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, (x, y) = mlp(), batch()
    with pytest.raises(error, match=re.escape(message)):
        step_divergence(model, closure(model, x, y), **options)


def test_a_preconditioner_before_its_first_step() -> None:
    model, (x, y) = mlp(), batch()
    with pytest.raises(ValueError, match="preconditioner has no statistics for any of params: let it make a step"):
        step_divergence(model, closure(model, x, y), preconditioner=wrap(model))


@pytest.mark.parametrize(("loss", "value"), [(lambda p: p.sum() * 0 - 0.5, "-0.5"), (lambda p: p.sum() * 0, "0")])
def test_a_loss_that_nothing_is_relative_to(loss: Any, value: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=f"loss is {value}, it must be positive"):
        step_divergence(model, lambda: loss(model[0].weight))


def test_only_one_direction() -> None:
    model, (x, y) = mlp(), batch()
    optimizer = wrap(model)
    train(model, optimizer, inputs(2))
    both = step_divergence(model, closure(model, x, y), step_sizes=GRID, preconditioner=optimizer)
    for direction in ("gradient", "preconditioned"):
        one = step_divergence(
            model, closure(model, x, y), step_sizes=GRID, preconditioner=optimizer, direction=direction
        )
        assert one.relative_losses == {direction: both.relative_losses[direction]}
        assert bool(one.coordinates) is (direction == "preconditioned")
