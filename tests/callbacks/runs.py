"""Modules that do everything a training step may do, trainers that write everything down, and small monitors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnp_optim import BNPreconditioner

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
from lightning_callbacks import (  # noqa: E402
    ActivationMonitor,
    HessianConditionMonitor,
    LayerConditionMonitor,
    MaxLearningRateMonitor,
    StepDivergenceProbe,
)

BATCHES, BATCH = 8, 8
OURS = ("hessian/", "learning_rate/", "layers/", "activations/", "step/")
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "BNP-SGD": lambda m: BNPreconditioner(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), m),
    "BNP-AdamW": lambda m: BNPreconditioner(torch.optim.AdamW(m.parameters(), lr=0.01), m),
}


def data(features: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCHES * BATCH, features, generator=generator) * torch.linspace(0.5, 2, features) + 0.5
    return TensorDataset(x, torch.randint(3, (len(x),), generator=generator))


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=BATCH, shuffle=shuffle)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make()


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def noisy_net() -> nn.Sequential:
    """Draws random numbers, has buffers that move, and a buffer that the result depends on."""
    normed = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh())
    return normed.extend([nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3)])


class Plain(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Cross-entropy, and nothing else."""

    def __init__(self, optimizer: str = "SGD", net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = seeded(plain_net) if net is None else net
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self)


class Busy(Plain):
    """Logs, counts, draws from every generator, changes its batch, keeps metrics and lists."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer, seeded(noisy_net))
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        self.accuracy, self.mean = MulticlassAccuracy(3), MeanMetric()
        self.losses: list[float] = []
        self.calls = {"steps": 0}
        self.draws = 0.0

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        x.add_(0.01 * random.random() + 0.01 * float(np.random.rand()))
        out = self(x)
        loss = nn.functional.cross_entropy(out, y)
        self.calls["steps"] += 1
        self.losses.append(float(loss.detach()))
        self.draws += float(torch.rand(()))
        self.accuracy(out.detach(), y)
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "mean": self.mean}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": self.losses[-1]}, step=self.calls["steps"])
        return {"loss": loss, "also": 1}


class Figures:
    def __init__(self) -> None:
        self.drawn: list[tuple[str, int]] = []

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        assert figure.axes[0].lines
        self.drawn.append((tag, global_step))


class Recorder(pl.loggers.logger.Logger):  # type: ignore[misc, name-defined]
    """Keeps what it is told; its experiment takes figures as TensorBoard's does."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.experiment = Figures()

    name = version = "recorder"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((-1 if step is None else step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, *prefixes: str) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(p in key for key in row for p in prefixes)]


class Split(MaxLearningRateMonitor):
    def outputs_and_loss(self, pl_module: Any, batch: Any) -> Any:
        return pl_module(batch[0]), lambda outputs: nn.functional.cross_entropy(outputs, batch[1])


def monitors(**schedule: Any) -> list[Any]:
    schedule = {"every_n_train_steps": 2} | schedule
    return [
        HessianConditionMonitor(num_steps=4, num_probes=2, **schedule),
        Split(num_steps=4, **schedule),
        LayerConditionMonitor(**schedule),
        ActivationMonitor(**schedule),
        StepDivergenceProbe(step_sizes=[0.01, 0.1, 1.0], **schedule),
    ]


def trainer(folder: Path, callbacks: Any = (), **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 1, "logger": Recorder()}
    return pl.Trainer(**defaults | quiet | {"default_root_dir": folder} | options, callbacks=list(callbacks))


def reseed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def fit(folder: Path, module: Any, callbacks: Any = (), ckpt: Path | None = None, **options: Any) -> Any:
    """Train from fixed random numbers; returns the trainer."""
    run = trainer(folder, callbacks, **options)
    reseed()
    run.fit(module, loader(), ckpt_path=ckpt, weights_only=None if ckpt is None else False)
    return run


def left_behind(run: Any, module: Any) -> dict[str, Any]:
    """All that training has produced, and that it goes on from."""
    numpy_state = np.random.get_state(legacy=True)
    logged = [
        (step, row) for log in run.loggers for step, row in log.rows if not any(o in k for k in row for o in OURS)
    ]
    return {
        "weights": dict(module.state_dict()),
        "grad": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "optimizers": [o.state_dict() for o in run.optimizers],
        "rng": [torch.get_rng_state(), list(random.getstate()[1]), numpy_state[1].tolist(), int(numpy_state[2])],
        "logged": [(step, {k: float(v) for k, v in row.items()}) for step, row in logged],
        "metrics": {k: v for k, v in run.callback_metrics.items() if not any(o in k for o in OURS)},
        "attributes": [getattr(module, name, None) for name in ("losses", "calls", "draws", "seen")],
        "steps": run.global_step,
    }


def hessian_in_a_script() -> str:
    """Source of ``train(LightningModule, Trainer)``, which returns what a monitor has logged."""
    return """
def train(LightningModule, Trainer):
    import torch
    from bnp_optim import BNPreconditioner
    from lightning_callbacks import HessianConditionMonitor

    torch.set_num_threads(1)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(3, 2)

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return BNPreconditioner(torch.optim.SGD(self.parameters(), lr=0.1), self)

    monitor = HessianConditionMonitor(every_n_train_steps=2, num_steps=3, num_probes=0, log=False)
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(torch.randn(16, 3), batch_size=4)
    found = monitor.history
    options = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=monitor, **options).fit(Module(), loader)
    return [(step, row["hessian/lambda_max"], row["preconditioned_hessian/lambda_max"]) for step, row in found]
"""
