"""The tables of an ablation, from the runs that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.documents import compact, environment
from benchmarks.evidence.engine import Run
from benchmarks.evidence.questions import Question
from benchmarks.evidence.runner import Cache
from benchmarks.evidence.tasks import TASKS
from benchmarks.report import dot, made_with

Grid = dict[float, float]  # accuracy, mean over the seeds, by rate


def write(question: Question, preset: str, seeds: tuple[int, ...], cache: Cache, output: Path) -> str:
    """Write JSON and Markdown; returns the Markdown."""
    results = cache.found(question.runs(preset, seeds))
    names = {contender: name for name, contender in question.contenders.items()}
    document = {
        "benchmark": "ablations",
        "configuration": {"question": question.title, "preset": preset, "seeds": list(seeds)},
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "runs": [
            {"key": run.key, **run.describe(), "method": names[run.contender], "result": r}
            for run, r in results.items()
        ],
    }
    text = markdown(question, preset, seeds, results, document)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"ablation_{question.name}.json").write_text(compact(document) + "\n")
    (output / f"ablation_{question.name}.md").write_text(text)
    return text


def grids_of(
    question: Question, preset: str, seeds: tuple[int, ...], results: Mapping[Run, Mapping[str, Any]]
) -> dict[tuple[str, str, int], Grid]:
    """Per (task, contender, batch size) the whole grid; cells with a rate or a seed missing are left out."""
    found: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    names = {contender: name for name, contender in question.contenders.items()}
    for run in question.runs(preset, seeds):
        cell = found.setdefault((run.task, names[run.contender], run.batch_size), {})
        if run in results:
            cell.setdefault(run.learning_rate, []).append(results[run]["accuracy"])
    return {
        key: {rate: fmean(values) for rate, values in cell.items()}
        for key, cell in found.items()
        if len(cell) == len(question.contenders[key[1]].rates) and all(len(v) == len(seeds) for v in cell.values())
    }


def markdown(
    question: Question,
    preset: str,
    seeds: tuple[int, ...],
    results: Mapping[Run, Mapping[str, Any]],
    document: Mapping[str, Any],
) -> str:
    """Per task: the best rate of each batch size with its accuracy and the mean over the grid; and one rate for all."""
    grids = grids_of(question, preset, seeds, results)
    lines = [f"# {question.title}", ""]
    for task in question.samples:
        own = {(name, b): grid for (t, name, b), grid in grids.items() if t == task}
        if not own:
            continue
        samples = {run.batch_size: run.samples for run in question.runs(preset, seeds) if run.task == task}
        lines += [
            f"## {TASKS[task].title}",
            "",
            "One pass at a constant rate over "
            + ", ".join(f"{n:,} samples at batch size {b}" for b, n in sorted(samples.items()))
            + f"; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}.",
            "",
            *_summary(own),
            "",
            *_whole(own),
            "",
        ]
    return "\n".join([*lines, made_with(document["environment"], document["cpu_seconds"]), ""])


def _summary(grids: Mapping[tuple[str, int], Grid]) -> Iterable[str]:
    batch_sizes = sorted({b for _, b in grids})
    yield "| | " + " | ".join(f"{b}: best (rate), grid" for b in batch_sizes) + " | one rate | lost by it |"
    yield "| --- |" + " --- |" * (len(batch_sizes) + 2)
    for name in dict.fromkeys(name for name, _ in grids):
        own = {b: grids[name, b] for b in batch_sizes if (name, b) in grids}
        texts = []
        for b in batch_sizes:
            grid = own.get(b)
            if grid is None:
                texts.append("not run")
                continue
            best = max(grid, key=lambda rate: (grid[rate], -rate))
            edge = "*" if best in (min(grid), max(grid)) else ""
            texts.append(f"{dot(grid[best])} ({best:g}{edge}), {dot(fmean(grid.values()))}")
        if len(own) == len(batch_sizes):
            rates = next(iter(own.values()))
            one = max(rates, key=lambda rate: fmean(grid[rate] for grid in own.values()))
            lost = "/".join(dot(max(grid.values()) - grid[one]) for grid in own.values())
            texts += [f"{one:g}", lost]
        else:
            texts += ["", ""]
        yield f"| {name} | " + " | ".join(texts) + " |"
    yield ""
    yield "*: at the edge of the grid. grid: mean over all rates. One rate: the best on average over the batch sizes; "
    yield "lost: accuracy at each batch size's best rate minus accuracy at the one rate."


def _whole(grids: Mapping[tuple[str, int], Grid]) -> Iterable[str]:
    for rates in dict.fromkeys(tuple(grid) for grid in grids.values()):
        yield "| | batch | " + " | ".join(f"{r:g}" for r in rates) + " |"
        yield "| --- | --- |" + " --- |" * len(rates)
        for (name, b), grid in sorted(grids.items(), key=lambda item: item[0][1]):
            if tuple(grid) == rates:
                yield f"| {name} | {b} | " + " | ".join(dot(a) for a in grid.values()) + " |"
        yield ""
