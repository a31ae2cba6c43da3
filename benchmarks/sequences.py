"""A recurrent network: BNP against its plain bases, all of them over a whole grid of learning rates.

    python -m benchmarks.sequences --data-dir data

MNIST row by row, 28 steps of 28 pixels / 255; an LSTM of 64 units, whose last output goes through a linear layer;
torch's default initialization; cross-entropy; one pass in a shuffled order at a constant rate, without clipping, over
all 60,000 training images at batch size 32 and over the first 5,000 of that order at batch size 1. BNP runs with all
its defaults. Within a seed all methods share initial weights and order, so differences are paired.

Finished runs are kept under OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.data import DataMissingError, check_mnist
from benchmarks.documents import compact, environment
from benchmarks.five_seeds import run_all
from benchmarks.plots import plot
from benchmarks.report import best_cell, by_cell, cells_of, dot, edges, made_with, mean_and_error, rates_table
from benchmarks.runs import Run, package_digest
from benchmarks.workloads import RowClassifier

SEEDS = (2, 3, 4)  # 0 and 1 were used to choose how bnp_optim counts samples of recurrent layers
SAMPLES = {32: 60_000, 1: 5_000}  # by batch size
SGD_RATES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
RATES = {"SGD": SGD_RATES, "AdamW": ADAM_RATES, "BNP-SGD": SGD_RATES, "BNP-AdamW": ADAM_RATES}
TITLE = "MNIST row by row, LSTM of 64 units, one pass, constant learning rate"


@dataclass(frozen=True)
class SequenceRun(Run):
    """``widths``: columns of an image, units of the LSTM, classes."""

    data: str = "mnist, row by row"
    widths: tuple[int, ...] = (28, 64, 10)

    def make_model(self) -> nn.Module:
        return RowClassifier(*self.widths)


def all_runs(samples: Mapping[int, int] = SAMPLES) -> list[Run]:
    """All runs, seed by seed."""
    digest = package_digest()
    return [
        SequenceRun(method, rate, batch_size, n, seed, package_digest=digest if method.startswith("BNP-") else None)
        for seed in SEEDS
        for batch_size, n in samples.items()
        for method, rates in RATES.items()
        for rate in rates
    ]


def compare(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """BNP minus its base, paired by seed: each at its own best rate, and on average over the rates they share."""
    cells, runs = cells_of(results), by_cell(results)
    rows = []
    for batch_size in sorted({c["batch_size"] for c in cells}, reverse=True):
        for method in sorted({c["method"] for c in cells if c["method"].startswith("BNP-")}, reverse=True):
            base = method.removeprefix("BNP-")
            best = {m: best_cell(cells, m, batch_size)["learning_rate"] for m in (method, base)}
            grid = {m: {c["learning_rate"] for c in cells if c["method"] == m} for m in (method, base)}
            shared = sorted(grid[method] & grid[base])
            seeds = sorted(runs[batch_size, method, best[method]])

            def accuracy(m: str, rate: float, seed: int, batch_size: int = batch_size) -> float:
                return float(runs[batch_size, m, rate][seed]["accuracy"])

            at_best = [accuracy(method, best[method], s) - accuracy(base, best[base], s) for s in seeds]
            over_grid = [
                sum(accuracy(method, rate, s) - accuracy(base, rate, s) for rate in shared) / len(shared) for s in seeds
            ]
            rows.append(
                {
                    "batch_size": batch_size,
                    "method": method,
                    "base": base,
                    "learning_rate": best[method],
                    "base_learning_rate": best[base],
                    "at_edge": [m for m in (method, base) if best[m] in edges(cells, m)],
                    "at_best": mean_and_error(at_best),
                    "over_grid": mean_and_error(over_grid),
                }
            )
    return rows


def markdown(document: Mapping[str, Any]) -> str:
    """The tables, with how they were had."""
    configuration = document["configuration"]
    samples, seeds = configuration["samples_by_batch_size"], configuration["seeds"]
    lines = [
        "# A recurrent network",
        "",
        f"{configuration['data']}; {configuration['model']}; one pass at a constant learning rate without clipping ("
        + ", ".join(f"{n:,} samples at batch size {b}" for b, n in samples.items())
        + f"); seeds {', '.join(map(str, seeds))}. Test accuracy, mean ± standard error; a diverged run scores .1.",
        "",
        *rates_table(document["summary"]["cells"], len(seeds), bold=lambda _: True),
        "",
        "Bold: a method's best rate at that batch size, chosen on these very runs. BNP minus its base, paired by seed:",
        "",
        "| method | batch | its best rate | base's best rate | at these rates | on average over the grid |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["summary"]["comparisons"]:
        rates = [
            f"{rate:g}{'*' if name in row['at_edge'] else ''}"
            for name, rate in ((row["method"], row["learning_rate"]), (row["base"], row["base_learning_rate"]))
        ]
        differences = [f"{dot(row[k][0], 3, '+')} ± {dot(row[k][1])}" for k in ("at_best", "over_grid")]
        lines.append("| " + " | ".join([row["method"], str(row["batch_size"]), *rates, *differences]) + " |")
    lines += [
        "",
        *(["*: at the edge of its grid.", ""] if any(r["at_edge"] for r in document["summary"]["comparisons"]) else []),
        made_with(document["environment"], document["cpu_seconds"]),
        "",
    ]
    return "\n".join(lines)


def write_report(results: list[dict[str, Any]], output: Path) -> str:
    """Write the JSON, the Markdown and the PNG; returns the Markdown."""
    cells = cells_of(results)
    document = {
        "benchmark": "sequences",
        "configuration": {
            "data": "MNIST, row by row (28 steps of 28 pixels / 255)",
            "model": "LSTM of 64 units, its last output through a linear layer, torch's default initialization",
            "samples_by_batch_size": {r["batch_size"]: r["samples"] for r in results},
            "learning_rates": RATES,
            "seeds": sorted({r["seed"] for r in results}),
            "curve": "every fifth test image; the final accuracy is on all 10,000",
        },
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results), 1),
        "summary": {"cells": cells, "comparisons": compare(results)},
        "runs": results,
    }
    text = markdown(document)
    (output / "sequences.json").write_text(compact(document) + "\n")
    (output / "sequences.md").write_text(text)
    plot(results, cells, TITLE, output / "sequences.png", ("upper left", "upper right"))
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.sequences", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the folder that holds mnist/ (data)")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}, it must be at least 1")
    try:
        check_mnist(args.data_dir)
    except DataMissingError as error:
        parser.error(str(error))
    try:
        results = run_all(all_runs(), args.data_dir, args.output / ".cache", args.workers)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last finished run.")
    print(write_report(results, args.output))


if __name__ == "__main__":
    main()
