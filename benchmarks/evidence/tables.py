"""The arithmetic of the convergence tables: what was chosen, how good it is, and how much BNP lifts its base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from benchmarks.evidence.contenders import CONTENDERS, Contender
from benchmarks.evidence.plan import TUNING_SEED, Results, Scope, choose, one_rate
from benchmarks.report import dot, mean_and_error


@dataclass(frozen=True)
class Cell:
    """A contender at a batch size under a schedule.

    Args:
        rate: That the tuning seed chose.
        tuning: Accuracy there, of the tuning seed.
        accuracies: By reporting seed.
        grid: Accuracy by rate, of the tuning seed.
        elsewhere: Accuracies at other rates, by rate and reporting seed.
    """

    contender: str
    batch_size: int
    schedule: str
    rate: float
    tuning: float
    accuracies: dict[int, float]
    grid: dict[float, float]
    elsewhere: Mapping[float, Mapping[int, float]] = field(default_factory=dict)

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond the grid might do better."""
        return self.rate in (min(self.grid), max(self.grid))

    @property
    def mean(self) -> float:
        """Of the reporting seeds; of the tuning seed where there are none."""
        return fmean(self.accuracies.values()) if self.accuracies else self.tuning


def cell_text(cell: Cell, seeds: Collection[int], *, best: float) -> str:
    """The cell as tables show it: bold if it is the ``best``, and how many of the reporting ``seeds`` are missing."""
    mean, error = mean_and_error(list(cell.accuracies.values()) or [cell.tuning])
    found = f"**{dot(mean)}**" if cell.mean == best else dot(mean)
    if len(cell.accuracies) > 1:
        found += f" ± {dot(error)}"
    if set(cell.accuracies) != set(seeds):
        found += f", {len(cell.accuracies) or 'only the tuning'} seed{'s' * (len(cell.accuracies) > 1)}"
    return f"{found} ({cell.rate:g}{'*' if cell.at_edge else ''})"


def cells_of(scope: Scope, results: Results) -> dict[tuple[str, int, str], Cell]:
    """Every cell whose grid is complete."""
    found = {}
    for c, batch_size, schedule in scope.cells():
        rate = choose(scope, c, batch_size, schedule, results)
        if rate is None:
            continue

        def accuracy(
            at: float, seed: int, c: Contender = c, batch_size: int = batch_size, schedule: str = schedule
        ) -> float | None:
            result = results.get(scope.run(c, batch_size, schedule, at, seed))
            return None if result is None else float(result["accuracy"])

        grid = {r: a for r in c.rates if (a := accuracy(r, TUNING_SEED)) is not None}
        seeds = scope.seeds_of(c.name, batch_size, schedule)
        reported = {r: {s: a for s in seeds if (a := accuracy(r, s)) is not None} for r in c.rates}
        chosen = reported.pop(rate)
        found[c.name, batch_size, schedule] = Cell(
            c.name, batch_size, schedule, rate, grid[rate], chosen, grid, reported
        )
    return found


@dataclass(frozen=True)
class Lift:
    """BNP around a base minus the base.

    Args:
        at_best: Mean and standard error over the reporting seeds that both have, each at its chosen rate.
        seeds: How many those are.
        over_grid: Mean over the rates of the grid, on the tuning seed.
    """

    contender: str
    base: str
    batch_size: int
    schedule: str
    at_best: tuple[float, float]
    seeds: int
    over_grid: float


def lifts(cells: dict[tuple[str, int, str], Cell]) -> Iterator[Lift]:
    """Every BNP cell whose base was measured too."""
    plain = {(c.base, c.norm, c.variant): c.name for c in CONTENDERS.values() if c.bnp is None}
    for (name, batch_size, schedule), cell in cells.items():
        c = CONTENDERS[name]
        own = c.base.removesuffix(", no decay")
        base = cells.get((plain[own, "none", c.variant], batch_size, schedule)) if c.bnp is not None else None
        if base is None:
            continue
        shared = sorted(set(cell.accuracies) & set(base.accuracies))
        differences = [cell.accuracies[s] - base.accuracies[s] for s in shared] or [cell.tuning - base.tuning]
        over_grid = fmean(cell.grid.values()) - fmean(base.grid.values())
        yield Lift(name, base.contender, batch_size, schedule, mean_and_error(differences), len(shared), over_grid)


@dataclass(frozen=True)
class OneRate:
    """The single rate of a contender for all batch sizes.

    Args:
        rate: With the best mean accuracy over the batch sizes, on the tuning seed.
        losses: By batch size: accuracy at the best rate there minus accuracy at ``rate``, on the tuning seed.
        reported: The same, mean and standard error over the reporting seeds, where there are two at both rates.
    """

    contender: str
    schedule: str
    rate: float
    losses: dict[int, float]
    reported: dict[int, tuple[float, float]]


def one_rates(scope: Scope, results: Results, cells: dict[tuple[str, int, str], Cell]) -> Iterator[OneRate]:
    """For contenders that have at least two batch sizes."""
    for name, schedule in dict.fromkeys((n, s) for n, _, s in cells):
        own = {b: cell for (n, b, s), cell in cells.items() if (n, s) == (name, schedule)}
        rate = one_rate(scope, CONTENDERS[name], schedule, results)
        if rate is None:
            continue
        losses = {b: cell.tuning - cell.grid[rate] for b, cell in own.items()}
        reported = {}
        for b, cell in own.items():
            there = cell.elsewhere.get(rate, {})
            if len(seeds := sorted(set(cell.accuracies) & set(there))) > 1:
                reported[b] = mean_and_error([cell.accuracies[seed] - there[seed] for seed in seeds])
        yield OneRate(name, schedule, rate, losses, reported)
