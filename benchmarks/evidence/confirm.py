"""Where a variant looks better than the default on the tuning seed, both run again at their best rates on others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.evidence.engine import Run
from benchmarks.evidence.question import Question

AT_BEST, OVER_GRID = 0.005, 0.02  # by so much better at the best rate, or on average over the grid
SEEDS = (1, 2, 3)
Grids = Mapping[tuple[str, str, int], Mapping[float, float]]  # accuracy by rate, per (task, contender, batch size)


class Pair(NamedTuple):
    """A variant that looks better than what it varies, each with its best rate."""

    task: str
    batch_size: int
    variant: str
    default: str
    rates: tuple[float, float]

    def runs(self, question: Question, preset: str) -> list[tuple[Run, Run]]:
        """(the variant's, the default's) of each seed."""
        samples = question.samples_of(self.task, self.batch_size, preset)
        return [
            tuple(
                Run(self.task, question.contenders[name], rate, self.batch_size, samples, seed)
                for name, rate in zip((self.variant, self.default), self.rates, strict=True)
            )
            for seed in SEEDS
        ]  # type: ignore[misc]


def pairs(question: Question, grids: Grids) -> Iterator[Pair]:
    """Those that look better, by AT_BEST or OVER_GRID."""
    for (task, name, batch_size), grid in grids.items():
        default = question.against.get(name)
        other = grids.get((task, default, batch_size)) if default else None
        if default is None or other is None:
            continue
        gains = max(grid.values()) - max(other.values()), fmean(grid.values()) - fmean(other.values())
        if gains[0] >= AT_BEST - 1e-9 or gains[1] >= OVER_GRID - 1e-9:
            yield Pair(task, batch_size, name, default, (best(grid), best(other)))


def best(grid: Mapping[float, float]) -> float:
    """The rate with the best accuracy, the lowest of equals."""
    return max(grid, key=lambda rate: (grid[rate], -rate))


def runs(question: Question, preset: str, grids: Grids) -> list[Run]:
    """All that the table needs."""
    found = (run for pair in pairs(question, grids) for both in pair.runs(question, preset) for run in both)
    return list(dict.fromkeys(found))


def table(question: Question, preset: str, grids: Grids, results: Mapping[Run, Mapping[str, Any]]) -> Iterator[str]:
    """Paired differences, mean ± standard error."""
    rows = []
    for pair in pairs(question, grids):
        both = pair.runs(question, preset)
        if any(run not in results for runs in both for run in runs):
            continue
        gaps = [results[v]["accuracy"] - results[d]["accuracy"] for v, d in both]
        error = stdev(gaps) / math.sqrt(len(gaps))
        rows.append(
            f"| {pair.variant} ({pair.rates[0]:g}) | {pair.default} ({pair.rates[1]:g}) | {pair.task}, "
            f"{pair.batch_size} | {signed(fmean(gaps))} ± {error:.3f} |".replace("± 0.", "± .")
        )
    if rows:
        yield f"Where a variant looked better (by {AT_BEST:g} at its best rate or {OVER_GRID:g} over the grid), seeds "
        yield f"{', '.join(map(str, SEEDS))} at these rates; paired differences ± standard error:"
        yield ""
        yield "| variant (rate) | default (rate) | task, batch size | difference |"
        yield "| --- | --- | --- | --- |"
        yield from rows
        yield ""


def signed(x: float) -> str:
    """+.012, −.012 or .000."""
    text = f"{abs(x):.3f}".removeprefix("0")
    return text if text == ".000" else ("+" if x > 0 else "−") + text
