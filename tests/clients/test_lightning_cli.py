"""LightningCLI: the optimizer comes from a YAML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPAdamW, BNPMuon, BNPreconditioner
from tests.conftest import same, weights

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
cli = pytest.importorskip("pytorch_lightning.cli")

pytestmark = pytest.mark.filterwarnings(  # Lightning's own calls, on a newer jsonargparse
    r"ignore::DeprecationWarning:pytorch_lightning\.cli"
)
CONFIGURATION = """
seed_everything: 3
model: {{width: 6}}
optimizer:
  class_path: {optimizer}
  init_args: {options}
lr_scheduler: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{step_size: 1, gamma: 0.5}}}}
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


class Regression(pl.LightningModule):  # type: ignore[misc]
    """4 → width → 3."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def train_dataloader(self) -> Any:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) + 1
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, options: str) -> Any:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIGURATION.format(optimizer=optimizer, options=options), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return cli.LightningCLI(Regression, args=["fit", "--config", str(file)], save_config_callback=None)


def by_hand(make: Any) -> tuple[Regression, BNPreconditioner]:
    model = Regression(6)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        for batch in model.train_dataloader():
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            optimizer.step()
        schedule.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["bnp_optim.BNPAdamW", "BNPAdamW"])
def test_an_optimizer_by_path_and_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "{lr: 0.1, betas: [0.8, 0.9], stat_decay: 0.9, step_scale: null, skip: [net.2, torch.nn.Conv2d]}"
    trained = fit(tmp_path, monkeypatch, name, options)
    (optimizer,) = trained.trainer.optimizers
    assert type(optimizer) is BNPAdamW and list(optimizer.statistics) == ["net.0"]

    def make(model: Regression) -> BNPreconditioner:
        base = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
        return BNPreconditioner(base, model, stat_decay=0.9, step_scale=None, skip=["net.2"])

    expected, reference = by_hand(make)
    assert same(weights(trained.model), weights(expected))
    assert optimizer.statistics["net.0"].count == reference.statistics["net.0"].count == 64


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = fit(tmp_path, monkeypatch, "bnp_optim.BNPMuon", "{lr: 0.05, adamw_lr: 0.01, head: [net.2]}")
    expected, _ = by_hand(lambda model: BNPMuon(model, lr=0.05, adamw_lr=0.01))
    assert same(weights(trained.model), weights(expected))
    assert [len(group["params"]) for group in trained.trainer.optimizers[0].param_groups] == [1, 3]


def test_an_option_out_of_range_or_unknown_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="stat_decay is 2"):
        fit(tmp_path, monkeypatch, "bnp_optim.BNPSGD", "{lr: 0.1, stat_decay: 2.0}")
    with pytest.raises(SystemExit):
        fit(tmp_path, monkeypatch, "bnp_optim.BNPSGD", "{lr: 0.1, stat_decoy: 0.9}")
    assert "stat_decoy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit(tmp_path, monkeypatch, "bnp_optim.BNPSGD", "{lr: 0.1, step_scale: twice}")
    assert "step_scale" in capsys.readouterr().err
