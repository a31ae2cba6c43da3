"""The convergence tables and figure of a task, from the runs that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.documents import compact, environment
from benchmarks.evidence.contenders import ADAPTIVE_RATES, CONTENDERS, NOTES, SGD_RATES
from benchmarks.evidence.figures import convergence_figure
from benchmarks.evidence.plan import MORE_SEEDS, RIVALS, Preset, Results, Scope, impossible
from benchmarks.evidence.runner import Cache
from benchmarks.evidence.tables import Cell, Lift, OneRate, cell_text, cells_of, lifts, one_rates
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.times import TARGETS, load_times, samples_to
from benchmarks.report import dot, made_with

Cells = dict[tuple[str, int, str], Cell]


def write(scope: Scope, preset: Preset, cache: Cache, output: Path) -> str:
    """Write JSON, Markdown and PNG of ``scope``; returns the Markdown."""
    results = cache.found(scope.tuning())
    results |= cache.found(scope.reporting(results)) | cache.found(scope.at_one_rate(results))
    if not results:
        return f"{scope.task}: nothing yet"
    cells = cells_of(scope, results)
    document = {
        "benchmark": "convergence",
        "configuration": {
            "preset": preset.name,
            "task": TASKS[scope.task].title,
            "samples_by_batch_size": dict(scope.samples),
            "full_protocol": dict(TASKS[scope.task].samples),
            "seeds": {"tuning": 0, "reporting": list(scope.seeds)},
        },
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "runs": [{"key": run.key, **run.describe(), "result": r} for run, r in results.items()],
    }
    stem = f"convergence_{scope.task}_{preset.name}"
    times = load_times(output / f"convergence_{scope.task}_times.json")
    text = markdown(scope, preset, results, document) + "\n".join(_times(scope, cells, results, times))
    (output / f"{stem}.json").write_text(compact(document) + "\n")
    (output / f"{stem}.md").write_text(text)
    convergence_figure(scope, cells, results, output / f"{stem}.png")
    convergence_figure(scope, cells, results, output / f"{stem}_folded.png", folded=True)
    return text


def markdown(scope: Scope, preset: Preset, results: Results, document: Mapping[str, Any]) -> str:
    """The tables, with how they were had."""
    cells = cells_of(scope, results)
    rates = list(one_rates(scope, results, cells))
    task = TASKS[scope.task]
    close = (
        f"Where they left open which of {', '.join(RIVALS)} is ahead, seeds {MORE_SEEDS[0]} to {MORE_SEEDS[-1]} too."
    )
    full = ", ".join(f"{task.samples[b]:,} at {b}" for b, n in scope.samples.items() if n != task.samples[b])
    lines = [
        f"# Convergence: {task.title}",
        "",
        "Samples seen, by batch size: " + ", ".join(f"{n:,} at {b}" for b, n in scope.samples.items()) + ". "
        + (f"**Trimmed**: the full protocol has {full}. " if full else "")
        + (f"Preset {preset.name}: {preset.note}. " if preset.note else "")
        + "Every method has the same grid of its kind on seed 0; the first table shows the reporting seeds "
        + f"({', '.join(map(str, scope.seeds))}) at the rate chosen there. Test accuracy, mean ± standard error; "
        + f"a run that diverged scores {dot(task.chance, 1)}."
        + (f" {close}" if scope.close else ""),
        "",
    ]  # fmt: skip
    for schedule in scope.schedules:
        title = "Constant rate" if schedule == "constant" else "Linear decay to zero"
        lines += [f"## {title}", "", *_accuracies(scope, cells, schedule), ""]
        lines += ["What wrapping changes, paired by seed:", "", *_lifts(cells, schedule), ""]
        lines += ["One rate for all batch sizes (the best on average, on seed 0), and what it costs there; then the"]
        lines += ["reporting seeds, where they ran at both rates:", ""]
        lines += [*_one_rates(scope, [x for x in rates if x.schedule == schedule]), ""]
        lines += ["All rates, seed 0:", "", *_grids(scope, cells, schedule, SGD_RATES), ""]
        lines += [*_grids(scope, cells, schedule, ADAPTIVE_RATES), ""]
    notes = "; ".join(f"{name}: {text}" for name, text in NOTES.items())
    lines += [f"{notes}.", "", made_with(document["environment"], document["cpu_seconds"]), ""]
    return "\n".join(lines)


def _accuracies(scope: Scope, cells: Cells, schedule: str) -> Iterable[str]:
    batch_sizes = sorted(scope.samples)
    yield "| method | " + " | ".join(f"batch {b}" for b in batch_sizes) + " |"
    yield "| --- |" + " --- |" * len(batch_sizes)
    best = {
        b: max((c.mean for (_, size, s), c in cells.items() if (size, s) == (b, schedule)), default=0.0)
        for b in batch_sizes
    }

    def text(name: str, b: int) -> str:
        cell = cells.get((name, b, schedule))
        if cell is None:
            return "impossible" if impossible(CONTENDERS[name], b) else "not run"
        return cell_text(cell, scope.seeds, best=best[b])

    def rank(name: str) -> float:
        own = [cells[name, b, schedule].mean for b in batch_sizes if (name, b, schedule) in cells]
        return -fmean(own) if own else 1.0

    for name in sorted(scope.contenders, key=rank):
        if any((name, b, schedule) in cells for b in batch_sizes):
            yield f"| {name} | " + " | ".join(text(name, b) for b in batch_sizes) + " |"
    yield ""
    yield "In brackets the rate; *: at the edge of the grid. Sorted by the mean over the batch sizes that were run."


def _lifts(cells: Cells, schedule: str) -> Iterable[str]:
    found = [x for x in lifts(cells) if x.schedule == schedule]
    batch_sizes = sorted({x.batch_size for x in found})
    yield "| | " + " | ".join(f"batch {b}: best rate; grid" for b in batch_sizes) + " |"
    yield "| --- |" + " --- |" * len(batch_sizes)

    def text(x: Lift | None) -> str:
        if x is None:
            return "–"
        error = f" ± {dot(x.at_best[1])}" if x.seeds > 1 else ""
        return f"{dot(x.at_best[0], 3, '+')}{error}; {dot(x.over_grid, 3, '+')}"

    for name, base in dict.fromkeys((x.contender, x.base) for x in found):
        own = {x.batch_size: x for x in found if x.contender == name}
        yield f"| {name} − {base} | " + " | ".join(text(own.get(b)) for b in batch_sizes) + " |"
    yield ""
    yield "Grid: mean over all rates, seed 0."


def _one_rates(scope: Scope, rates: Iterable[OneRate]) -> Iterable[str]:
    batch_sizes = sorted(scope.samples)
    yield "| method | rate | " + " | ".join(f"lost at {b}" for b in batch_sizes) + " |"
    yield "| --- | --- |" + " --- |" * len(batch_sizes)
    for x in sorted(rates, key=lambda x: max(x.losses.values())):
        losses = [dot(x.losses[b]) if b in x.losses else "–" for b in batch_sizes]
        for i, b in enumerate(batch_sizes):
            if b in x.reported:
                losses[i] += f"; {dot(x.reported[b][0], 3, '+')} ± {dot(x.reported[b][1])}"
        yield f"| {x.contender} | {x.rate:g} | " + " | ".join(losses) + " |"


def _grids(scope: Scope, cells: Cells, schedule: str, rates: tuple[float, ...]) -> Iterable[str]:
    yield "| method | batch | " + " | ".join(f"{r:g}" for r in rates) + " |"
    yield "| --- | --- |" + " --- |" * len(rates)
    for name in scope.contenders:
        for b in sorted(scope.samples):
            cell = cells.get((name, b, schedule))
            if cell is not None and tuple(cell.grid) == rates:
                texts = [f"**{dot(a)}**" if r == cell.rate else dot(a) for r, a in cell.grid.items()]
                yield f"| {name} | {b} | " + " | ".join(texts) + " |"


def _times(scope: Scope, cells: Cells, results: Results, times: Mapping[int, Mapping[str, float]]) -> Iterable[str]:
    """CPU seconds to an accuracy, at the chosen constant rate: samples from the curves × the measured step."""
    if not times:
        return
    target, batch_sizes = TARGETS[scope.task], [b for b in sorted(scope.samples) if b in times]
    yield f"\n## Time to {dot(target, 2)}\n"
    yield "Constant rate, chosen by the accuracy at the end (not for speed). CPU seconds = steps until the mean curve"
    yield "of the reporting seeds reaches the accuracy for good × the median of a step, measured in turn with all"
    yield "others; in brackets samples and milliseconds per step.\n"
    yield "| method | " + " | ".join(f"batch {b}" for b in batch_sizes) + " |"
    yield "| --- |" + " --- |" * len(batch_sizes)
    for name in scope.contenders:
        texts = []
        for b in batch_sizes:
            cell, ms = cells.get((name, b, "constant")), times[b].get(name)
            if cell is None or ms is None:
                texts.append("impossible" if impossible(CONTENDERS[name], b) else "not run")
                continue
            seeds = list(cell.accuracies) or [0]
            runs = [scope.run(CONTENDERS[name], b, "constant", cell.rate, seed) for seed in seeds]
            samples = samples_to([results[run]["curve"] for run in runs], target)
            cost = f"{ms:.2f} ms"
            texts.append(
                f"not reached ({cost})" if samples is None else f"{samples / b * ms / 1e3:.2f} ({samples:,.0f}, {cost})"
            )
        if any(t not in ("not run", "impossible") for t in texts):
            yield f"| {name} | " + " | ".join(texts) + " |"
    yield ""
