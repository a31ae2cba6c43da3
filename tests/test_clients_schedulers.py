"""Learning-rate schedulers and weight averaging act on the wrapper as on the base."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp, same, train, weights

# torch 2.6's own SequentialLR calls its parts in the way that it warns of
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
STEPS = 12
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, T_max=8)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
}


def rates(optimizer: Optimizer) -> list[Any]:
    """Rate and momentum of each group."""
    return [(group["lr"], group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]


def advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step([1.0, 0.9, 0.95, 0.96, 0.97, 0.5][step % 6])
    else:
        scheduler.step()


def run(base: str, scheduler: str, wrap: str) -> tuple[list[Any], Any, Optimizer]:
    """The sequence of rates; ``wrap``: "no", "before" or "after" the scheduler is built."""
    model = mlp()
    plain = optimizer = BASES[base](model.parameters())
    if wrap == "before":
        optimizer = BNPreconditioner(plain, model)
    schedule = SCHEDULERS[scheduler](optimizer)
    if wrap == "after":
        optimizer = BNPreconditioner(plain, model)
    seen = [rates(optimizer)]
    for step, x in enumerate(inputs(STEPS)):
        train(model, optimizer, [x])
        advance(schedule, step)
        seen.append(copy.deepcopy(rates(optimizer)))
    return seen, schedule, optimizer


def test_they_are_all_here() -> None:
    torchs = {name for name in lr_scheduler.__all__ if name.endswith(("LR", "Scheduler", "WarmRestarts", "Plateau"))}
    assert torchs - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("wrap", ["before", "after"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", BASES)
def test_rates_and_momenta_are_those_of_the_base(base: str, scheduler: str, wrap: str) -> None:
    """Warnings are errors here: nor does a scheduler think that the optimizer has not stepped."""
    expected = run(base, scheduler, "no")[0]
    assert run(base, scheduler, wrap)[0] == expected
    assert len({str(e) for e in expected}) > 1  # it did move


def test_one_cycle_moves_the_momentum_that_the_base_uses() -> None:
    seen, _, optimizer = run("SGD", "OneCycleLR", "before")
    momenta = [groups[0][1] for groups in seen]
    assert math.isclose(min(momenta), 0.85, abs_tol=0.01) and momenta[0] == 0.95
    assert optimizer.base_optimizer.param_groups[0]["momentum"] == momenta[-1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
def test_a_scheduler_that_steps_first_is_told_so(wrap: bool) -> None:
    """The warning of torch is not lost either."""
    model = mlp()
    optimizer: Optimizer = BASES["SGD"](model.parameters())
    if wrap:
        optimizer = BNPreconditioner(optimizer, model)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", BASES)
def test_resume_of_scheduler_and_wrapper_is_bitwise(base: str, scheduler: str) -> None:
    def start() -> tuple[nn.Module, BNPreconditioner, Any]:
        model = mlp()
        optimizer = BNPreconditioner(BASES[base](model.parameters()), model)
        return model, optimizer, SCHEDULERS[scheduler](optimizer)

    def go(model: nn.Module, optimizer: BNPreconditioner, schedule: Any, seed: int) -> None:
        for step, x in enumerate(inputs(5, seed=seed)):
            train(model, optimizer, [x])
            advance(schedule, step)

    model, optimizer, schedule = start()
    go(model, optimizer, schedule, 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    go(model, optimizer, schedule, 2)
    other = start()
    for target, state in zip(other, saved, strict=True):
        target.load_state_dict(state)  # type: ignore[attr-defined]
    go(*other, 2)
    assert same(weights(other[0]), weights(model))
    assert same(other[1].state_dict(), optimizer.state_dict())
    assert rates(other[1]) == rates(optimizer)


# ---- averaging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [False, True])
def test_the_averaged_model_averages_and_does_not_measure(ema: bool) -> None:
    """AveragedModel deep-copies the module with its hooks; the copy's forwards are nobody's samples."""
    model = mlp()
    optimizer = BNPreconditioner(BASES["SGD"](model.parameters()), model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8) if ema else None)
    history = []
    for x in inputs(5):
        train(model, optimizer, [x])
        averaged.update_parameters(model)
        averaged(x).square().mean().backward()
        history.append(weights(model))
    assert optimizer.statistics["0"].count == 40
    expected = history[0]
    for k, state in enumerate(history[1:], start=2):
        weight = 0.2 if ema else 1 / k
        expected = {name: torch.lerp(old, state[name], weight) for name, old in expected.items()}
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_averaging_with_its_schedule_and_batch_norm_update() -> None:
    """The whole recipe of torch's documentation; refreshing BatchNorm's statistics measures nothing."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = BNPreconditioner(BASES["SGD"](model.parameters()), model)
    averaged = AveragedModel(model)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    data = inputs(6)
    for x in data:
        train(model, optimizer, [x])
        averaged.update_parameters(model)
        schedule.step()
    update_bn(data, averaged)
    update_bn(data, model)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.statistics["0"].count == 48
    torch.testing.assert_close(
        averaged.module[1].running_mean, averaged.module[0](torch.cat(data)).mean(0), rtol=1e-4, atol=1e-5
    )
    model.zero_grad()
    backward(model, data[0])
    optimizer.step()
    assert optimizer.statistics["0"].count == 56
