"""docs/curvature.md runs as it stands, and its numbers are those that were measured; the benchmark's own arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bnp_optim import curvature

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "curvature.md").read_text(encoding="utf-8")


def test_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    scope: dict[str, Any] = {}
    exec(code, scope)
    shown = capsys.readouterr().out
    assert "H (hessian), 738 parameters, mean over 256 samples" in shown
    assert "BNP's P on 738 of 738 parameters" in shown
    # what the page says of this example: the blocks improve, or stay, and the whole does not
    assert scope["report"].kappa_mean > 2 * scope["plain"].kappa_mean
    for name, params in curvature.blocks(scope["model"]).items():
        with scope["optimizer"].pause_statistics():
            plain = curvature.estimate_conditioning(scope["batches"], params)
        block = curvature.estimate_conditioning(scope["batches"], params, preconditioner=scope["optimizer"])
        assert block.kappa_mean < {"0": 0.5, "2": 1.2}[name] * plain.kappa_mean
    assert all(place.count == 256 for place in scope["optimizer"].statistics.values())


def test_the_table_of_exact_spectra() -> None:
    """Each pair "a → b" in the page's table is H's and PᵀHP's number in the committed results."""
    epochs = json.loads((ROOT / "benchmarks" / "results" / "curvature_spectra.json").read_text())["epochs"]
    rows = dict(re.findall(r"^\| (\S+(?: \S+)?) \| (.*) \|$", PAGE, flags=re.M))
    for name in ("kappa_mean", "kappa_q90", "lambda_max", "input κ"):
        cells = rows[f"`{name}`" if name != "input κ" else name].split(" | ")
        key = "input kappa" if name == "input κ" else name
        for cell, numbers in zip(cells, epochs.values(), strict=True):
            shown = [float(v) for v in cell.split(" → ")]
            assert shown == pytest.approx([numbers[f"{key} H"], numbers[f"{key} PᵀHP"]], rel=0.02)


def test_the_benchmark() -> None:
    pytest.importorskip("sklearn", reason="the benchmark trains on scikit-learn's digits")
    pytest.importorskip("matplotlib", reason="the benchmark draws")
    from benchmarks import curvature as benchmark

    problem = benchmark.Problem((64, 6, 10), 3)
    exact = benchmark.truth(problem, preconditioned=False)
    value, products = benchmark.ours(problem)
    assert value == pytest.approx(exact, rel=1e-3)
    assert products < 20
    value, products = benchmark.power_iteration(problem)
    assert value == pytest.approx(exact, rel=0.1)
    assert products > 3
    assert all(p.dtype is torch.float32 and p.grad is None for p in problem.params())
    rows = {
        "ours": {"training_steps": 20.4, "products": 9, "relative_error": 1e-4, "peak_mib": 1.0},
        "far": {"training_steps": 9.0, "products": 300, "relative_error": 1e-2, "peak_mib": None},
        "gone": {"missing": "No module named 'gone'"},
    }
    result = {"parameters": 3, "step_ms": 1.0, "step_peak_mib": 0.5, "methods": rows}
    lines = benchmark.table({"net: state": result}).splitlines()
    assert lines[2] == "| net: state (3 parameters, 1 ms and 0.5 MiB per step) | ours | 20 | 9 | 1e-04 | 1.0 |"
    assert lines[3] == "|  | far | 9 | 300 | 1e-02 **missed** |  |"
    assert lines[4] == "|  | gone | not installed | | | |"
