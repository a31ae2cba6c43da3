"""Watch the curvature while a small network learns Fashion-MNIST; about a minute on a CPU.

    python examples/lightning_callbacks.py --data-dir path/to/data    # holds fashion-mnist/*.gz
    python examples/lightning_callbacks.py                            # downloads it, if torchvision is installed

What it logs is in lightning_logs/: a CSV file, and TensorBoard's files if that is installed (`tensorboard --logdir
lightning_logs` shows the spectra, too). A table of some of it is printed at the end.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Python looks into a script's own folder first, where this very file has the name of the package that it shows
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from bnp_optim import BNPreconditioner
from lightning_callbacks import HessianConditionMonitor, LayerConditionMonitor, MaxLearningRateMonitor

EVERY = 45  # steps between estimates


class Classifier(pl.LightningModule):
    """784-100-100-10."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return BNPreconditioner(torch.optim.SGD(self.parameters(), lr=self.learning_rate), self)


class GaussNewton(MaxLearningRateMonitor):
    """Says where outputs end and the loss begins, as the Gauss-Newton matrix needs to know."""

    def outputs_and_loss(self, pl_module: Any, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        x, y = batch
        return pl_module.net(x), lambda outputs: F.cross_entropy(outputs, y)


def fashion_mnist(folder: Path | None, samples: int) -> TensorDataset:
    """The first training images, in [0, 1], and their labels."""
    if folder is not None:
        files = [folder / "fashion-mnist" / f"train-{x}-ubyte.gz" for x in ("images-idx3", "labels-idx1")]
        if missing := [str(f) for f in files if not f.is_file()]:
            sys.exit(f"--data-dir: there is no {missing[0]}")
        raw = [torch.frombuffer(bytearray(gzip.decompress(f.read_bytes())), dtype=torch.uint8) for f in files]
        images, labels = raw[0][16:].view(-1, 784), raw[1][8:]
    elif find_spec("torchvision") is not None:
        from torchvision.datasets import FashionMNIST

        found = FashionMNIST("data", train=True, download=True)
        images, labels = found.data.view(-1, 784), found.targets
    else:
        sys.exit("give --data-dir, the folder that holds fashion-mnist/*.gz, or install torchvision to download it")
    return TensorDataset(images[:samples].float() / 255, labels[:samples].long())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="folder that holds fashion-mnist/")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    options = parser.parse_args()
    pl.seed_everything(0)
    data = fashion_mnist(options.data_dir, options.samples)

    # always the same samples, and more of them than the first layer has inputs: a batch of 64 says little about 784
    fixed = DataLoader(Subset(data, range(min(2000, len(data)))), batch_size=1000)
    watch: dict[str, Any] = {"every_n_train_steps": EVERY, "dataloader": fixed, "num_batches": 2}
    hessian = HessianConditionMonitor(num_steps=20, num_probes=2, **watch)
    rates = GaussNewton(warn_after=3, **watch)
    layers = LayerConditionMonitor(epsilon=1e-6, **watch)
    loggers: list[Any] = [pl.loggers.CSVLogger(".")]
    if find_spec("tensorboard") is not None:
        loggers.append(pl.loggers.TensorBoardLogger("."))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=loggers,
        log_every_n_steps=10,
        enable_checkpointing=False,
        callbacks=[hessian, rates, layers],
    )
    trainer.fit(Classifier(options.learning_rate), DataLoader(data, batch_size=64, shuffle=True))

    print("\n step   kappa_mean: H    PᵀHP   stable rate   first layer's input, kappa_p: raw   after P")
    for (step, h), (_, r), (_, x) in zip(hessian.history, rates.history, layers.history, strict=True):
        print(
            f"{step:5d} {h['hessian/kappa_mean']:15.1f} {h['preconditioned_hessian/kappa_mean']:7.1f}"
            f" {r['learning_rate/max']:13.3f} {x['layers/net.0/kappa_p']:34.3g}"
            f" {x['layers/net.0/kappa_p_preconditioned']:9.3g}"
        )


if __name__ == "__main__":
    main()
