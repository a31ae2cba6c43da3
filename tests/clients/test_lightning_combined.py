"""Combinations in Lightning: it assigns to their groups and state, moves them, saves them, and schedules them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPMuon, CombinedOptimizer
from tests.conftest import same, weights
from tests.test_combined import combined

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")


class Regression(pl.LightningModule):  # type: ignore[misc]
    """4 → 6 → 5 → 3, under BNPMuon or a plain combination."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.wrapped = wrapped
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def train_dataloader(self) -> Any:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) + 1
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)

    def configure_optimizers(self) -> Any:
        optimizer = BNPMuon(self.parameters()) if self.wrapped else combined(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(wrapped: bool, epochs: int, folder: Path, resume: Path | None = None) -> tuple[Regression, Any]:
    model = Regression(wrapped)
    trainer = pl.Trainer(
        max_epochs=epochs,
        gradient_clip_val=0.5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, ckpt_path=resume)
    return model, trainer


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_resumed_from_its_checkpoint_is_bitwise_the_run(wrapped: bool, tmp_path: Path) -> None:
    if wrapped and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    whole, _ = fit(wrapped, 4, tmp_path)
    _, trainer = fit(wrapped, 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = fit(wrapped, 4, tmp_path, tmp_path / "half.ckpt")
    assert same(weights(resumed), weights(whole))
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is (BNPMuon if wrapped else CombinedOptimizer)
    start = (0.01, 0.001) if wrapped else (0.1, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 16 for rate in start])
