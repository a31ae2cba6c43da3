"""One training run: its configuration, the loop, and the cache of finished runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnp_optim
from benchmarks.data import Split, load_mnist
from bnp_optim import BNPreconditioner

CHANCE = 0.1  # the score of a run that diverged to NaN or infinity
CURVE_POINTS = 20

_BASES: dict[str, type[torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
_split: Split | None = None  # a worker's data, loaded once


@dataclass(frozen=True)
class Run:
    """All that decides the outcome of a run.

    Args:
        method: "SGD" or "AdamW", or "BNP-" and one of them.
        samples: One pass over the first ``samples`` of the order that ``seed`` shuffles.
        seed: Of the initial weights and of the order; methods with the same seed share both.
        widths: Of the MLP, from pixels to classes.
        torch_version: That a result was had with.
        package_digest: Of the sources of bnp_optim, for its methods; results of other sources do not count.
    """

    method: str
    learning_rate: float
    batch_size: int
    samples: int
    seed: int
    data: str = "mnist"
    widths: tuple[int, ...] = (784, 100, 100, 100, 10)
    torch_version: str = torch.__version__
    package_digest: str | None = None

    @property
    def steps(self) -> int:
        return self.samples // self.batch_size

    def make_model(self) -> nn.Module:
        return make_mlp(self.widths)

    @property
    def file_name(self) -> str:
        key = json.dumps(asdict(self), sort_keys=True)
        short = hashlib.sha256(key.encode()).hexdigest()[:12]
        return f"{self.method}_b{self.batch_size}_lr{self.learning_rate:g}_s{self.seed}_{short}.json"


def package_digest() -> str:
    """A hash of all sources of bnp_optim."""
    root = Path(bnp_optim.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def make_mlp(widths: Sequence[int]) -> nn.Sequential:
    """An MLP with ReLU and torch's default initialization."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_optimizer(method: str, learning_rate: float, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``method``, with defaults but for the learning rate."""
    base = _BASES[method.removeprefix("BNP-")](model.parameters(), lr=learning_rate)  # type: ignore[call-arg]
    return BNPreconditioner(base, model) if method.startswith("BNP-") else base


def train(run: Run, split: Split) -> dict[str, Any]:
    """Train once; returns the run with its final test accuracy, its curve and the CPU seconds of training.

    The curve is measured on every fifth test image (the first half of MNIST's test set is the easier one), at
    steps in geometric progression.
    """
    torch.manual_seed(run.seed)
    model = run.make_model()
    optimizer = make_optimizer(run.method, run.learning_rate, model)
    order = torch.randperm(len(split.train_x), generator=torch.Generator().manual_seed(run.seed))[: run.samples]
    subset_x, subset_y = split.test_x[::5], split.test_y[::5]
    stops = _curve_steps(run.steps)

    curve: list[tuple[int, float]] = []
    seconds, diverged, start = 0.0, False, time.process_time()
    for step, index in enumerate(order[: run.steps * run.batch_size].split(run.batch_size), start=1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(split.train_x[index]), split.train_y[index])
        loss.backward()
        optimizer.step()
        if step in stops:
            seconds += time.process_time() - start
            diverged = not (math.isfinite(loss.item()) and _all_finite(model))
            curve.append((step * run.batch_size, CHANCE if diverged else _accuracy(model, subset_x, subset_y)))
            if diverged:
                break
            start = time.process_time()
    if diverged:
        seen = curve[-1][0]
        curve += [(s * run.batch_size, CHANCE) for s in sorted(stops) if s * run.batch_size > seen]
    return {
        **asdict(run),
        "accuracy": CHANCE if diverged else _accuracy(model, split.test_x, split.test_y),
        "diverged": diverged,
        "seconds": round(seconds, 2),
        "curve": curve,
    }


def start_worker(data_dir: Path) -> None:
    """What each process does first: one thread, and the data."""
    global _split
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # moments of pixels that are rarely on decay to denormals: 20 % slower
    _split = load_mnist(data_dir)


def train_and_keep(run: Run, cache: Path) -> dict[str, Any]:
    """Train in a worker and leave the result in ``cache``: whole, or not at all."""
    assert _split is not None
    result = train(run, _split)
    path = cache / run.file_name
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    partial.replace(path)
    return result


def load_result(run: Run, cache: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = cache / run.file_name
    return json.loads(path.read_text()) if path.is_file() else None


def _curve_steps(steps: int) -> set[int]:
    """About CURVE_POINTS steps from 1 % of the run to its end, in geometric progression."""
    return {max(1, round(steps * 0.01 ** (1 - i / (CURVE_POINTS - 1)))) for i in range(CURVE_POINTS)}


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


@torch.no_grad()
def _all_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
