"""The benchmark's arithmetic, a small run of it, and that what was predicted is there in wide nets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import theory_initialization as benchmark


def test_the_prediction() -> None:
    """cos of ReLU's outputs for orthogonal inputs is 1/π; and the slow way for the next, by sampling."""
    found = benchmark.predicted(3)
    assert found["cosine"][:2] == [0.0, pytest.approx(1 / math.pi)]
    c = found["cosine"][1]
    a, b = torch.randn(2, 1_000_000)
    b = c * a + math.sqrt(1 - c * c) * b
    assert found["cosine"][2] == pytest.approx(float((a.relu() * b.relu()).mean() * 2), rel=0.012)  # 4 errors


def test_quartiles_are_among_the_values() -> None:
    assert benchmark.quartiles([4.0, math.inf, 1.0, 2.0, 3.0]) == [2.0, 3.0, 4.0]
    assert benchmark.quartiles([math.inf] * 3) == [math.inf] * 3


def test_a_small_run(tmp_path: Path) -> None:
    summary = benchmark.check(tmp_path, seeds=3, depth=2)
    saved = json.loads((tmp_path / "initialization.json").read_text(encoding="utf-8"))
    assert saved["settings"]["seeds"] == 3 and len(saved["depth"]["none"]["std"]) == 3
    assert (tmp_path / "initialization.png").stat().st_size > 10_000
    assert set(summary["steps"]) == set(benchmark.STEPS)
    for steps in summary["steps"].values():
        assert len(steps["curve"]) == len(benchmark.STEP_SIZES)
        assert steps["best_relative_loss"][2] < 1
    assert len(benchmark.table(summary).splitlines()) == 2 + len(benchmark.STEPS)
    expected = saved["predicted"]["cosine"]
    for measured, c in zip(summary["depth"]["none"]["cosine"], expected, strict=True):
        assert measured[1] == pytest.approx(c, abs=0.06)


def test_the_command_line_refuses() -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--seeds", "0"])
