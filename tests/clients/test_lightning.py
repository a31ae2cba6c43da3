"""Lightning's Trainer, unmodified: automatic optimization is the loop that one would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.clients.lightning_runs import (
    BASES,
    BATCH,
    BATCHES,
    Module,
    Validated,
    assert_bitwise,
    counts,
    loader,
    loop,
    pl,
    trainer,
    wrapped,
    wrapper_of,
)
from tests.conftest import hook_count, inputs, mlp, same

CLIPS: dict[str, Any] = {
    "none": ({}, None),
    "norm": ({"gradient_clip_val": 0.05}, lambda ps: nn.utils.clip_grad_norm_(ps, 0.05)),
    "value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        lambda ps: nn.utils.clip_grad_value_(ps, 0.01),
    ),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("base", BASES)
def test_automatic_optimization(base: str, accumulate: int, clip: str, tmp_path: Path) -> None:
    """With a validation that is nobody's sample."""
    module = Validated(base)
    options, by_hand = CLIPS[clip]
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, **options)
    run.fit(module, loader(), loader())
    assert counts(wrapper_of(run)) == {2 * BATCHES * BATCH}

    net = mlp()
    optimizer = wrapped(net, base)
    loop(net, optimizer, inputs(BATCHES) * 2, accumulate=accumulate, clip=by_hand)
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")


def test_the_last_accumulation_of_an_epoch_may_be_short(tmp_path: Path) -> None:
    """Lightning steps at the end of the epoch with what there is, divided as ever."""
    module = Module()
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4)
    run.fit(module, loader())
    net = mlp()
    optimizer = wrapped(net, "SGD")
    for _ in range(2):
        for part in (inputs(BATCHES)[:4], inputs(BATCHES)[4:]):
            optimizer.zero_grad()
            for x in part:
                (net(x).square().mean() / 4).backward()
            optimizer.step()
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")


@pytest.mark.parametrize("base", BASES)
def test_a_net_that_configure_model_builds(base: str, tmp_path: Path) -> None:
    class Late(Module):
        def __init__(self, base: str) -> None:
            super().__init__(base, nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.net, nn.Identity):
                self.net = mlp()

    module = Late(base)
    run = trainer(tmp_path)
    run.fit(module, loader())
    net = mlp()
    optimizer = wrapped(net, base)
    loop(net, optimizer, inputs(BATCHES))
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")


def test_before_the_optimizer_steps_gradients_are_those_of_the_loss(tmp_path: Path) -> None:
    """Clipped, but not preconditioned yet: what a callback logs there is what it was without the wrapper."""

    class Watching(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            before_clipping.append([p.grad.clone() for p in self.parameters()])  # type: ignore[union-attr]

    before_clipping: list[list[Tensor]] = []
    module = Watching()
    trainer(tmp_path, limit_train_batches=1, gradient_clip_val=0.05).fit(module, loader())
    net = mlp()
    net(inputs(1)[0]).square().mean().backward()
    assert same(before_clipping, [[p.grad for p in net.parameters()]])


def test_the_summary_and_its_example_input_count_no_samples(tmp_path: Path) -> None:
    module = Module()
    run = trainer(tmp_path, enable_model_summary=True)
    run.fit(module, loader())
    summary = pl.utilities.model_summary.ModelSummary(module, max_depth=-1)
    assert summary.layer_names and summary.in_sizes[-1] == [3, 6]
    assert counts(wrapper_of(run)) == {BATCHES * BATCH}
    assert hook_count(module) == 2


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
@pytest.mark.parametrize("base", BASES)
def test_bfloat16(base: str, precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The loop again, to the last bit; it learns, and its statistics are float32's."""
    module = Module(base)
    run = trainer(tmp_path, precision=precision, max_epochs=10)
    run.fit(module, loader())
    assert {p.dtype for p in module.parameters()} == {dtype}
    found = wrapper_of(run).statistics["net.0"]
    assert found.mean.dtype == found.variance.dtype == torch.float32
    assert counts(wrapper_of(run)) == {10 * BATCHES * BATCH}
    x = torch.cat(inputs(BATCHES))
    torch.testing.assert_close(found.mean, x.mean(0), rtol=0.05, atol=0.05)
    first, last = (torch.stack(module.losses[part]).mean() for part in (slice(BATCHES), slice(-BATCHES, None)))
    assert last < first / 4

    net = mlp().to(dtype)
    optimizer = wrapped(net, base)
    for x in inputs(BATCHES) * 10:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = net(x.to(dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")


@pytest.mark.parametrize("base", BASES)
def test_float16_with_a_scaler_that_skips_a_step(base: str, tmp_path: Path) -> None:
    """Lightning's own "16-mixed" needs an accelerator; its plugin takes a scaler for the CPU."""

    class Overflowing(Module):
        def training_step(self, x: Tensor, index: int) -> Tensor:
            return super().training_step(x, index) * (torch.inf if index == 2 else 1.0)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    module = Overflowing(base)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler())
    run = trainer(tmp_path, plugins=[plugin], max_epochs=2, gradient_clip_val=0.05)
    run.fit(module, loader())
    assert counts(wrapper_of(run)) == {2 * (BATCHES - 1) * BATCH}

    net, scale = mlp(), scaler()
    optimizer = wrapped(net, base)
    for i, x in enumerate(inputs(BATCHES) * 2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = net(x).float().square().mean()
        scale.scale(loss * (torch.inf if i % BATCHES == 2 else 1.0)).backward()
        scale.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        scale.step(optimizer)
        scale.update()
    assert scale.get_scale() == plugin.scaler.get_scale() == 2.0**8
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")
