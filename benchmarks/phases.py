"""Where the wrapper's time goes: the phases of a training step with it and without it, interleaved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.methods import METHODS, Training
from benchmarks.timing import Contestant, Plan, interleave
from benchmarks.workloads import Workload

PHASES = {
    "zero_grad": "zero_grad",
    "forward": "forward and loss, with the forward hooks",
    "backward": "backward, with the backward hooks",
    "before": "step(), before the base's step",
    "base": "step(), the base's step",
    "after": "step(), after the base's step",
}


class PhasedStep:
    """Takes a training step and keeps the seconds of its phases, in the order of PHASES, in ``samples``.

    The wrapper's base gets a ``step`` of its own that tells when it begins and ends; the plain base's ``step()``
    counts whole as the base's. If the wrapper does not call the base's step, all of its own counts as "before".
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.samples: list[list[float]] = []
        self._inner: list[float] = []
        (optimizer,) = training.optimizers
        base = getattr(optimizer, "base_optimizer", None)
        self._wrapped = base is not None
        if base is not None:
            step = type(base).step
            inner = step.__wrapped__ if getattr(step, "hooked", False) else step  # the wrapper has fired the hooks

            def timed(closure: Any = None) -> Any:
                self._inner.append(time.perf_counter())
                result = inner(base, closure)
                self._inner.append(time.perf_counter())
                return result

            base.step = timed

    def __call__(self) -> float:
        clock = time.perf_counter
        marks = [clock()]
        self.training.zero_grad()
        marks.append(clock())
        loss = self.training.forward()
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        self._inner.clear()
        self.training.optimize()
        end = clock()
        if not self._wrapped:
            marks += [marks[-1], end, end]
        else:
            marks += [*(self._inner or (end, end)), end]
        self.samples.append([after - before for before, after in pairwise(marks)])
        return marks[-1] - marks[0]


def profile(work: Workload, batch_size: int, name: str, plan: Plan) -> dict[str, dict[str, float]]:
    """By phase, the median microseconds of the plain base, of the method ``name`` around it, and the difference.

    A last entry, "all", has the whole step. The medians of phases need not add up to the median of the step.
    """
    pair = {key: PhasedStep(Training(work, batch_size, METHODS[key])) for key in (METHODS[name].base, name)}
    contestants = [Contestant(key, step) for key, step in pair.items()]
    interleave(contestants, plan)
    base, ours = (
        _medians(step.samples[-sum(map(len, contestant.rounds)) :])
        for step, contestant in zip(pair.values(), contestants, strict=True)
    )
    return {
        key: {"base_us": base[key], "wrapped_us": ours[key], "added_us": ours[key] - base[key]}
        for key in (*PHASES, "all")
    }


def _medians(samples: list[list[float]]) -> dict[str, float]:
    array = 1e6 * np.asarray(samples)
    middle = [*np.median(array, axis=0), np.median(array.sum(1))]
    return {key: float(value) for key, value in zip((*PHASES, "all"), middle, strict=True)}


def phase_table(result: Mapping[str, Mapping[str, float]], title: str, base: str) -> str:
    """The profile as a Markdown table; the share is that of the base's whole step."""
    lines = [f"| {title}, µs | {base} | wrapped | added | share |", "| --- | ---: | ---: | ---: | ---: |"]
    whole = result["all"]["base_us"]
    for key, r in result.items():
        lines.append(
            f"| {PHASES.get(key, 'whole step')} | {r['base_us']:.1f} | {r['wrapped_us']:.1f} | {r['added_us']:+.1f} "
            f"| {r['added_us'] / whole:+.1%} |"
        )
    return "\n".join(lines)
