"""Which runs: first every rate on the tuning seed, then the reporting seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.evidence.contenders import CONTENDERS, OWN_Q, PEERS, Contender
from benchmarks.evidence.engine import SCHEDULES, Run
from benchmarks.evidence.tasks import TASKS

TUNING_SEED = 0
FOLDED = tuple(name for name, c in CONTENDERS.items() if c.variant == "folded")
RIVALS, MORE_SEEDS = ("Muon", "BNP-Muon", "SOAP", "BNP-SOAP"), tuple(range(6, 16))
Results = Mapping[Run, Mapping[str, Any]]


@dataclass(frozen=True)
class Scope:
    """What of a task is measured.

    Args:
        samples: Seen in all, by batch size.
        seeds: The reporting seeds, at the rate that the tuning seed chose.
        slow: Batch sizes and schedules of the slow contenders; None: all.
        untuned: These report at the one rate that is best for all batch sizes, too.
        close: Batch sizes and schedules where the contenders in RIVALS have MORE_SEEDS too, since the reporting seeds
            left open which of them is ahead.
    """

    task: str
    samples: Mapping[int, int]
    contenders: tuple[str, ...] = tuple(PEERS)
    schedules: tuple[str, ...] = SCHEDULES
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    slow: tuple[tuple[int, str], ...] | None = None
    untuned: tuple[str, ...] = ()
    close: tuple[tuple[int, str], ...] = ()

    def cells(self) -> Iterator[tuple[Contender, int, str]]:
        """(contender, batch size, schedule), the quick contenders of a batch size first."""
        for schedule in self.schedules:
            for batch_size in self.samples:
                for c in sorted((CONTENDERS[n] for n in self.contenders), key=lambda c: c.slow):
                    left_out = c.slow and self.slow is not None and (batch_size, schedule) not in self.slow
                    if not left_out and not impossible(c, batch_size):
                        yield c, batch_size, schedule

    def run(self, contender: Contender, batch_size: int, schedule: str, rate: float, seed: int) -> Run:
        return Run(self.task, contender, rate, batch_size, self.samples[batch_size], seed, schedule)

    def tuning(self) -> list[Run]:
        """Every cell at every rate."""
        return [self.run(c, b, s, rate, TUNING_SEED) for c, b, s in self.cells() for rate in c.rates]

    def reporting(self, results: Results) -> list[Run]:
        """Seed by seed, at the rates that ``results`` of the tuning choose; cells not tuned through are left out."""
        runs = []
        for seed in (*self.seeds, *MORE_SEEDS):
            for c, b, s in self.cells():
                chosen = choose(self, c, b, s, results)
                if chosen is not None and seed in self.seeds_of(c.name, b, s):
                    runs.append(self.run(c, b, s, chosen, seed))
        return runs

    def seeds_of(self, contender: str, batch_size: int, schedule: str) -> tuple[int, ...]:
        """The seeds that report on a cell."""
        more = contender in RIVALS and (batch_size, schedule) in self.close
        return (*self.seeds, *MORE_SEEDS) if more else self.seeds

    def at_one_rate(self, results: Results) -> list[Run]:
        """Of the reporting seeds, at each untuned contender's one rate for all batch sizes, where it is not chosen."""
        runs = []
        for seed in self.seeds:
            for c, b, s in self.cells():
                rate = one_rate(self, c, s, results) if c.name in self.untuned else None
                if rate is not None and choose(self, c, b, s, results) not in (None, rate):
                    runs.append(self.run(c, b, s, rate, seed))
        return runs

    def everything(self) -> list[Run]:
        """Every cell at every rate and every seed, needed or not."""
        return [
            self.run(c, b, s, rate, seed)
            for c, b, s in self.cells()
            for rate in c.rates
            for seed in (TUNING_SEED, *self.seeds_of(c.name, b, s))
        ]

    def only(
        self,
        contenders: Sequence[str] | None,
        batch_sizes: Sequence[int] | None,
        schedules: Sequence[str] | None = None,
    ) -> Scope:
        """A part of it."""
        return replace(
            self,
            contenders=tuple(n for n in self.contenders if contenders is None or n in contenders),
            samples={b: n for b, n in self.samples.items() if batch_sizes is None or b in batch_sizes},
            schedules=tuple(schedules or self.schedules),
        )


def impossible(contender: Contender, batch_size: int) -> bool:
    """Batch normalization has nothing to normalize in a batch of one."""
    return contender.norm == "bn" and batch_size == 1


def choose(scope: Scope, c: Contender, batch_size: int, schedule: str, results: Results) -> float | None:
    """The rate with the best accuracy on the tuning seed, the lowest of equals; None if any rate is missing."""
    found = [results.get(scope.run(c, batch_size, schedule, rate, TUNING_SEED)) for rate in c.rates]
    if any(r is None for r in found):
        return None
    return max(zip(c.rates, found, strict=True), key=lambda pair: (pair[1]["accuracy"], -pair[0]))[0]


def one_rate(scope: Scope, c: Contender, schedule: str, results: Results) -> float | None:
    """The rate that is best on average over the batch sizes, on the tuning seed; None with less than two of them."""
    grids = []
    for size in scope.samples:
        runs = [scope.run(c, size, schedule, rate, TUNING_SEED) for rate in c.rates]
        if all(run in results for run in runs):
            grids.append([results[run]["accuracy"] for run in runs])
    if len(grids) < 2:
        return None
    return max(zip(c.rates, zip(*grids, strict=True), strict=True), key=lambda pair: fmean(pair[1]))[0]


@dataclass(frozen=True)
class Preset:
    """Scopes under a name; results of presets share the cache where they share runs."""

    name: str
    scopes: tuple[Scope, ...]
    note: str = ""


SHORT = {
    "fashion": {1: 5_000, 4: 8_000, 16: 12_800, 64: 32_000, 256: 51_200},
    "mnist": {1: 5_000, 16: 12_800, 64: 32_000},
    "resnet": {1: 2_000, 16: 6_400, 64: 6_400},
    "cifar": {1: 2_000, 4: 4_000, 16: 6_400, 64: 8_192, 256: 12_800},
    "sequential": {1: 3_000, 16: 12_800, 64: 25_600},
}
QUICK = {1: 1_300, 16: 2_600}  # of the digits
_SLOW = (*((batch_size, "constant") for batch_size in (64, 16, 256, 4, 1)), (16, "linear"))
_MAIN = tuple(name for name in PEERS if name != "Shampoo")
_LEAN = tuple(name for name in _MAIN if name not in ("LN + SGD", "ON + SGD", "ON + AdamW", "K-FAC"))
_WRAPPED = tuple(name for name in _MAIN if CONTENDERS[name].bnp is not None and "," not in name)
_QUICK_FOLDED = tuple(name for name in FOLDED if not CONTENDERS[name].slow)
_HE = tuple(name for name, c in CONTENDERS.items() if c.variant == "He")
_CORE = tuple(n for n in _MAIN if PEERS[n].norm in ("none", "bn") and not PEERS[n].slow and "," not in n)
# singd's K-FAC trains Linear and Conv2d, and would leave an LSTM as it is, as fold_normalization would
_RECURRENT = tuple(name for name in PEERS if CONTENDERS[name].norm in ("none", "ln") and name != "K-FAC")
_CLIPPED = tuple(name for name in CONTENDERS if name.endswith("clipped"))
_FLOORS = tuple(name for name in CONTENDERS if ", ε1 = " in name)
_EVERY = (*PEERS, *FOLDED, *_HE)
_FULL = {
    "sequential": _RECURRENT,
    "cifar": (*_EVERY, *_CLIPPED),
    "resnet": _EVERY,
    "fashion": (*PEERS, *_QUICK_FOLDED, *_CLIPPED, *_FLOORS),
    "mnist": (*PEERS, "BNP-momentum, folded, clipped", *_FLOORS),
}
PRESETS = {
    p.name: p
    for p in (
        Preset(
            "full",
            tuple(
                Scope(task.name, task.samples, _FULL.get(task.name, tuple(PEERS)), untuned=_WRAPPED)
                for task in TASKS.values()
            ),
        ),
        Preset(
            "short",
            (
                Scope(
                    "fashion", SHORT["fashion"], (*_MAIN, OWN_Q, *_QUICK_FOLDED), slow=_SLOW,
                    untuned=_WRAPPED,
                    close=((16, "constant"), (4, "constant"), (16, "linear")),
                ),
                Scope("cifar", SHORT["cifar"], (*_LEAN, OWN_Q, *FOLDED, *_HE), untuned=_WRAPPED),
                Scope("resnet", SHORT["resnet"], _CORE + _QUICK_FOLDED),
                Scope("mnist", SHORT["mnist"], _LEAN, slow=_SLOW),
                Scope(
                    "sequential", SHORT["sequential"], _RECURRENT, seeds=(1, 2, 3),
                    slow=((16, "constant"),),
                ),
            ),
            "fewer tasks, samples and seeds",
        ),
        Preset(
            "quick",
            (
                Scope(
                    "digits", QUICK, schedules=("constant",), seeds=(1, 2, 3),
                    slow=((16, "constant"),),
                ),
            ),
            "one small task in minutes",
        ),
    )
}  # fmt: skip
