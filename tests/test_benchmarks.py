"""The quick benchmark's arithmetic, its runs on made-up images, and its refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import convergence, runs
from benchmarks.data import DataMissingError, Split, check_mnist
from benchmarks.report import mean_and_error, summarize


def result(method: str, rate: float, seed: int, accuracy: float) -> dict[str, object]:
    return {
        "method": method,
        "learning_rate": rate,
        "batch_size": 6,
        "seed": seed,
        "accuracy": accuracy,
        "diverged": False,
    }


def test_differences_are_paired_and_against_the_best_rate() -> None:
    results = [
        *(result("SGD", 0.1, s, a) for s, a in enumerate([0.50, 0.70])),
        *(result("SGD", 0.3, s, a) for s, a in enumerate([0.40, 0.60])),
        *(result("BNP-SGD", 0.1, s, a) for s, a in enumerate([0.55, 0.77])),
    ]
    (comparison,) = summarize(results, {"BNP-SGD": {6: 0.65}})["comparisons"]
    assert comparison["base_learning_rate"] == 0.1
    assert comparison["difference"] == pytest.approx(0.06)
    assert comparison["standard_error"] == pytest.approx(0.01)  # of .05 and .07, not of the accuracies
    assert comparison["beyond_two_errors"]
    assert comparison["above_target"] == pytest.approx(0.01)


def test_standard_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


def split() -> Split:
    x = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.5).long()
    return Split(x, y, x[:100], y[:100])


def test_runs_of_a_seed_are_paired_and_repeatable() -> None:
    first, again, other = (
        runs.train(runs.Run(method, 0.1, 10, 200, seed=3, widths=(12, 8, 2)), split())
        for method in ("BNP-SGD", "BNP-SGD", "SGD")
    )
    for key in ("accuracy", "curve", "diverged"):
        assert first[key] == again[key]
    assert [point[0] for point in first["curve"]] == [point[0] for point in other["curve"]]
    assert first["curve"] != other["curve"]


def test_a_diverged_run_scores_chance() -> None:
    diverged = runs.train(runs.Run("SGD", 1e30, 10, 200, seed=0, widths=(12, 8, 2)), split())
    assert diverged["diverged"]
    assert diverged["accuracy"] == runs.CHANCE
    assert diverged["curve"][-1] == (200, runs.CHANCE)


def test_missing_data_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataMissingError, match="point --data-dir at the folder"):
        check_mnist(tmp_path)
    with pytest.raises(SystemExit):
        convergence.main(["--quick", "--data-dir", str(tmp_path)])
    assert "lacks train-images-idx3-ubyte.gz" in capsys.readouterr().err
