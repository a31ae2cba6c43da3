"""What a step of the character GPT costs, and what follows from it: the seconds to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.corpus import standard_library
from benchmarks.evidence.gpt import loss_of
from benchmarks.evidence.language_engine import UNIFORM, training_windows
from benchmarks.evidence.language_plan import LanguageScope
from benchmarks.evidence.times import in_turn, keep_times, samples_to

Curve = Sequence[tuple[int, float]]


def times_path(scope: LanguageScope, output: Path) -> Path:
    """Shared by the presets: what a step costs does not depend on how many there are."""
    return output / f"language_{scope.net.name}_times.json"


def measure(scope: LanguageScope, output: Path) -> None:
    """Add the times of the methods and batch sizes of ``scope`` to its file; all methods in turn."""
    corpus, generator = standard_library(), torch.Generator().manual_seed(0)
    for batch_size in scope.steps:

        def batches(steps: int, batch_size: int = batch_size) -> list[Tensor]:
            return [training_windows(corpus, scope.net.context, batch_size, generator) for _ in range(steps)]

        label = f"{scope.net.name}, steps of {batch_size}"
        chosen = [CONTENDERS[name] for name in scope.methods]
        keep_times(
            times_path(scope, output), batch_size, in_turn(chosen, lambda _: scope.net.build(), batches, loss_of, label)
        )


def mean_curve(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    """Of curves with the same steps."""
    return [(points[0][0], fmean(x for _, x in points)) for points in zip(*curves, strict=True)]


def steps_to(curves: Sequence[Curve], target: float) -> float | None:
    """Steps until the mean of ``curves`` falls to ``target`` for good, between points (and UNIFORM at 0) linearly."""
    return samples_to([[(n, UNIFORM - x) for n, x in curve] for curve in curves], UNIFORM - target)
