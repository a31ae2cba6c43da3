"""The tables of the character GPT, from the runs that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.documents import compact, environment
from benchmarks.evidence.contenders import ADAPTIVE_RATES, CONTENDERS, SGD_RATES
from benchmarks.evidence.corpus import ALPHABET, standard_library
from benchmarks.evidence.language_engine import CURVE_EVERY, UNIFORM, WARM_UP, WINDOWS
from benchmarks.evidence.language_figure import language_figure
from benchmarks.evidence.language_plan import FULL, SCHEDULE, LanguageScope, Results, cells_of
from benchmarks.evidence.language_times import mean_curve, steps_to, times_path
from benchmarks.evidence.runner import Cache
from benchmarks.evidence.tables import Cell, cell_text, lifts
from benchmarks.evidence.times import load_times
from benchmarks.report import dot, made_with, mean_and_error

Cells = dict[tuple[str, int, str], Cell]
Times = Mapping[int, Mapping[str, float]]
NOTES = (
    "momentum: SGD with momentum 0.9. Muon: on the matrices of the blocks, at 10 × the rate of the AdamW on all else "
    "(embeddings, head, biases, norms). SOAP: pytorch_optimizer's, every 10 steps, its default. Weight decay: each "
    "base's own default, none with Muon. BNP: all its defaults."
)


def write(scope: LanguageScope, preset: str, cache: Cache, output: Path) -> str:
    """Write JSON, Markdown and PNG of ``scope``; returns the Markdown."""
    results = cache.found(scope.tuning())
    results |= cache.found(scope.reporting(results))
    if not results:
        return f"{scope.stem}: nothing yet"
    corpus = standard_library()
    document = {
        "benchmark": "language",
        "configuration": {
            "preset": preset,
            "net": {"layers": scope.net.layers, "width": scope.net.width, "context": scope.net.context},
            "steps_by_batch_size": dict(scope.steps),
            "full_protocol": FULL,
            "schedule": {"name": SCHEDULE, "warm_up": WARM_UP},
            "seeds": {"tuning": 0, "reporting": list(scope.seeds), "SOAP": list(scope.slow_seeds)},
            "text": {
                "digest": corpus.digest,
                "train": len(corpus.train),
                "validation": len(corpus.validation),
                "alphabet": len(ALPHABET),
            },
        },
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "runs": [{"key": run.key, **run.describe(), "result": r} for run, r in results.items()],
    }
    cells, times = cells_of(scope, results), load_times(times_path(scope, output))
    curves = curves_of(scope, cells, results)
    text = markdown(scope, cells, curves, times, document)
    (output / f"{scope.stem}.json").write_text(compact(document) + "\n")
    (output / f"{scope.stem}.md").write_text(text)
    language_figure(scope, cells, curves, times, output / f"{scope.stem}.png")
    return text


def curves_of(scope: LanguageScope, cells: Cells, results: Results) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """The mean curve of the reporting seeds at the chosen rate; the tuning seed's where there are none."""
    found = {}
    for (name, b, _), cell in cells.items():
        runs = [scope.run(CONTENDERS[name], b, cell.rate, seed) for seed in list(cell.accuracies) or [0]]
        found[name, b] = mean_curve([results[run]["curve"] for run in runs])
    return found


def markdown(
    scope: LanguageScope,
    cells: Cells,
    curves: Mapping[tuple[str, int], list[tuple[int, float]]],
    times: Times,
    document: Mapping[str, Any],
) -> str:
    """The tables, with how they were had."""
    text, found = document["configuration"]["text"], document["environment"]
    trimmed = ", ".join(f"{FULL[b]:,} at {b}" for b, n in scope.steps.items() if n != FULL[b])
    lines = [
        f"# Character GPT, {scope.net.layers}×{scope.net.width}, context {scope.net.context}",
        "",
        f"Text: the source of the standard library of Python {found['python']}, {text['train']:,} characters to train "
        f"on and {text['validation']:,} of other files to validate on, {text['alphabet']} different ones, digest "
        f"{text['digest']}. "
        + "Steps, by batch size: " + ", ".join(f"{n:,} at {b}" for b, n in scope.steps.items()) + ". "
        + (f"**Trimmed**: the full protocol has {trimmed}. " if trimmed else "")
        + f"Linear warm-up over {WARM_UP:.0%} of the steps, then linear decay to zero. Every method has the same grid "
        + "of its kind on seed 0; the first table shows the reporting seeds "
        + f"({', '.join(map(str, scope.seeds))}) at the rate chosen there. Validation loss in nats per character on "
        + f"{WINDOWS} fixed windows (curves: on every {CURVE_EVERY}th of them), mean ± standard error. A uniform guess "
        + f"has ln {text['alphabet']} = {UNIFORM:.3f}: that is what a diverged run scores, and no run scores worse.",
        "",
        *_losses(scope, cells), "",
        "What wrapping changes, paired by seed (below zero: better with BNP):", "", *_differences(cells), "",
        "Targets:", "", *_targets(cells), "",
        *_seconds(scope, curves, times),
        f"All rates, seed 0 ({UNIFORM:.3f}: diverged, or no better than a guess):", "",
        *_grids(scope, cells, SGD_RATES), "", *_grids(scope, cells, ADAPTIVE_RATES), "",
        NOTES, "",
        made_with(found, document["cpu_seconds"]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _header(first: str, columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [f"| {first} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]


def _losses(scope: LanguageScope, cells: Cells) -> Iterable[str]:
    batch_sizes = list(scope.steps)
    yield from _header("method", (f"batch {b}" for b in batch_sizes))
    best = {b: min((c.mean for (_, size, _), c in cells.items() if size == b), default=0.0) for b in batch_sizes}

    def text(name: str, b: int) -> str:
        cell = cells.get((name, b, SCHEDULE))
        if cell is None:
            return "not run"
        return cell_text(cell, scope.seeds, best=best[b])

    def rank(name: str) -> float:
        return fmean(c.mean for (n, _, _), c in cells.items() if n == name)

    for name in sorted({name for name, _, _ in cells}, key=rank):
        yield f"| {name} | " + " | ".join(text(name, b) for b in batch_sizes) + " |"
    yield ""
    yield "In brackets the rate; *: at the edge of the grid. Sorted by the mean over the batch sizes that were run."


def _difference(pair: tuple[float, float], seeds: int) -> str:
    return dot(pair[0], 3, "+") + ({0: " (tuning seed)", 1: " (one seed)"}.get(seeds) or f" ± {dot(pair[1])}")


def _differences(cells: Cells) -> Iterable[str]:
    found = list(lifts(cells))
    batch_sizes = list(dict.fromkeys(x.batch_size for x in found))
    yield from _header("", (f"batch {b}: best rate; grid" for b in batch_sizes))
    for name, base in dict.fromkeys((x.contender, x.base) for x in found):
        own = {x.batch_size: x for x in found if x.contender == name}
        texts = [
            f"{_difference(own[b].at_best, own[b].seeds)}; {dot(own[b].over_grid, 3, '+')}" if b in own else "–"
            for b in batch_sizes
        ]
        yield f"| {name} − {base} | " + " | ".join(texts) + " |"
    yield ""
    yield "Grid: mean over all rates, seed 0."


def _targets(cells: Cells) -> Iterable[str]:
    """Those that were set before the first run."""
    yield from _header("target", ("batch", "verdict", "number"))

    def line(what: str, b: int, value: float, number: str, error: float = 0.0) -> str:
        verdict = ("**met**" if value < 0 else "**missed**") + ", within two errors" * (abs(value) <= 2 * error)
        return f"| {what} | {b} | {verdict} | {number} |"

    for x in lifts(cells):
        if x.contender in ("BNP-AdamW", "BNP-Muon"):
            found = _difference(x.at_best, x.seeds)
            yield line(f"{x.contender} below {x.base}, best rates", x.batch_size, x.at_best[0], found, x.at_best[1])
        if x.contender == "BNP-AdamW":
            what = f"{x.contender} below {x.base}, mean over the grid"
            yield line(what, x.batch_size, x.over_grid, dot(x.over_grid, 3, "+"))
    for b in dict.fromkeys(b for _, b, _ in cells):
        ours, theirs = cells.get(("BNP-Muon", b, SCHEDULE)), cells.get(("SOAP", b, SCHEDULE))
        shared = sorted(set(ours.accuracies) & set(theirs.accuracies)) if ours and theirs else []
        if ours and theirs and shared:
            pair = mean_and_error([ours.accuracies[s] - theirs.accuracies[s] for s in shared])
            seeds = f", seeds {', '.join(map(str, shared))}"
            yield f"| (no target) BNP-Muon − SOAP | {b} | | {_difference(pair, len(shared))}{seeds} |"


def _seconds(
    scope: LanguageScope, curves: Mapping[tuple[str, int], list[tuple[int, float]]], times: Times
) -> Iterable[str]:
    """CPU seconds to the loss AdamW ends with: steps from the curves × the measured step."""
    batch_sizes = [b for b in scope.steps if b in times and ("AdamW", b) in curves]
    if not batch_sizes:
        return
    targets = {b: curves["AdamW", b][-1][1] for b in batch_sizes}
    yield "CPU seconds to the loss AdamW ends with: steps until the mean curve of the reporting seeds, at the rate"
    yield "chosen for its end, is there for good × the median of a step, measured in turn with all others; in brackets"
    yield "steps and milliseconds per step. Rates are still decaying there: a shorter run would be there sooner.\n"
    yield from _header("method", (f"batch {b}: to {dot(targets[b])}" for b in batch_sizes))
    for name in scope.methods:
        texts = []
        for b in batch_sizes:
            ms = times[b].get(name)
            if ms is None or (name, b) not in curves:
                texts.append("not run")
                continue
            steps = steps_to([curves[name, b]], targets[b])
            cost = f"{ms:.1f} ms"
            texts.append(f"not reached ({cost})" if steps is None else f"{steps * ms / 1e3:.1f} ({steps:,.0f}, {cost})")
        yield f"| {name} | " + " | ".join(texts) + " |"
    yield ""


def _grids(scope: LanguageScope, cells: Cells, rates: tuple[float, ...]) -> Iterable[str]:
    yield from _header("method | batch", (f"{r:g}" for r in rates))
    for name in scope.methods:
        for b in scope.steps:
            cell = cells.get((name, b, SCHEDULE))
            if cell is not None and tuple(cell.grid) == rates:
                texts = [f"**{dot(x)}**" if r == cell.rate else dot(x) for r, x in cell.grid.items()]
                yield f"| {name} | {b} | " + " | ".join(texts) + " |"
