"""Hugging Face Accelerate, unmodified: it is the loop that one would write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.clients.lightning_runs import BASES, BATCH, BATCHES, assert_bitwise, counts, loader, loop, wrapped
from tests.conftest import hook_count, inputs, mlp, same, weights

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(base: str, **options: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    net = mlp()
    optimizer = wrapped(net, base)
    return accelerator, net, optimizer, *accelerator.prepare(net, optimizer, loader())


@pytest.mark.parametrize("base", BASES)
def test_accelerate_is_the_loop_that_one_would_write(base: str) -> None:
    accelerator, net, mine, model, optimizer, batches = prepared(base)
    for x in batches:
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    plain = mlp()
    expected = wrapped(plain, base)
    loop(plain, expected, inputs(BATCHES), clip=lambda ps: nn.utils.clip_grad_norm_(ps, 0.05))
    assert_bitwise(net, mine, plain, expected)
    assert same(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("base", BASES)
def test_accumulation_with_a_scheduler_that_follows_it(base: str) -> None:
    """step(), zero_grad() and the scheduler's step() are called for every micro-batch, and act for every fourth;
    the epoch's last two make a step of their own."""
    accelerator, net, mine, model, optimizer, batches = prepared(base, gradient_accumulation_steps=4)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    rates = []
    for x in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rates.append(schedule.get_last_lr()[0])
    plain = mlp()
    expected = wrapped(plain, base)
    (group,) = expected.param_groups
    start = group["lr"]
    assert rates == [start] * 3 + [start / 2] * 2 + [start / 4]
    for part in (inputs(BATCHES)[:4], inputs(BATCHES)[4:]):
        expected.zero_grad()
        for x in part:
            (plain(x).square().mean() / 4).backward()
        nn.utils.clip_grad_value_(plain.parameters(), 0.01)
        expected.step()
        group["lr"] /= 2
    assert counts(mine) == {BATCHES * BATCH}
    assert_bitwise(net, mine, plain, expected)


@pytest.mark.parametrize("base", BASES)
def test_bfloat16(base: str) -> None:
    accelerator, net, mine, model, optimizer, batches = prepared(base, mixed_precision="bf16")
    plain = mlp()
    expected = wrapped(plain, base)
    for x in batches:
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        expected.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = plain(x)
        output.float().square().mean().backward()
        expected.step()
    assert {s.mean.dtype for s in mine.statistics.values()} == {torch.float32}
    assert_bitwise(net, mine, plain, expected)


@pytest.mark.parametrize("base", BASES)
def test_a_scaler_that_skips_a_step(base: str) -> None:
    """Accelerate makes one on accelerators only; AcceleratedOptimizer takes any."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerate.Accelerator(cpu=True)
    net = mlp()
    mine = wrapped(net, base)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(mine, device_placement=True, scaler=scaler)
    skipped = []
    for i, x in enumerate(inputs(BATCHES)):
        optimizer.zero_grad()
        scaler.scale(net(x).square().mean() * (torch.inf if i == 2 else 1.0)).backward()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [i == 2 for i in range(BATCHES)]
    plain = mlp()
    expected = wrapped(plain, base)
    loop(plain, expected, [x for i, x in enumerate(inputs(BATCHES)) if i != 2])
    assert_bitwise(net, mine, plain, expected)  # powers of two leave no trace


@pytest.mark.parametrize("base", BASES)
def test_save_state_and_load_state_are_bitwise(base: str, tmp_path: Path) -> None:
    def start() -> Any:
        accelerator, net, mine, model, optimizer, _ = prepared(base)
        schedule = accelerator.prepare(torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=20))
        return accelerator, net, mine, model, optimizer, schedule

    def go(run: Any, seed: int) -> None:
        accelerator, _, _, model, optimizer, schedule = run
        for x in inputs(4, seed=seed):
            optimizer.zero_grad()
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            schedule.step()

    whole = start()
    go(whole, 1)
    whole[0].save_state(str(tmp_path))
    go(whole, 2)
    resumed = start()
    resumed[0].load_state(str(tmp_path))
    go(resumed, 2)
    assert same(weights(resumed[1]), weights(whole[1]))
    assert same(resumed[2].state_dict(), whole[2].state_dict())
    assert resumed[5].get_last_lr() == whole[5].get_last_lr()
    assert counts(resumed[2]) == {8 * BATCH}


def test_wrapping_what_accelerate_has_made_of_an_optimizer_is_refused() -> None:
    """Its step does nothing while gradients accumulate, and ours would precondition them again and again."""
    accelerator = accelerate.Accelerator(cpu=True)
    net = mlp()
    optimizer = accelerator.prepare(BASES["SGD"](net.parameters()))
    with pytest.raises(TypeError, match=r"hand the trainer BNPreconditioner\(SGD"):
        BNPreconditioner(optimizer, net)
    assert hook_count(net) == 0
    with pytest.raises(TypeError, match="already a BNPreconditioner"):
        BNPreconditioner(accelerator.prepare(wrapped(net, "SGD")), net)
