"""Lightning's schedulers and checkpoints with the wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
from tests.conftest import inputs, mlp, same, weights


def one_cycle(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps)


class Scheduled(Validated):
    """With a scheduler that Lightning steps, per step, per epoch or on what was measured."""

    def __init__(self, base: str, kind: str) -> None:
        super().__init__(base)
        self.kind = kind
        self.rates: list[tuple[float, Any]] = []

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.kind == "one cycle":
            return [optimizer], [{"scheduler": one_cycle(optimizer, 3 * BATCHES), "interval": "step"}]
        if self.kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "validation"}}
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def training_step(self, x: Tensor, index: int) -> Tensor:
        (group,) = self.optimizers().param_groups
        self.rates.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))
        return super().training_step(x, index)


@pytest.mark.parametrize("kind", ["one cycle", "plateau", "per epoch"])
@pytest.mark.parametrize("base", BASES)
def test_schedulers(base: str, kind: str, tmp_path: Path) -> None:
    module = Scheduled(base, kind)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(module, loader(), loader())
    net = mlp()
    optimizer = wrapped(net, base)
    start = optimizer.param_groups[0]["lr"]
    schedule = one_cycle(optimizer, 3 * BATCHES) if kind == "one cycle" else None
    if schedule is None:  # one epoch is a plateau: nobody can be nine tenths better
        expected = [start * 0.5**e for e in ((0, 0, 1) if kind == "plateau" else (0, 1, 2)) for _ in range(BATCHES)]
        assert [rate for rate, _ in module.rates] == expected
    for i, x in enumerate(inputs(BATCHES) * 3):
        group = optimizer.param_groups[0]
        if schedule is None:
            group["lr"] = module.rates[i][0]
        else:
            assert module.rates[i] == (group["lr"], group["betas"][0] if "betas" in group else group["momentum"])
        loop(net, optimizer, [x])
        if schedule is not None and i < 3 * BATCHES - 1:
            schedule.step()
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")


@pytest.mark.parametrize("kind", ["one cycle", "plateau"])
@pytest.mark.parametrize("base", BASES)
def test_resume_from_a_checkpoint_is_bitwise(base: str, kind: str, tmp_path: Path) -> None:
    """After two epochs, which had moved the rates."""
    whole = Scheduled(base, kind)
    straight = trainer(tmp_path, max_epochs=3)
    straight.fit(whole, loader(), loader())

    first = trainer(tmp_path, max_epochs=2)
    first.fit(Scheduled(base, kind), loader(), loader())
    first.save_checkpoint(tmp_path / "two.ckpt")
    module = Scheduled(base, kind)
    second = trainer(tmp_path, max_epochs=3)
    second.fit(module, loader(), loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert module.rates == whole.rates[2 * BATCHES :]
    assert same(weights(module), weights(whole))
    assert same(wrapper_of(second).state_dict(), wrapper_of(straight).state_dict())
    assert counts(wrapper_of(second)) == {3 * BATCHES * BATCH}


class Numbered(Module):
    """Takes the batch of its number: Lightning's loaders do not go on amid an epoch by themselves."""

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return super().training_step(inputs(BATCHES)[index], index)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("base", BASES)
def test_resume_amid_an_epoch_is_bitwise(base: str, tmp_path: Path) -> None:
    def keep() -> dict[str, Any]:
        callback = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return {"callbacks": [callback], "enable_checkpointing": True, "max_epochs": 2}

    whole, module = Numbered(base), Numbered(base)
    straight, resumed = trainer(tmp_path, **keep()), trainer(tmp_path, **keep())
    straight.fit(whole, loader())
    resumed.fit(module, loader(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    assert len(module.losses) == 2 * BATCHES - 4
    assert same(module.losses, whole.losses[4:])
    assert same(wrapper_of(resumed).state_dict(), wrapper_of(straight).state_dict())
