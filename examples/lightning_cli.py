"""An optimizer from a YAML file: a small network learns scikit-learn's digits at batch size 1, in half a minute.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --optimizer BNPMuon --optimizer.lr 0.01
    python examples/lightning_cli.py fit --optimizer.help bnp_optim.BNPAdamW    # its options

``import bnp_optim`` makes the classes known by their short names; by their paths they are found without it.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnp_optim  # noqa: F401


class Digits(pl.LightningDataModule):
    """8×8 images in [0, 1]: three quarters to learn from, the others to look at."""

    def __init__(self, batch_size: int = 1, samples: int = 1347) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.x = torch.from_numpy(images).float()[order] / 16
        self.y = torch.from_numpy(labels)[order].long()
        self.batch_size, self.samples = batch_size, samples

    def train_dataloader(self) -> Any:
        data = TensorDataset(self.x[: self.samples], self.y[: self.samples])
        return DataLoader(data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.x[1347:], self.y[1347:]), 450)


class Classifier(pl.LightningModule):
    """64-64-64-10. There is no ``configure_optimizers``: the configuration says which."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)


def main(args: list[str] | None = None) -> Any:
    cli = LightningCLI(Classifier, Digits, args=args, save_config_callback=None)
    if cli.subcommand == "fit":
        print(cli.trainer.optimizers[0])
        print(f"accuracy {float(cli.trainer.callback_metrics['accuracy']):.3f}")
    return cli


if __name__ == "__main__":
    main()
