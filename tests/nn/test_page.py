"""docs/gamma_decay.md runs as it stands, its numbers are the measured ones; the benchmarks' own arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import gamma_decay, gamma_runs, theory_gamma
from benchmarks.data import DataMissingError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gamma_decay.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_the_code() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(code, scope)
    zeta = scope["penalty"].coefficients
    assert list(zeta) == ["0"]  # the last layer does not decay
    assert 64 * float(zeta["0"].mean()) == pytest.approx(3 / 8, rel=0.1)


def test_the_tables_are_the_results() -> None:
    zeta = (RESULTS / "theory_gamma.md").read_text(encoding="utf-8")
    trained = (RESULTS / "gamma_decay.md").read_text(encoding="utf-8")
    rows = [line for line in (zeta + trained).splitlines() if line.startswith("|") and "---" not in line]
    shown = [line for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    assert len(shown) > 20
    assert [line for line in shown if line not in rows and "`" not in line] == ["| tool | what it is |"]


def test_the_committed_zeta_keeps_the_bounds() -> None:
    cases = json.loads((RESULTS / "theory_gamma.json").read_text())["cases"]
    for name, expected in (("identity, Gaussian", 0.75), ("ReLU, Gaussian", 0.375)):
        rows = {r["batch_size"]: r for r in cases[name]["rows"]}
        for key in ("predicted", "estimated", "measured"):
            assert 32 * rows[32][key] == pytest.approx(expected, rel=0.05)
        assert cases[name]["slope"] == pytest.approx(-1, abs=0.05)


def test_zeta_check() -> None:
    found = theory_gamma.check(samples=2**14, batch_sizes=(8, 32))
    for entry in found.values():
        for row in entry["rows"]:
            assert abs(row["estimated"] / row["predicted"] - 1) < 0.03
            assert abs(row["measured"] / row["predicted"] - 1) < 0.25  # of few samples
    lines = theory_gamma.table(found).splitlines()
    assert lines[3].startswith("| identity, Gaussian | 0.750 | 0.7")


def made_up(method: str, seed: int, loss: float, rate: float = 0.1, momentum: float = 0.1) -> dict[str, Any]:
    return {
        "method": method, "learning_rate": rate, "momentum": momentum, "seed": seed, "train_loss": loss - 1,
        "loss": loss, "accuracy": 0.5, "diverged": False, "curve": [(1, loss - 1, loss)] * 2,
    }  # fmt: skip


def test_differences_are_paired() -> None:
    results = []
    for name, method in gamma_runs.METHODS.items():
        for seed, base in ((1, 2.0), (2, 3.0)):
            results.append(made_up(name, seed, base - 0.1 * seed * method.strength))
    rows = {r["method"]: r for r in gamma_decay.summarize(results)}
    assert rows["PN"]["loss"] == pytest.approx((2.5, 0.5))
    assert rows["PN + gamma decay"]["loss_difference"] == pytest.approx((-0.15, 0.05))
    assert rows["BNP + gamma decay / 10"]["loss_difference"] == pytest.approx((-0.015, 0.005))
    assert rows["BN"]["gap"] == pytest.approx((1.0, 0.0))
    assert "loss_difference" not in rows["BN"]


def test_the_choice_of_rates() -> None:
    runs = [made_up("PN", 0, 2.0, 0.1, 0.03), made_up("PN", 0, 1.5, 0.3, 0.01), made_up("BN", 0, 1.0)]
    runs.append(made_up("PN", 0, 1.0, 0.03) | {"diverged": True})
    assert gamma_decay.best(runs, "PN") == (0.3, 0.01)


def test_runs_on_made_up_images(tmp_path: Path) -> None:
    x, y = torch.randn(24, 3, 8, 8), torch.randint(10, (24,))
    uses = ("train", "validation", "test")
    data = gamma_runs.Data(dict.fromkeys(uses, x), dict.fromkeys(uses, y))
    runs = [gamma_runs.Training(m, 0.03, 1, epochs=2, images=24, batch_size=8) for m in gamma_runs.METHODS]
    results = gamma_runs.train_all(runs, data, tmp_path, "test")
    assert [r["method"] for r in results] == list(gamma_runs.METHODS)
    assert all(len(r["curve"]) == 2 and (r["penalty"] > 0) == ("decay" in r["method"]) for r in results)
    assert results == gamma_runs.train_all(runs, data, tmp_path, "test")  # from the cache
    facts = dict.fromkeys(("images", "epochs", "batch_size", "tuning_seed", "tuning_epochs", "torch", "date"), 1)
    document = {"configuration": facts | {"seeds": [1]}, "summary": gamma_decay.summarize(results)}
    text = gamma_decay.markdown(document | {"tuning": [made_up("PN", 0, 2.0)], "cpu_seconds": 1.0})
    assert "| PN, momentum 0.1 | 1.000 / 2.000 |" in text
    gamma_decay.plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="point --data-dir at"):
        gamma_runs.load(tmp_path)
