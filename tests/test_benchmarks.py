"""The five-seed study of MNIST: its arithmetic, its runs on made-up images, and the refusals of the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import convergence, five_seeds, runs
from benchmarks.data import DataMissingError, Split, check_mnist
from benchmarks.report import mean_and_error, summarize

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


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
        convergence.main(["--preset", "five-seeds", "--data-dir", str(tmp_path)])
    assert "lacks train-images-idx3-ubyte.gz" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--tasks", "mnist"], ["--batch-sizes", "1"], ["--report"]])
def test_the_five_seeds_are_run_whole(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.main(["--preset", "five-seeds", *option])
    assert f"--preset five-seeds is run whole: leave out {option[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convergence.main(["--quick", "--preset", "short"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_published_five_seeds_are_those_of_the_command() -> None:
    document = json.loads((RESULTS / "convergence_mnist_five_seeds.json").read_text())
    keys = ("method", "learning_rate", "batch_size", "samples", "seed")
    planned = {tuple(getattr(run, key) for key in keys) for run in five_seeds.all_runs()}
    assert {tuple(run[key] for key in keys) for run in document["runs"]} == planned
    assert len(planned) == 5 * 3 * 9
    assert summarize(document["runs"], five_seeds.TARGETS)["cells"] == document["summary"]["cells"]
