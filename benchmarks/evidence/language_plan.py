"""Which runs of the character GPT: every rate on the tuning seed, then the reporting seeds at the rates it chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence.contenders import CONTENDERS, OWN_Q, Contender
from benchmarks.evidence.corpus import standard_library
from benchmarks.evidence.language_engine import LanguageRun, Net
from benchmarks.evidence.plan import TUNING_SEED
from benchmarks.evidence.tables import Cell

METHODS = (
    "momentum", "BNP-momentum, gradient form", "BNP-momentum", "AdamW", "BNP-AdamW", "Muon", "BNP-Muon",
    OWN_Q, "BNP-Muon, no bound", "SOAP",
)  # fmt: skip
SCHEDULE = "warm-up + decay"
Results = Mapping[LanguageRun, Mapping[str, Any]]


@dataclass(frozen=True)
class LanguageScope:
    """What of a net is measured.

    Args:
        steps: By batch size.
        seeds: The reporting seeds.
        slow_seeds: Those of SOAP.
        suffix: Of the files, where the protocol is trimmed.
    """

    net: Net
    steps: Mapping[int, int]
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    slow_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    suffix: str = ""

    @property
    def stem(self) -> str:
        return f"language_{self.net.name}{self.suffix}"

    def run(self, contender: Contender, batch_size: int, rate: float, seed: int) -> LanguageRun:
        digest = standard_library().digest
        return LanguageRun(self.net, contender, rate, batch_size, self.steps[batch_size], seed, digest)

    def cells(self) -> Iterator[tuple[Contender, int]]:
        """(contender, batch size), the quick contenders of a batch size first."""
        for batch_size in self.steps:
            for c in sorted((CONTENDERS[n] for n in self.methods), key=lambda c: c.slow):
                yield c, batch_size

    def seeds_of(self, contender: Contender) -> tuple[int, ...]:
        return self.slow_seeds if contender.slow else self.seeds

    def tuning(self) -> list[LanguageRun]:
        """Every cell at every rate."""
        return [self.run(c, b, rate, TUNING_SEED) for c, b in self.cells() for rate in c.rates]

    def reporting(self, results: Results) -> list[LanguageRun]:
        """Seed by seed, at the rates that ``results`` of the tuning choose; cells not tuned through are left out."""
        chosen = {(c, b): choose(self, c, b, results) for c, b in self.cells()}
        return [
            self.run(c, b, rate, seed)
            for seed in self.seeds
            for (c, b), rate in chosen.items()
            if rate is not None and seed in self.seeds_of(c)
        ]

    def only(self, methods: Sequence[str] | None, batch_sizes: Sequence[int] | None) -> LanguageScope:
        """A part of it."""
        return replace(
            self,
            methods=tuple(n for n in self.methods if methods is None or n in methods),
            steps={b: n for b, n in self.steps.items() if batch_sizes is None or b in batch_sizes},
        )


def choose(scope: LanguageScope, c: Contender, batch_size: int, results: Results) -> float | None:
    """The rate with the least loss on the tuning seed, the lowest of equals; None if any rate is missing."""
    found = [results.get(scope.run(c, batch_size, rate, TUNING_SEED)) for rate in c.rates]
    if any(r is None for r in found):
        return None
    return min(zip(c.rates, found, strict=True), key=lambda pair: (pair[1]["loss"], pair[0]))[0]


def cells_of(scope: LanguageScope, results: Results) -> dict[tuple[str, int, str], Cell]:
    """Every cell whose grid is complete; what a Cell calls accuracy is a loss here, and less is better."""
    found = {}
    for c, b in scope.cells():
        rate = choose(scope, c, b, results)
        if rate is None:
            continue
        grid = {r: float(results[scope.run(c, b, r, TUNING_SEED)]["loss"]) for r in c.rates}
        runs = {seed: results.get(scope.run(c, b, rate, seed)) for seed in scope.seeds_of(c)}
        reported = {seed: float(r["loss"]) for seed, r in runs.items() if r is not None}
        found[c.name, b, SCHEDULE] = Cell(c.name, b, SCHEDULE, rate, grid[rate], reported, grid)
    return found


SMALL, LARGE = Net(3, 96, 64), Net(6, 256, 128)
FULL = {16: 2_000, 1: 8_000}
PRESETS = {
    "full": (LanguageScope(SMALL, FULL), LanguageScope(LARGE, FULL)),
    "short": (
        LanguageScope(SMALL, {16: 300, 1: 500}, suffix="_short"),
        LanguageScope(LARGE, {1: 300}, ("AdamW", "BNP-AdamW", "Muon", "BNP-Muon"), seeds=(1, 2, 3), suffix="_short"),
    ),
    "quick": (LanguageScope(Net(2, 64, 32), {16: 100, 1: 200}, seeds=(1,), slow_seeds=(1,), suffix="_quick"),),
}
