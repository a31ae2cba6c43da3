"""The recurrent benchmark's model, arithmetic and report, on made-up runs and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import runs, sequence_cost, sequences
from benchmarks.data import Split
from benchmarks.report import rates_table
from benchmarks.timing import Plan


def result(method: str, rate: float, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "method": method,
        "learning_rate": rate,
        "batch_size": 6,
        "seed": seed,
        "samples": 60,
        "accuracy": accuracy,
        "diverged": accuracy == runs.CHANCE,
        "seconds": 1.0,
        "curve": [(6, 0.2), (60, accuracy)],
    }


ACCURACIES = {
    ("SGD", 0.1): (0.50, 0.70),
    ("SGD", 0.3): (0.40, 0.60),
    ("SGD", 1.0): (0.10, 0.10),
    ("BNP-SGD", 0.1): (0.80, 0.82),
    ("BNP-SGD", 0.3): (0.82, 0.84),
    ("BNP-SGD", 1.0): (0.10, 0.30),
    ("AdamW", 0.1): (0.80, 0.90),
    ("BNP-AdamW", 0.1): (0.70, 0.90),
}
RESULTS = [result(*key, seed, a) for key, both in ACCURACIES.items() for seed, a in enumerate(both)]


def test_differences_at_the_best_rates_and_over_the_grid() -> None:
    sgd, adam = sequences.compare(RESULTS)
    assert (sgd["method"], sgd["learning_rate"], sgd["base_learning_rate"]) == ("BNP-SGD", 0.3, 0.1)
    assert sgd["at_edge"] == ["SGD"]
    assert sgd["at_best"] == (pytest.approx(0.23), pytest.approx(0.09))  # .32 and .14
    assert sgd["over_grid"] == (pytest.approx((0.72 / 3 + 0.56 / 3) / 2), pytest.approx((0.72 / 3 - 0.56 / 3) / 2))
    assert adam["at_best"] == adam["over_grid"] == (pytest.approx(-0.05), pytest.approx(0.05))


def test_the_report_is_written(tmp_path: Path) -> None:
    text = sequences.write_report(RESULTS, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"sequences.json", "sequences.md", "sequences.png"}
    assert "| BNP-SGD | 6 | 0.3 | 0.1* | +.230 ± .090 |" in text
    assert "| SGD | 1 | .100 ± .0000 (2 of 2 diverged) |" in text
    cells = sequences.cells_of(RESULTS)
    assert sum("**" in line for line in rates_table(cells, 2, bold=lambda _: True)) == 4
    assert not any("**" in line for line in rates_table(cells, 2, bold=lambda _: False))


def split() -> Split:
    x = torch.rand(120, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.5).long()
    return Split(x, y, x[:50], y[:50])


def test_a_run_reads_images_row_by_row_and_can_be_repeated() -> None:
    shape: Any = {"seed": 3, "widths": (4, 8, 2)}
    first, again, other = (
        runs.train(sequences.SequenceRun(method, 0.1, 10, 120, **shape), split())
        for method in ("BNP-SGD", "BNP-SGD", "SGD")
    )
    assert (first["accuracy"], first["curve"]) == (again["accuracy"], again["curve"])
    assert first["curve"] != other["curve"]
    model = sequences.SequenceRun("SGD", 0.1, 10, 120, **shape).make_model()
    assert isinstance(model, sequences.RowClassifier)
    x = split().train_x[:5]
    _, (last, _) = model.rnn(x.view(5, 3, 4))
    torch.testing.assert_close(model(x), model.head(last[-1]))


def test_every_method_runs_at_every_rate_of_its_grid() -> None:
    everything = sequences.all_runs()
    assert len(everything) == len(set(everything)) == 3 * 2 * (2 * 8 + 2 * 7)
    assert len({run.file_name for run in everything}) == len(everything)
    plain = runs.Run("SGD", 0.1, 32, 60_000, 2, data="mnist, row by row", widths=(28, 64, 10))
    assert {run.steps for run in everything if run.batch_size == 32} == {plain.steps}


def test_the_table_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_cost, "SHAPES", ((2, 3, 4),))
    monkeypatch.setattr(sequence_cost, "DEPTHS", (2,))
    lines = sequence_cost.table(Plan(seconds=1e-3, min_rounds=1, max_rounds=1, block=1e-4, warm_up=0.0)).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| batch 2, 3 → 4 | AdamW | ") and lines[3].count(" ms)") == 1
