"""The script of the figures: it resumes, and its checks have distinct points."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

import matplotlib.pyplot as plt

from benchmarks import theory
from benchmarks.theory_common import Check


def test_kept_points_are_not_measured_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(n: int) -> dict[str, Any]:
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"square": n * n}

    def draw(rows: Sequence[Any]) -> Any:
        figure, ax = plt.subplots()
        ax.plot([r["n"] for r in rows], [r["square"] for r in rows])
        return figure

    check = Check("squares", [{"n": n} for n in range(4)], measure, draw, lambda rows: [])
    with pytest.raises(KeyboardInterrupt):
        theory.run(check, tmp_path)
    assert [r["square"] for r in theory.run(check, tmp_path)] == [0, 1, 4, 9]
    assert calls == [0, 1, 2, 2, 3]
    document = json.loads((tmp_path / "theory_squares.json").read_text(encoding="utf-8"))
    assert document["rows"][3] == {"n": 3, "square": 9}
    assert (tmp_path / "theory_squares.png").stat().st_size > 0
    theory.run(check, tmp_path, fresh=True)
    assert calls[5:] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", theory.CHECKS)
def test_points_are_distinct_and_committed_results_are_theirs(name: str) -> None:
    check = theory.CHECKS[name]
    keys = [json.dumps(point, sort_keys=True) for point in check.points]
    assert len(set(keys)) == len(keys)
    file = Path(theory.__file__).parent / "results" / f"theory_{name}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [{k: r[k] for k in p} for r, p in zip(rows, check.points, strict=True)] == list(check.points)
    assert check.summary(rows)
