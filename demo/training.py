"""One run with Lightning."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnp_optim import BNPreconditioner
from demo.models import Digits, cnn, mlp

MODELS: dict[str, Callable[[bool], nn.Module]] = {"MLP": mlp, "CNN": cnn}
EPOCHS = {1: 1, 8: 4, 64: 10}  # by batch size, the same for all methods

# One rate per method, at every batch size and for both models. Chosen once, with the same effort for every method:
# out of .01/.03/.1/.3/1 for SGD and 3e-4/1e-3/3e-3/1e-2/3e-2 for Adam and AdamW, the rate with the lowest training
# loss at the end, averaged over models and batch sizes, with seed 1. No test image took part.
LEARNING_RATE = {"SGD": 0.1, "Adam": 3e-3, "BatchNorm + SGD": 0.1, "BNP-SGD": 0.1, "BNP-AdamW": 1e-2}
SEED = 0
CURVE_POINTS = 30


class LitDigits(pl.LightningModule):
    """Cross-entropy on the digits; ``configure_optimizers`` is all that the methods differ in."""

    def __init__(self, model: str, method: str, learning_rate: float) -> None:
        super().__init__()
        self.net = MODELS[model](method.startswith("BatchNorm"))
        self.method = method
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        lr = self.learning_rate
        if self.method == "BNP-SGD":
            return BNPreconditioner(torch.optim.SGD(self.parameters(), lr=lr), self)
        if self.method == "BNP-AdamW":
            return BNPreconditioner(torch.optim.AdamW(self.parameters(), lr=lr), self)
        if self.method == "Adam":
            return torch.optim.Adam(self.parameters(), lr=lr)
        return torch.optim.SGD(self.parameters(), lr=lr)


class AccuracyCurve(pl.Callback):
    """Test accuracy at about CURVE_POINTS moments, close together at the start."""

    def __init__(self, data: Digits, batch_size: int, steps: int, on_steps: Callable[[int], None]) -> None:
        self.data = data
        self.batch_size = batch_size
        self.stops = {max(1, round(steps * (i / CURVE_POINTS) ** 2)) for i in range(1, CURVE_POINTS + 1)}
        self.on_steps = on_steps
        self.points: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.stops:
            accuracy, _ = evaluate(pl_module, self.data.test_x, self.data.test_y)
            self.points.append((trainer.global_step * self.batch_size, accuracy))
        self.on_steps(1)


@dataclass(frozen=True)
class Outcome:
    """What a run gives: the accuracy at the end, the loss on the training set, the curve."""

    model: str
    method: str
    batch_size: int
    learning_rate: float
    accuracy: float
    train_loss: float
    seconds: float
    curve: list[tuple[int, float]] = field(repr=False)


@torch.no_grad()
def evaluate(module: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy, in eval mode."""
    was_training = module.training
    module.eval()
    logits = module(x)
    module.train(was_training)
    return (logits.argmax(1) == y).double().mean().item(), F.cross_entropy(logits, y).item()


def train(
    data: Digits,
    model: str,
    method: str,
    batch_size: int,
    *,
    learning_rate: float | None = None,
    seed: int = SEED,
    on_steps: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Train once; all methods get the same initial weights and the same order of samples."""
    rate = LEARNING_RATE[method] if learning_rate is None else learning_rate
    torch.manual_seed(seed)
    module = LitDigits(model, method, rate)
    loader = DataLoader(
        TensorDataset(data.train_x, data.train_y),
        batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    curve = AccuracyCurve(data, batch_size, EPOCHS[batch_size] * len(loader), on_steps)
    trainer = pl.Trainer(
        max_epochs=EPOCHS[batch_size],
        accelerator="cpu",
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - start
    accuracy = evaluate(module, data.test_x, data.test_y)[0]
    loss = evaluate(module, data.train_x, data.train_y)[1]
    return Outcome(
        model,
        method,
        batch_size,
        rate,
        accuracy,
        loss if math.isfinite(loss) else math.inf,
        round(seconds, 2),
        curve.points,
    )


def runs() -> list[tuple[str, str, int]]:
    """(model, method, batch size) of all runs; BatchNorm cannot train on a single sample."""
    return [
        (model, method, batch_size)
        for model in MODELS
        for method in LEARNING_RATE
        for batch_size in EPOCHS
        if batch_size > 1 or not method.startswith("BatchNorm")
    ]


def silence_lightning() -> None:
    """No banners, and no advice that means nothing for runs of seconds."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
