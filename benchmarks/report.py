"""From runs to the summary and its Markdown."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = dict[str, Any]
_ORDER = ("SGD", "AdamW", "BNP-SGD", "BNP-AdamW")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def by_cell(results: Sequence[Result]) -> dict[tuple[int, str, float], dict[int, Result]]:
    """The runs of each (batch size, method, rate), by seed."""
    found: dict[tuple[int, str, float], dict[int, Result]] = defaultdict(dict)
    for r in results:
        found[r["batch_size"], r["method"], r["learning_rate"]][r["seed"]] = r
    return found


def cells_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Per cell (method, rate, batch size) mean ± standard error."""
    cells = []
    for (batch_size, method, rate), runs in by_cell(results).items():
        mean, error = mean_and_error([r["accuracy"] for r in runs.values()])
        cells.append(
            {
                "batch_size": batch_size,
                "method": method,
                "learning_rate": rate,
                "mean": mean,
                "standard_error": error,
                "diverged": sum(r["diverged"] for r in runs.values()),
            }
        )
    return sorted(cells, key=lambda c: (-c["batch_size"], _ORDER.index(c["method"]), c["learning_rate"]))


def summarize(results: Sequence[Result], targets: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Every cell; per BNP cell the paired gain over its base.

    The base runs at its own best rate, by mean test accuracy: in the base's favour, as BNP has one rate.
    """
    cells, runs = cells_of(results), by_cell(results)
    comparisons = []
    for cell in cells:
        method, batch_size = cell["method"], cell["batch_size"]
        if not method.startswith("BNP-"):
            continue
        base = best_cell(cells, method.removeprefix("BNP-"), batch_size)
        ours = runs[batch_size, method, cell["learning_rate"]]
        theirs = runs[batch_size, base["method"], base["learning_rate"]]
        difference, error = mean_and_error([ours[s]["accuracy"] - theirs[s]["accuracy"] for s in sorted(ours)])
        target = targets[method][batch_size]
        comparisons.append(
            {
                "batch_size": batch_size,
                "method": method,
                "mean": cell["mean"],
                "base": base["method"],
                "base_learning_rate": base["learning_rate"],
                "base_mean": base["mean"],
                "base_at_edge": base["learning_rate"] in edges(cells, base["method"]),
                "difference": difference,
                "standard_error": error,
                "beyond_two_errors": abs(difference) > 2 * error,
                "target": target,
                "above_target": cell["mean"] - target,
            }
        )
    return {"cells": cells, "comparisons": comparisons}


def best_cell(cells: Sequence[dict[str, Any]], method: str, batch_size: int) -> dict[str, Any]:
    """The cell of ``method`` at ``batch_size`` whose rate has the best mean."""
    return max((c for c in cells if c["method"] == method and c["batch_size"] == batch_size), key=lambda c: c["mean"])


def edges(cells: Sequence[dict[str, Any]], method: str) -> tuple[float, float]:
    """The lowest and the highest rate of ``method``: beyond them it might do better than at its best."""
    rates = [c["learning_rate"] for c in cells if c["method"] == method]
    return min(rates), max(rates)


def markdown(document: Mapping[str, Any]) -> str:
    """The tables, with how they were had."""
    configuration, environment = document["configuration"], document["environment"]
    cells, comparisons = document["summary"]["cells"], document["summary"]["comparisons"]
    batch_sizes = sorted({c["batch_size"] for c in cells}, reverse=True)
    seeds = configuration["seeds"]
    samples = configuration["samples_by_batch_size"]
    lines = [
        "# Convergence: MNIST, five seeds",
        "",
        f"{configuration['data']}; {configuration['model']}; one pass at a constant learning rate ("
        + ", ".join(f"{samples[b]:,} samples at batch size {b}" for b in batch_sizes)
        + f"); seeds {seeds[0]}–{seeds[-1]}. Test accuracy, mean ± standard error; a diverged run scores .1.",
        "",
        *rates_table(cells, len(seeds), bold=lambda method: not method.startswith("BNP-")),
        "",
        "Bold: the plain base's best rate at that batch size, chosen on these very runs (which favours it).",
        "BNP runs at one rate everywhere, with all its defaults. Differences are paired by seed:",
        "",
        "| method | batch | accuracy | base at its best rate | difference | > 2 s.e. | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        _comparison_row(c) for c in sorted(comparisons, key=lambda c: (_ORDER.index(c["method"]), -c["batch_size"]))
    ]
    lines += [
        "",
        "*: at the edge of the base's grid; beyond it the base might do better.",
        "",
        made_with(environment, document["cpu_seconds"]),
        "",
    ]
    return "\n".join(lines)


def rates_table(cells: Sequence[dict[str, Any]], seeds: int, *, bold: Callable[[str], bool]) -> list[str]:
    """Lines of Markdown: a row per method and rate, a column per batch size; a method's best is bold if it may."""
    batch_sizes = sorted({c["batch_size"] for c in cells}, reverse=True)
    lines = [
        "| method | rate | " + " | ".join(f"batch {b}" for b in batch_sizes) + " |",
        "| --- | --- |" + " --- |" * len(batch_sizes),
    ]
    for method, rate in dict.fromkeys((c["method"], c["learning_rate"]) for c in cells):
        row = {c["batch_size"]: c for c in cells if (c["method"], c["learning_rate"]) == (method, rate)}
        best = {b for b in batch_sizes if bold(method) and best_cell(cells, method, b) is row[b]}
        texts = [_cell_text(row[b], seeds, b in best) for b in batch_sizes]
        lines.append(f"| {method} | {rate:g} | " + " | ".join(texts) + " |")
    return lines


def made_with(environment: Mapping[str, Any], cpu_seconds: float) -> str:
    """What the numbers were had with, in a sentence."""
    return (
        f"{environment['cpu']}, {environment['cores']} cores; Python {environment['python']}, torch "
        f"{environment['torch']}, numpy {environment['numpy']}; {environment['date'][:10]}; "
        f"{cpu_seconds:.0f} CPU seconds of training in all."
    )


def _cell_text(cell: Mapping[str, Any], seeds: int, best: bool) -> str:
    text = f"{dot(cell['mean'])} ± {dot(cell['standard_error'], 4)}"
    if cell["diverged"]:
        text += f" ({cell['diverged']} of {seeds} diverged)"
    return f"**{text}**" if best else text


def _comparison_row(c: Mapping[str, Any]) -> str:
    verdict = "met" if c["above_target"] >= 0 else "missed"
    texts = (
        c["method"],
        str(c["batch_size"]),
        dot(c["mean"], 4),
        f"{c['base']} {c['base_learning_rate']:g}{'*' if c['base_at_edge'] else ''}: {dot(c['base_mean'], 4)}",
        f"{dot(c['difference'], 4, '+')} ± {dot(c['standard_error'], 4)}",
        "no" if not c["beyond_two_errors"] else ("yes, better" if c["difference"] > 0 else "yes, worse"),
        f"{dot(c['target'])} {verdict}, {dot(c['above_target'], 4, '+')}",
    )
    return "| " + " | ".join(texts) + " |"


def dot(value: float, digits: int = 3, sign: str = "") -> str:
    """.951 for 0.951, as in tables of accuracies."""
    return f"{value:{sign}.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{sign}.{digits}f}"
