"""What a training step costs: contenders in turn, A B A B, medians; and the seconds to an accuracy that follow."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data import Split
from benchmarks.documents import environment
from benchmarks.evidence.contenders import Contender, prepared
from benchmarks.evidence.runner import single_threaded
from benchmarks.evidence.tasks import Task

TINY = 1e-6  # the rate at which steps are timed: nothing diverges, nothing is learned by heart
TARGETS = {
    "fashion": 0.80, "mnist": 0.93, "fashion-scaled": 0.80, "digits": 0.90, "cifar": 0.35, "resnet": 0.35,
    "sequential": 0.80,
}  # fmt: skip


def step_times(
    task: Task, split: Split, contenders: Sequence[Contender], batch_size: int, rounds: int = 20, burst: int = 5
) -> dict[str, float]:
    """Median CPU milliseconds of a step on ``task``, by contender; see :func:`in_turn`."""
    generator = torch.Generator().manual_seed(0)

    def build(contender: Contender) -> nn.Module:
        return prepared(task.build(contender.norm), contender)

    def batches(steps: int) -> Tensor:
        return torch.randint(len(split.train_x), (steps, batch_size), generator=generator)

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        return F.cross_entropy(model(task.prepare(split.train_x[index])), split.train_y[index])

    return in_turn(contenders, build, batches, loss, f"{task.name}, steps of {batch_size}", rounds, burst)


def in_turn(
    contenders: Sequence[Contender],
    build: Callable[[Contender], nn.Module],
    batches: Callable[[int], Iterable[Tensor]],
    loss: Callable[[nn.Module, Tensor], Tensor],
    label: str,
    rounds: int = 20,
    burst: int = 5,
) -> dict[str, float]:
    """Median CPU milliseconds of a step, by contender: ``rounds`` rounds in which each makes ``burst`` steps in turn.

    A burst counts as one measurement, so that work that a method does every few steps is in it (every ten: SOAP,
    Shampoo; their bursts are ten steps long). ``batches(steps)`` are what ``loss`` takes, one per step.
    """
    single_threaded()
    trainings = []
    for contender in contenders:
        torch.manual_seed(0)
        model = build(contender)
        steps = 10 if contender.slow else burst
        trainings.append((contender, model, contender.make(model, TINY), steps, list[float]()))
    for turn in tqdm(range(rounds + 2), desc=label, mininterval=5):
        for contender, model, optimizer, steps, found in trainings:
            chosen = batches(steps)
            with contender.context():
                start = time.process_time()
                for batch in chosen:
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
                if turn > 1:  # two rounds of warming up
                    found.append(1e3 * (time.process_time() - start) / steps)
    return {contender.name: round(statistics.median(found), 4) for contender, _, _, _, found in trainings}


def keep_times(path: Path, batch_size: int, found: Mapping[str, float]) -> None:
    """Add to the times in ``path``."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"step_ms": {}}
    document["environment"] = environment()
    document["step_ms"].setdefault(str(batch_size), {}).update(found)
    path.write_text(json.dumps(document, indent=1) + "\n")


def load_times(path: Path) -> dict[int, dict[str, float]]:
    """Milliseconds by batch size and contender, as far as they were measured."""
    if not path.is_file():
        return {}
    return {int(b): times for b, times in json.loads(path.read_text())["step_ms"].items()}


def samples_to(curves: Sequence[Sequence[tuple[int, float]]], target: float) -> float | None:
    """Samples until the mean of ``curves`` (all with the same points) reaches ``target`` for good, between points
    linearly."""
    found, before = None, (0, 0.0)
    for points in zip(*curves, strict=True):
        n, mean = points[0][0], statistics.fmean(a for _, a in points)
        if mean < target:
            found = None
        elif found is None:
            found = before[0] + (target - before[1]) / (mean - before[1]) * (n - before[0])
        before = (n, mean)
    return found
