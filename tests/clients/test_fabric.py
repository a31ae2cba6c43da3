"""Lightning Fabric, unmodified: it is the loop that one would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.clients.lightning_runs import BASES, BATCH, BATCHES, assert_bitwise, counts, loop, wrapped
from tests.conftest import hook_count, inputs, mlp, same, weights

lightning_fabric = pytest.importorskip("lightning_fabric", reason="lightning_fabric is not installed")


def fabric_of(**options: Any) -> Any:
    return lightning_fabric.Fabric(accelerator="cpu", devices=1, **options)


@pytest.mark.parametrize("apart", [False, True], ids=["setup", "setup_optimizers"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("base", BASES)
def test_fabric_is_the_loop_that_one_would_write(base: str, precision: str, apart: bool) -> None:
    fabric = fabric_of(precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    net, plain = mlp().to(dtype), mlp().to(dtype)
    if apart:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(wrapped(net, base))
    else:
        model, optimizer = fabric.setup(net, wrapped(net, base))
    expected = wrapped(plain, base)
    for x in inputs(BATCHES):
        optimizer.zero_grad()
        fabric.backward(model(x).float().square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        optimizer.step()
        expected.zero_grad()
        half = precision != "32-true"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = plain(x.bfloat16() if half else x)  # Fabric casts the input itself, too
        output.float().square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        expected.step()
    assert_bitwise(net, optimizer, plain, expected)
    assert counts(optimizer) == {BATCHES * BATCH}
    assert same(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("base", BASES)
def test_accumulation_and_clipping_by_value(base: str) -> None:
    fabric = fabric_of()
    net, plain = mlp(), mlp()
    model, optimizer = fabric.setup(net, wrapped(net, base))
    optimizer.zero_grad()
    for i, x in enumerate(inputs(BATCHES)):
        syncs = i % 3 == 2
        with fabric.no_backward_sync(model, enabled=not syncs):
            fabric.backward(model(x).square().mean() / 3)
        if syncs:
            fabric.clip_gradients(model, optimizer, clip_val=0.01)
            optimizer.step()
            optimizer.zero_grad()
    expected = wrapped(plain, base)
    loop(plain, expected, inputs(BATCHES), accumulate=3, clip=lambda ps: nn.utils.clip_grad_value_(ps, 0.01))
    assert_bitwise(net, optimizer, plain, expected)


@pytest.mark.parametrize("base", BASES)
def test_a_scaler_that_skips_a_step(base: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = lightning_fabric.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fabric = fabric_of(plugins=[plugin])
    net, plain = mlp(), mlp()
    model, optimizer = fabric.setup(net, wrapped(net, base))
    expected, scale = wrapped(plain, base), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, x in enumerate(inputs(BATCHES)):
        factor = torch.inf if i == 2 else 1.0
        optimizer.zero_grad()
        fabric.backward(model(x).float().square().mean() * factor)
        fabric.clip_gradients(model, optimizer, max_norm=0.05, error_if_nonfinite=False)
        optimizer.step()
        expected.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output = plain(x.half())
        scale.scale(output.float().square().mean() * factor).backward()
        scale.unscale_(expected)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        scale.step(expected)
        scale.update()
    assert scaler.get_scale() == scale.get_scale() == 2.0**9
    assert counts(optimizer) == {(BATCHES - 1) * BATCH}
    assert_bitwise(net, optimizer, plain, expected)


@pytest.mark.parametrize("base", BASES)
def test_save_and_load_are_bitwise(base: str, tmp_path: Path) -> None:
    fabric = fabric_of()

    def start() -> dict[str, Any]:
        net = mlp()
        model, optimizer = fabric.setup(net, wrapped(net, base))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=20)
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "at": 0}

    def go(state: dict[str, Any], seed: int) -> None:
        for x in inputs(4, seed=seed):
            loop(state["model"], state["optimizer"], [x])
            state["schedule"].step()
            state["at"] += 1

    whole = start()
    go(whole, 1)
    fabric.save(tmp_path / "four", whole)
    go(whole, 2)
    resumed = start()
    assert fabric.load(tmp_path / "four", resumed) == {} and resumed["at"] == 4
    go(resumed, 2)
    assert same(weights(resumed["model"]), weights(whole["model"]))
    for key in ("optimizer", "schedule"):
        assert same(resumed[key].state_dict(), whole[key].state_dict()), key
    assert counts(resumed["optimizer"]) == {8 * BATCH}


def test_the_members_of_the_wrapper_are_those_of_fabrics_optimizer() -> None:
    """Fabric's optimizer is of a class that inherits from ours, but shares no ``__dict__`` with it."""
    net = mlp()
    mine = wrapped(net, "SGD")
    _, optimizer = fabric_of().setup(net, mine)
    with optimizer.pause_statistics():
        loop(net, optimizer, inputs(1))
    assert counts(mine) == {0}
    optimizer.rescan()
    loop(net, optimizer, inputs(1))
    assert counts(mine) == counts(optimizer) == {BATCH}
    assert str(optimizer.coverage()) == str(mine.coverage())
    assert repr(optimizer) == "Fabric" + repr(mine)
    optimizer.remove_hooks()
    assert hook_count(net) == 0


def test_wrapping_what_fabric_has_made_of_an_optimizer_is_refused() -> None:
    """Its step unscales and calls the strategy: that belongs outside of ours."""
    net = mlp()
    model, optimizer = fabric_of().setup(net, BASES["AdamW"](net.parameters()))
    with pytest.raises(TypeError, match=r"FabricAdamW that .* hand the trainer BNPreconditioner\(AdamW"):
        BNPreconditioner(optimizer, model)
    assert hook_count(net) == 0
