"""The tables of an ablation, from the runs that are there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.documents import compact, environment
from benchmarks.evidence import confirm, recovery
from benchmarks.evidence.contenders import Contender
from benchmarks.evidence.engine import Run
from benchmarks.evidence.progressive import StreamRun
from benchmarks.evidence.question import Question, StreamQuestion
from benchmarks.evidence.runner import Cache
from benchmarks.evidence.tasks import TASKS
from benchmarks.report import dot, made_with

Grid = dict[float, float]  # accuracy, mean over the seeds, by rate


def write(question: Question | StreamQuestion, preset: str, seeds: tuple[int, ...], cache: Cache, output: Path) -> str:
    """Write JSON and Markdown; returns the Markdown."""
    results: dict[Any, Any] = dict(cache.found(question.runs(preset, seeds)))  # type: ignore[type-var]
    if isinstance(question, Question):
        grids = grids_of(question, preset, seeds, results)
        results |= cache.found(confirm.runs(question, preset, grids))
    names = names_of(question)
    document = {
        "benchmark": "ablations",
        "configuration": {"question": question.title, "preset": preset, "seeds": list(seeds)},
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "runs": [
            {
                "key": run.key,
                **run.describe(),
                "method": names[run.contender, getattr(run, "fold", 0)],
                "result": slim(r),
            }
            for run, r in results.items()
        ],
    }
    tables = markdown if isinstance(question, Question) else stream_markdown
    text = tables(question, preset, seeds, results, document)  # type: ignore[operator]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"ablation_{question.name}.json").write_text(compact(document) + "\n")
    (output / f"ablation_{question.name}.md").write_text(text)
    return text


def slim(result: Mapping[str, Any]) -> dict[str, Any]:
    """Without the course of the error of a stream: thousands of runs are published, and no table here reads it."""
    return {k: v for k, v in result.items() if k != "blocks"}


def names_of(question: Question | StreamQuestion) -> dict[tuple[Contender, int], str]:
    """What tables call a contender and the sample at which it folds."""
    if isinstance(question, Question):
        return {(contender, 0): name for name, contender in question.contenders.items()}
    return {pair: name for name, pair in question.contenders.items()}


def grids_of(
    question: Question, preset: str, seeds: tuple[int, ...], results: Mapping[Run, Mapping[str, Any]]
) -> dict[tuple[str, str, int], Grid]:
    """Per (task, contender, batch size) the whole grid; cells with a rate or a seed missing are left out."""
    found: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    names = names_of(question)
    for run in question.runs(preset, seeds):
        cell = found.setdefault((run.task, names[run.contender, 0], run.batch_size), {})
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
    lines += confirm.table(question, preset, grids, results)
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


def stream_markdown(
    question: StreamQuestion,
    preset: str,
    seeds: tuple[int, ...],
    results: Mapping[StreamRun, Mapping[str, Any]],
    document: Mapping[str, Any],
) -> str:
    """Error by stream at the best rate of each, and at the one rate with the least mean log error over the streams."""
    runs = question.runs(preset, seeds)
    samples = {run.stream: run.samples for run in runs}
    lines = [
        f"# {question.title}",
        "",
        "Progressive error (predict, then learn), MLP 32-32, batch size 1; "
        + ", ".join(f"{name} {n:,} samples" for name, n in samples.items())
        + f"; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. Less is better.",
        "",
    ]
    heads = [f"{stream}, {inputs}" for stream, inputs in question.places]
    for which, title in enumerate(
        (
            "Each stream at its best rate (in brackets; *: at the edge of the grid):",
            "One rate for all of these streams, the one with the least mean log(error):",
        )
    ):
        lines += [title, "", "| | " + ("rate | " if which else "") + " | ".join(heads) + " |"]
        lines += ["| --- |" + " --- |" * (len(heads) + which)]
        for name, (contender, fold) in question.contenders.items():
            grids = [stream_grid(question, place, contender, fold, preset, seeds, results) for place in question.places]
            known = [g for g in grids if g]
            one = one_rate(known) if len(known) == len(grids) else None
            texts = []
            for grid in grids:
                rate = one if which else min(grid, key=lambda r: (grid[r], r), default=None)
                if rate is None:
                    texts.append("not run")
                else:
                    edge = "*" if rate in (contender.rates[0], contender.rates[-1]) else ""
                    texts.append(dot(grid[rate]) + ("" if which else f" ({rate:g}{edge})"))
            lines.append(f"| {name} | " + (f"{one or 0:g} | " if which else "") + " | ".join(texts) + " |")
        lines.append("")
    lines += recovery.table(question, seeds, results)
    return "\n".join([*lines, made_with(document["environment"], document["cpu_seconds"]), ""])


def stream_grid(
    question: StreamQuestion,
    place: tuple[str, str],
    contender: Contender,
    fold: int,
    preset: str,
    seeds: tuple[int, ...],
    results: Mapping[StreamRun, Mapping[str, Any]],
) -> Grid:
    """Error by rate, mean over the seeds; empty if anything is missing."""
    found: dict[float, list[float]] = {}
    for run in question.runs(preset, seeds):
        if (run.stream, run.inputs) == place and (run.contender, run.fold) == (contender, fold):
            if run not in results:
                return {}
            found.setdefault(run.learning_rate, []).append(results[run]["error"])
    return {rate: fmean(errors) for rate, errors in found.items()}


def one_rate(grids: Sequence[Grid]) -> float:
    """The rate with the least mean log(error); an error of 0 counts as .001."""
    return min(grids[0], key=lambda rate: fmean(math.log(grid[rate] + 1e-3) for grid in grids))
