"""One training: what decides its outcome, and the loop."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import Split
from benchmarks.evidence.contenders import Contender, prepared, started
from benchmarks.evidence.tasks import TASKS, Task
from benchmarks.evidence.variants import FOLD

PROTOCOL = 1  # of what is below; raise it when results of before no longer compare
CURVE_POINTS = 12
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class Run:
    """All that decides the outcome of a run.

    Args:
        samples: Seen in all: passes over the data, each in an order that ``seed`` shuffles; the last may be cut.
        seed: Of the initial weights and of the orders; contenders with the same seed share both.
        schedule: "constant", or "linear": down to zero at the end.
    """

    task: str
    contender: Contender
    learning_rate: float
    batch_size: int
    samples: int
    seed: int
    schedule: str = "constant"

    @property
    def steps(self) -> int:
        return self.samples // self.batch_size

    def describe(self) -> dict[str, Any]:
        """What a line of the results says of it."""
        return {
            "task": self.task, "method": self.contender.name, "learning_rate": self.learning_rate,
            "batch_size": self.batch_size, "samples": self.samples, "seed": self.seed, "schedule": self.schedule,
        }  # fmt: skip

    def execute(self, data_dir: Path) -> dict[str, Any]:
        """Train, on data that the process loads once."""
        return train(self, _data(TASKS[self.task].load, data_dir))

    @cached_property
    def key(self) -> str:
        """Differs if anything differs that the outcome depends on, the name of the contender aside."""
        parts = (
            PROTOCOL, self.task, self.contender.key, self.learning_rate, self.batch_size, self.samples, self.seed,
            self.schedule, torch.__version__,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def train(run: Run, split: Split, task: Task | None = None) -> dict[str, Any]:
    """Train once; returns accuracy, whether it diverged, its curve and the CPU seconds of training.

    The curve is (samples, accuracy) in geometric progression, on test images spread over the test set.
    """
    task = task or TASKS[run.task]
    torch.manual_seed(run.seed)
    model = prepared(task.build(run.contender.norm), run.contender)
    order = _order(run, len(split.train_x))
    started(model, run.contender, lambda: task.prepare(split.train_x[order[:FOLD]]))
    stops = curve_steps(run.steps)
    curve: list[tuple[int, float]] = []
    seconds, diverged = 0.0, False
    with run.contender.context():
        optimizer = run.contender.make(model, run.learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        start = time.process_time()
        for step, index in enumerate(order[: run.steps * run.batch_size].split(run.batch_size), start=1):
            if run.schedule == "linear":
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - (step - 1) / run.steps)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(task.prepare(split.train_x[index])), split.train_y[index])
            loss.backward()
            try:
                optimizer.step()
            except torch.linalg.LinAlgError:  # of a preconditioner that is not finite any more
                diverged = True
                break
            if step in stops:
                seconds += time.process_time() - start
                diverged = not (math.isfinite(loss.item()) and _finite(model))
                if diverged:
                    break
                curve.append((step * run.batch_size, _accuracy(model, split, task, task.curve)))
                start = time.process_time()
    curve += [(s * run.batch_size, task.chance) for s in sorted(stops)[len(curve) :]]
    return {
        "accuracy": task.chance if diverged else _accuracy(model, split, task, task.test),
        "diverged": diverged,
        "seconds": round(seconds, 3),
        "curve": [(n, round(a, 5)) for n, a in curve],
    }


def curve_steps(steps: int) -> set[int]:
    """About CURVE_POINTS steps from 1 % of the run to its end, in geometric progression."""
    return {max(1, round(steps * 0.01 ** (1 - i / (CURVE_POINTS - 1)))) for i in range(CURVE_POINTS)}


def _order(run: Run, n: int) -> Tensor:
    """Of whole passes: at least the samples of the run."""
    generator = torch.Generator().manual_seed(run.seed)
    passes = -(-run.samples // n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(passes)])


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split, task: Task, count: int) -> float:
    stride = max(1, len(split.test_x) // count)
    x, y = split.test_x[::stride][:count], split.test_y[::stride][:count]
    model.eval()
    hits = sum(
        int((model(task.prepare(a)).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    model.train()
    return hits / len(x)


@torch.no_grad()
def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@lru_cache(maxsize=2)
def _data(load: Any, data_dir: Path) -> Split:
    split: Split = load(data_dir)
    return split
