"""Lightning with a scheduler, clipping and checkpoints, AdamW beside BNP-AdamW; about half a minute on a CPU.

    python examples/lightning_training.py

Trains on scikit-learn's digits; halfway, a second Trainer goes on from the checkpoint of the first, as after a crash.
Needs pytorch-lightning and scikit-learn. Checkpoints go to a temporary folder, or --folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnp_optim import BNPreconditioner


class Classifier(pl.LightningModule):
    """64-100-100-10."""

    def __init__(self, bnp: bool, total_steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        if self.hparams["bnp"]:
            optimizer = BNPreconditioner(optimizer, self)  # the change
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.hparams["total_steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders(batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """1,280 digits to train, 517 to validate."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    train, rest = train_test_split(range(len(x)), train_size=1280, stratify=data.target, random_state=0)
    y = torch.tensor(data.target)
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size, shuffle=True),
        DataLoader(TensorDataset(x[rest], y[rest]), len(rest)),
    )


def fit(bnp: bool, folder: Path, epochs: int, steps: int | None) -> tuple[float, float, float]:
    """Validation accuracy at the end of the first half, at the end, and of the best checkpoint."""
    pl.seed_everything(0, verbose=False)
    train, rest = loaders(batch_size=8)
    per_epoch = min(steps or len(train), len(train))
    found = []
    for until, resume in ((epochs // 2, None), (epochs, folder / "last.ckpt")):
        checkpoints = ModelCheckpoint(folder, "best", monitor="accuracy", mode="max", save_last=True)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=until,
            limit_train_batches=per_epoch,
            gradient_clip_val=1.0,
            callbacks=[checkpoints],
            logger=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(bnp, epochs * per_epoch), train, rest, ckpt_path=resume)
        found.append(float(trainer.callback_metrics["accuracy"]))
    return found[0], found[1], float(checkpoints.best_model_score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=6, help="an even number")
    parser.add_argument("--steps", type=int, help="per epoch, instead of all")
    parser.add_argument("--folder", type=Path, help="for checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small run no faster on more
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("AdamW", "BNP-AdamW"):
            folder = (options.folder or Path(temporary)) / name
            rows[name] = fit(name != "AdamW", folder, options.epochs, options.steps)
    print(f"{'accuracy':10s} {'halfway':>8s} {'end':>6s} {'best':>6s}")
    for name, (half, end, best) in rows.items():
        print(f"{name:10s} {half:8.3f} {end:6.3f} {best:6.3f}")


if __name__ == "__main__":
    main()
