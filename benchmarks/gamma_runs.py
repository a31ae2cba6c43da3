"""The runs of the gamma-decay benchmark: nets with and without it, their training, and the cache of finished runs."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.sampling import load_cifar10
from benchmarks.workloads import Norm, cnn
from bnp_optim import BNPreconditioner
from bnp_optim.nn import GammaDecayPenalty, PopulationNorm2d, convert_batchnorm

IMAGES, BATCH_SIZE, EPOCHS = 1000, 32, 24
TUNING_SEED, SEEDS = 0, (1, 2, 3)
FAR = 100.0  # a loss above that is a run that diverged
STOPS = (1, 3, 6, 9, 12, 18, 24)  # epochs after which losses are measured


class Method(NamedTuple):
    """The net's normalization ("pn" is BatchNorm converted), and the strength of gamma decay."""

    norm: str
    strength: float = 0.0


RATES, MOMENTA = (0.03, 0.1, 0.3), (0.003, 0.01, 0.03, 0.1)
METHODS = {
    "BN": Method("bn"),
    "PN": Method("pn"),
    "PN + gamma decay": Method("pn", 1.0),
    "PN + gamma decay / 10": Method("pn", 0.1),
    "PN + gamma decay / 100": Method("pn", 0.01),
    "BNP": Method("none"),
    "BNP + gamma decay": Method("none", 1.0),
    "BNP + gamma decay / 10": Method("none", 0.1),
    "BNP + gamma decay / 100": Method("none", 0.01),
}


def plain(name: str) -> str:
    """The method without gamma decay."""
    return name.split(" + ")[0]


@dataclass(frozen=True)
class Training:
    """All that decides the outcome of a run.

    ``momentum`` is the normalization's, 0.1 where that is not chosen; ``package_digest`` that of the sources of
    bnp_optim.
    """

    method: str
    learning_rate: float
    seed: int
    momentum: float = 0.1
    epochs: int = EPOCHS
    images: int = IMAGES
    pixels: int = 16
    batch_size: int = BATCH_SIZE
    torch_version: str = torch.__version__
    package_digest: str | None = None

    @property
    def file_name(self) -> str:
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"gamma_{re.sub('[^A-Za-z0-9]', '', self.method)}_lr{self.learning_rate:g}_s{self.seed}_{key}.json"

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch_size)


class Data(NamedTuple):
    """Standardized images and labels by use: "train", "validation", "test"."""

    x: dict[str, Tensor]
    y: dict[str, Tensor]


def load(data_dir: Path, images: int = IMAGES) -> Data:
    """The first ``images`` of CIFAR-10 to train on, as many more to choose rates by, and every fourth test image."""
    x, y, x_test, y_test = load_cifar10(data_dir, 2 * images)
    x, x_test = F.avg_pool2d(x, 2), F.avg_pool2d(x_test[::4], 2)
    return Data(
        {"train": x[:images], "validation": x[images:], "test": x_test},
        {"train": y[:images], "validation": y[images:], "test": y_test[::4]},
    )


def make(run: Training) -> tuple[nn.Module, torch.optim.Optimizer, GammaDecayPenalty | None]:
    """The net, its optimizer and its penalty."""
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    kind: Norm = "none" if method.norm == "none" else "bn"
    model: nn.Module = cnn(kind)
    if method.norm == "pn":
        convert_batchnorm(model)
        for module in model.modules():
            if isinstance(module, PopulationNorm2d):
                module.momentum = run.momentum
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
    bnp = None
    if method.norm == "none":
        optimizer = bnp = BNPreconditioner(optimizer, model)
    if not method.strength:
        return model, optimizer, None
    return model, optimizer, GammaDecayPenalty(model, run.batch_size, optimizer=bnp, strength=method.strength)


def train(run: Training, data: Data, bar: Any = None) -> dict[str, Any]:
    """Train once; returns the run with its curve: (epoch, loss on the training images, on those of the measurement).

    A run on the tuning seed is measured on the validation images, and any other on the test images.
    """
    model, optimizer, penalty = make(run)
    x, y = data.x["train"], data.y["train"]
    held_out = "validation" if run.seed == TUNING_SEED else "test"
    generator = torch.Generator().manual_seed(run.seed)
    curve, seconds, diverged, added = [], 0.0, False, 0.0
    for epoch in range(1, run.epochs + 1):
        start = time.process_time()
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for batch in order.split(run.batch_size)[: len(x) // run.batch_size]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            if penalty is not None:
                added = float(penalty.add_gradients())
            optimizer.step()
            if bar is not None:
                bar.update()
        seconds += time.process_time() - start
        if epoch in STOPS or epoch == run.epochs:
            point = [evaluate(model, data.x[k], data.y[k]) for k in ("train", held_out)]
            diverged = not all(p[0] < FAR for p in point)  # NaN is not
            if diverged:
                break
            curve.append((epoch, point[0][0], point[1][0]))
            final = point
    nothing = [(math.log(10), 0.1)] * 2  # a diverged run knows nothing
    (train_loss, train_accuracy), (loss_held_out, accuracy) = nothing if diverged else final
    return {
        **asdict(run),
        "held_out": held_out,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "loss": loss_held_out,
        "accuracy": accuracy,
        "penalty": added,
        "diverged": diverged,
        "seconds": round(seconds, 1),
        "curve": curve,
    }


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode."""
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(250)])
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).double().mean().item()


def train_all(runs: Sequence[Training], data: Data, cache: Path, what: str) -> list[dict[str, Any]]:
    """All runs, those that are in ``cache`` already from there."""
    cache.mkdir(parents=True, exist_ok=True)
    results = []
    with tqdm(total=sum(run.steps for run in runs), desc=what, unit="step", mininterval=5) as bar:
        for run in runs:
            path = cache / run.file_name
            if path.is_file():
                bar.update(run.steps)
            else:
                bar.set_postfix_str(f"{run.method}, rate {run.learning_rate:g}, seed {run.seed}")
                done = train(run, data, bar)
                path.with_suffix(".part").write_text(json.dumps(done))
                path.with_suffix(".part").replace(path)
            results.append(json.loads(path.read_text()))
    return results
