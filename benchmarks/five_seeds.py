"""MNIST over five seeds: BNP at one learning rate against plain SGD and AdamW at several.

    python -m benchmarks.convergence --preset five-seeds --data-dir data

MNIST, pixels / 255 and nothing else; MLP 784-100-100-100-10, ReLU, torch's default initialization; cross-entropy; one
pass in a shuffled order over all 60,000 training images at batch sizes 60 and 6, over the first 20,000 of that order at
batch size 1. Plain SGD and AdamW get a grid of learning rates, BNP one rate each, with all its defaults. Within a seed
all methods share initial weights and order, so differences are paired.

Finished runs are kept under OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.data import check_mnist
from benchmarks.documents import compact, environment
from benchmarks.plots import plot
from benchmarks.report import markdown, summarize
from benchmarks.runs import Run, load_result, package_digest, start_worker, train_and_keep

SEEDS = range(5)
SAMPLES = {60: 60_000, 6: 60_000, 1: 20_000}  # by batch size
RATES = {"SGD": (0.01, 0.03, 0.1, 0.3), "AdamW": (3e-4, 1e-3, 3e-3), "BNP-SGD": (0.1,), "BNP-AdamW": (1e-3,)}
TARGETS = {"BNP-SGD": {60: 0.960, 6: 0.962, 1: 0.943}, "BNP-AdamW": {60: 0.960, 6: 0.962, 1: 0.942}}


def all_runs() -> list[Run]:
    """All runs, seed by seed (so that the time left can be told early), the long ones of a seed first."""
    digest = package_digest()
    return [
        Run(
            method,
            rate,
            batch_size,
            samples,
            seed,
            package_digest=digest if method.startswith("BNP-") else None,
        )
        for seed in SEEDS
        for batch_size, samples in sorted(SAMPLES.items())
        for method, rates in RATES.items()
        for rate in rates
    ]


def run_all(runs: Sequence[Run], data_dir: Path, cache: Path, workers: int) -> list[dict[str, Any]]:
    """The results of ``runs`` in their order; those in ``cache`` are read, the others trained."""
    cache.mkdir(parents=True, exist_ok=True)
    results = {run: load_result(run, cache) for run in runs}
    todo = [run for run, result in results.items() if result is None]
    bar = tqdm(total=sum(r.steps for r in runs), unit="step", unit_scale=True, dynamic_ncols=True, smoothing=0.05)
    bar.update(sum(r.steps for r in runs) - sum(r.steps for r in todo))
    bar.initial = bar.n
    with bar, ProcessPoolExecutor(
        max(1, min(workers, len(todo))), get_context("spawn"), start_worker, (data_dir,)
    ) as pool:  # fmt: skip
        futures = {pool.submit(train_and_keep, run, cache): run for run in todo}
        bar.set_postfix_str(f"{len(runs) - len(todo)}/{len(runs)} runs", refresh=False)
        try:
            for done, future in enumerate(as_completed(futures), start=len(runs) - len(todo) + 1):
                run = futures[future]
                results[run] = future.result()
                bar.set_postfix_str(f"{done}/{len(runs)} runs", refresh=False)
                bar.update(run.steps)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result in results.values() if result is not None]


def write_report(results: list[dict[str, Any]], output: Path) -> str:
    """Write the JSON, the Markdown and the PNG; returns the Markdown."""
    summary = summarize(results, TARGETS)
    document = {
        "benchmark": "convergence --preset five-seeds",
        "configuration": {
            "data": "MNIST, pixels / 255",
            "model": "MLP 784-100-100-100-10, ReLU, torch's default initialization",
            "samples_by_batch_size": SAMPLES,
            "learning_rates": RATES,
            "seeds": list(SEEDS),
            "targets": TARGETS,
            "curve": "every fifth test image; the final accuracy is on all 10,000",
        },
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results), 1),
        "summary": summary,
        "runs": results,
    }
    text = markdown(document)
    (output / "convergence_mnist_five_seeds.json").write_text(compact(document) + "\n")
    (output / "convergence_mnist_five_seeds.md").write_text(text)
    title = "MNIST, MLP 784-100-100-100-10, one pass, constant learning rate"
    plot(results, summary["cells"], title, output / "convergence_mnist_five_seeds.png")
    return text


def main(data_dir: Path, output: Path, workers: int, *, fresh: bool = False) -> str:
    """Run what is missing, or with ``fresh`` everything, and write the report; returns its Markdown.

    Raises:
        DataMissingError: if MNIST is not in ``data_dir``.
    """
    check_mnist(data_dir)
    runs, cache = all_runs(), output / ".cache"
    if fresh:
        for run in runs:
            (cache / run.file_name).unlink(missing_ok=True)
    return write_report(run_all(runs, data_dir, cache, workers), output)
