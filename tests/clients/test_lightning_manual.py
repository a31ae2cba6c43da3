"""Lightning's manual optimization, with one optimizer and with two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.clients.lightning_runs import (
    BASES,
    BATCH,
    BATCHES,
    Module,
    assert_bitwise,
    counts,
    loader,
    loop,
    pl,
    trainer,
    wrapped,
    wrapper_of,
)
from tests.conftest import inputs, mlp


class Manual(Module):
    """Accumulates, clips, and lets step() call the closure."""

    def __init__(self, base: str) -> None:
        super().__init__(base)
        self.automatic_optimization = False

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        if index % 2 == 0:
            optimizer.zero_grad()
            self.manual_backward(self(x).square().mean() / 2)
            return

        def closure() -> Tensor:
            loss: Tensor = self(x).square().mean() / 2
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            return loss.detach()

        self.losses.append(optimizer.step(closure))


@pytest.mark.parametrize("base", BASES)
def test_manual_optimization(base: str, tmp_path: Path) -> None:
    module = Manual(base)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, loader())
    net = mlp()
    optimizer = wrapped(net, base)
    loop(net, optimizer, inputs(BATCHES) * 2, accumulate=2, clip=lambda ps: nn.utils.clip_grad_norm_(ps, 0.05))
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")
    assert len(module.losses) == run.global_step == BATCHES
    first = mlp()(inputs(2)[1]).square().mean() / 2
    assert torch.equal(module.losses[0], first)


class Gan(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Two networks, two wrappers, each around the whole module."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        torch.manual_seed(2)
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.judge = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.random = torch.Generator().manual_seed(4)

    def configure_optimizers(self) -> Any:
        generator = torch.optim.AdamW(self.generator.parameters(), lr=0.01)
        judge = torch.optim.SGD(self.judge.parameters(), lr=0.05)
        return [BNPreconditioner(base, self) for base in (generator, judge)]

    def noise(self) -> Tensor:
        return torch.randn(BATCH - 3, 2, generator=self.random)

    def judged(self, real: Tensor, noise: Tensor) -> Tensor:
        score: Tensor = self.judge(real).mean() - self.judge(self.generator(noise).detach()).mean()
        return score + score.square()

    def training_step(self, real: Tensor, index: int) -> None:
        generator, judge = self.optimizers()
        noise = self.noise()
        if self.toggle:
            self.toggle_optimizer(judge)
        judge.zero_grad()
        self.manual_backward(self.judged(real, noise))
        judge.step()
        if self.toggle:
            self.untoggle_optimizer(judge)
            self.toggle_optimizer(generator)
        loss = self.judge(self.generator(noise)).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        if self.toggle:
            self.untoggle_optimizer(generator)


@pytest.mark.parametrize("toggle", [False, True])
def test_a_gan_counts_for_each_network_the_samples_behind_its_own_steps(toggle: bool, tmp_path: Path) -> None:
    """The judge: real and fake ones of its own loss, not those that it judged for the generator's, though a
    gradient of these reaches it. The generator: those of its loss, not those made for the judge's. So it is two
    trainings, each with its own loss, to the last bit."""
    module = Gan(toggle)
    run = trainer(tmp_path)
    run.fit(module, loader())
    generator, judge = wrapper_of(run, 0), wrapper_of(run, 1)
    assert counts(generator) == {BATCHES * (BATCH - 3)}
    assert counts(judge) == {BATCHES * (BATCH + BATCH - 3)}
    assert run.global_step == 2 * BATCHES

    twin = Gan(toggle)
    fakes = BNPreconditioner(torch.optim.AdamW(twin.generator.parameters(), lr=0.01), twin.generator)
    marks = BNPreconditioner(torch.optim.SGD(twin.judge.parameters(), lr=0.05), twin.judge)
    for real in inputs(BATCHES):
        noise = twin.noise()
        twin.zero_grad(set_to_none=True)
        twin.judged(real, noise).backward()
        marks.step()
        twin.zero_grad(set_to_none=True)
        twin.judge(twin.generator(noise)).mean().backward()
        fakes.step()
    assert_bitwise(module.generator, generator, twin.generator, fakes, "generator.")
    assert_bitwise(module.judge, judge, twin.judge, marks, "judge.")
