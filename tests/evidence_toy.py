"""A task that the evidence engine learns in a blink."""

from __future__ import annotations

import torch

from benchmarks.data import Split
from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.engine import Run
from benchmarks.evidence.tasks import Task
from benchmarks.workloads import mlp


def split() -> Split:
    x = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.5).long()
    return Split(x, y, x[:100], y[:100])


TOY = Task(
    "toy", "toy", lambda _: split(), lambda norm: mlp((12, 10, 2), norm), {10: 400, 20: 400}, 100, 50, chance=0.5
)


def toy(name: str = "SGD", rate: float = 0.1, seed: int = 0, schedule: str = "constant", samples: int = 400) -> Run:
    return Run("toy", CONTENDERS[name], rate, 10, samples, seed, schedule)
