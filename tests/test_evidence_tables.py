"""The plan of the convergence benchmark, the arithmetic of its tables, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import convergence
from benchmarks.evidence import engine, figures, times
from benchmarks.evidence.contenders import CONTENDERS, PEERS
from benchmarks.evidence.engine import SCHEDULES, Run, train
from benchmarks.evidence.plan import PRESETS, Preset, Scope, choose
from benchmarks.evidence.report import markdown
from benchmarks.evidence.tables import cells_of, lifts, one_rates
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.times import keep_times, load_times, samples_to, step_times
from tests.evidence_toy import TOY, split

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", TOY)


def made_up(scope: Scope) -> dict[Run, dict[str, Any]]:
    """Tuning results under which SGD is best at .1 and BNP-SGD at .3 and ten points better; reports, seeds 1 and 2."""
    results = {}
    for run in scope.tuning():
        best = 0.3 if run.contender.bnp is not None else 0.1
        score = {best: 0.8, 0.03: 0.7}.get(run.learning_rate, 0.5) + 0.1 * (run.contender.bnp is not None)
        results[run] = {"accuracy": score, "diverged": False, "seconds": 1.0, "curve": []}
    for run in scope.reporting(results):
        gain = {1: 0.06, 2: 0.10}[run.seed] if run.contender.bnp is not None else 0.0
        results[run] = {"accuracy": 0.7 + 0.1 * run.seed + gain, "diverged": False, "seconds": 1.0, "curve": []}
    return results


def test_bnp_on_a_folded_net_is_compared_with_its_base_on_a_folded_net() -> None:
    names = ("AdamW", "AdamW, folded", "BNP-AdamW", "BNP-AdamW, folded")
    scope = Scope("toy", {10: 400}, names, ("constant",), ())
    pairs = [(x.contender, x.base) for x in lifts(cells_of(scope, made_up(scope)))]
    assert pairs == [("BNP-AdamW", "AdamW"), ("BNP-AdamW, folded", "AdamW, folded")]


def test_the_figure_of_folded_nets_has_them_beside_batch_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = Scope("toy", {10: 400, 20: 400}, ("AdamW", "AdamW, folded", "BN + AdamW"), ("constant",), ())
    results = made_up(scope)
    for i, result in enumerate(results.values()):
        result |= {"accuracy": i / 100, "curve": [(10, 0.2), (20, 0.3)]}
    cells = cells_of(scope, results)
    del cells["AdamW, folded", 20, "constant"]
    drawn: list[Any] = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    figures.convergence_figure(scope, cells, results, tmp_path / "folded.png", folded=True)
    (figure,) = drawn
    above, _ = figure.axes  # batch size 10 alone
    shown = {line.get_label(): list(line.get_ydata()) for line in above.get_lines()}
    assert shown == {
        "AdamW": list(cells["AdamW, folded", 10, "constant"].grid.values()),
        "BN + AdamW": list(cells["BN + AdamW", 10, "constant"].grid.values()),
    }
    figures.convergence_figure(scope, {}, results, tmp_path / "none.png", folded=True)
    assert not (tmp_path / "none.png").exists()


def test_rates_are_chosen_on_the_tuning_seed_and_lifts_are_paired() -> None:
    scope = Scope("toy", {10: 400}, ("SGD", "BNP-SGD"), ("constant",), (1, 2))
    results = made_up(scope)
    assert choose(scope, CONTENDERS["BNP-SGD"], 10, "constant", results) == 0.3
    reported = scope.reporting(results)
    assert {(run.contender.name, run.learning_rate) for run in reported} == {("SGD", 0.1), ("BNP-SGD", 0.3)}
    cells = cells_of(scope, results)
    assert cells["SGD", 10, "constant"].accuracies == {1: pytest.approx(0.8), 2: pytest.approx(0.9)}
    (lift,) = lifts(cells)
    assert lift.at_best == (pytest.approx(0.08), pytest.approx(0.02))  # of .06 and .10, not of the accuracies
    assert lift.over_grid == pytest.approx(0.1)
    text = markdown(scope, _preset(), results, _document())
    assert "| BNP-SGD | **.930** ± .070 (0.3) |" in text
    assert "| BNP-SGD − SGD | +.080 ± .020; +.100 |" in text


def test_close_cells_have_more_seeds_and_all_of_them_count() -> None:
    scope = Scope("toy", {10: 400}, ("Muon", "SGD"), SCHEDULES, (1, 2), close=((10, "linear"),))
    results: dict[Run, Any] = {run: {"accuracy": 0.5, "curve": []} for run in scope.tuning()}
    assert set(scope.reporting(results)) < set(scope.everything())  # which is what --fresh forgets
    for run in scope.reporting(results):
        results[run] = {"accuracy": run.seed / 100, "curve": []}
    cells = cells_of(scope, results)
    for (name, _, schedule), cell in cells.items():
        more = list(range(6, 16)) if (name, schedule) == ("Muon", "linear") else []
        assert cell.accuracies == {seed: seed / 100 for seed in (1, 2, *more)}
    text = markdown(scope, _preset(), results, _document())
    assert "is ahead, seeds 6 to 15 too." in text and "| Muon | **.090** ± .013, 12 seeds (0.0001*) |" in text


def test_a_cell_without_its_whole_grid_chooses_nothing() -> None:
    scope = Scope("toy", {10: 400}, ("SGD",), ("constant",), (1,))
    results = made_up(replace(scope, seeds=()))
    results.pop(scope.tuning()[3])
    assert cells_of(scope, results) == {} and scope.reporting(results) == []


def test_one_rate_is_the_best_on_average() -> None:
    scope = Scope("toy", {10: 400, 20: 400}, ("SGD",), ("constant",), ())
    results = made_up(scope)
    at_20 = {run: r for run, r in results.items() if run.batch_size == 20}
    for run, result in at_20.items():
        result["accuracy"] = {0.03: 0.78, 0.1: 0.6, 1.0: 0.79}.get(run.learning_rate, 0.1)
    (one,) = one_rates(scope, results, cells_of(scope, results))
    assert one.rate == 0.03  # .70 and .78; at .1 .80 and .60, at 1.0 .50 and .79
    assert one.losses == {10: pytest.approx(0.1), 20: pytest.approx(0.01)} and one.reported == {}


def test_what_the_one_rate_costs_is_reported_on_other_seeds() -> None:
    scope = Scope("toy", {10: 400, 20: 400}, ("SGD", "AdamW"), ("constant",), (1, 2), untuned=("SGD",))
    results = {run: {"accuracy": 0.1, "curve": []} for run in scope.tuning()}
    for (rate, batch_size), accuracy in {(0.03, 10): 0.7, (0.1, 10): 0.8, (0.03, 20): 0.8, (0.1, 20): 0.6}.items():
        results[scope.run(CONTENDERS["SGD"], batch_size, "constant", rate, 0)]["accuracy"] = accuracy
    extra = scope.at_one_rate(results)
    assert [(r.learning_rate, r.batch_size, r.seed) for r in extra] == [(0.03, 10, 1), (0.03, 10, 2)]
    for run in scope.reporting(results):
        results[run] = {"accuracy": 0.75, "curve": []}
    for run in extra:
        results[run] = {"accuracy": {1: 0.70, 2: 0.78}[run.seed], "curve": []}
    one, other = one_rates(scope, results, cells_of(scope, results))
    assert (one.contender, one.rate, one.losses) == ("SGD", 0.03, {10: pytest.approx(0.1), 20: 0.0})
    assert one.reported == {10: (pytest.approx(0.01), pytest.approx(0.04))}  # of .05 and -.03
    assert other.contender == "AdamW" and other.reported == {}
    text = markdown(scope, _preset(), results, _document())
    assert "| SGD | 0.03 | .100; +.010 ± .040 | .000 |" in text


def test_quick_has_every_method_over_its_whole_grid_and_is_published() -> None:
    (scope,) = PRESETS["quick"].scopes
    cells = {(c.name, b) for c, b, _ in scope.cells()}
    slow = {name for name in PEERS if CONTENDERS[name].slow}
    assert slow == {"SOAP", "BNP-SOAP", "K-FAC", "Shampoo"}
    assert cells == {(n, b) for n in PEERS for b in (1, 16)} - {(n, 1) for n in (*slow, "BN + SGD", "BN + AdamW")}
    document = json.loads((RESULTS / "convergence_digits_quick.json").read_text())
    made = {json.dumps({k: v for k, v in run.items() if k not in ("key", "result")}) for run in document["runs"]}
    assert {json.dumps(run.describe()) for run in scope.tuning()} <= made
    assert len(made) == len(scope.tuning()) + len(cells) * len(scope.seeds)
    assert document["cpu_seconds"] < 360


def _preset() -> Any:
    return PRESETS["short"]


def _document() -> dict[str, Any]:
    environment = {"cpu": "c", "cores": 1, "python": "3", "torch": "2", "numpy": "2", "date": "2026-01-01T00:00"}
    return {"environment": environment, "cpu_seconds": 1.0}


def test_samples_to_an_accuracy_are_read_off_the_mean_curve() -> None:
    curves = [[(10, 0.1), (20, 0.5), (40, 0.9)], [(10, 0.1), (20, 0.7), (40, 0.9)]]
    assert samples_to(curves, 0.6) == pytest.approx(20)
    assert samples_to(curves, 0.75) == pytest.approx(30)
    assert samples_to(curves, 0.05) == pytest.approx(5)
    assert samples_to(curves, 0.95) is None
    assert samples_to([[(10, 0.6), (20, 0.4), (30, 0.8)]], 0.5) == pytest.approx(22.5)  # for good


def test_step_times_are_kept_beside_those_of_before(tmp_path: Path) -> None:
    chosen = [CONTENDERS["SGD"], CONTENDERS["BNP-SGD"]]
    found = step_times(TOY, split(), chosen, 10, rounds=3)
    assert 0 < found["SGD"] < found["BNP-SGD"]
    keep_times(tmp_path / "times.json", 10, {"SGD": 1.0})
    keep_times(tmp_path / "times.json", 10, {"BNP-SGD": 2.0})
    keep_times(tmp_path / "times.json", 1, {"SGD": 3.0})
    assert load_times(tmp_path / "times.json") == {10: {"SGD": 1.0, "BNP-SGD": 2.0}, 1: {"SGD": 3.0}}


def test_the_whole_command_resumes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset("toy", (Scope("toy", {10: 100}, ("SGD", "BNP-SGD"), seeds=(1, 2)),))
    monkeypatch.setitem(PRESETS, "full", preset)
    monkeypatch.setitem(times.TARGETS, "toy", 0.5)
    arguments = ["--data-dir", str(tmp_path), "--output", str(tmp_path), "--workers", "1"]
    convergence.main([*arguments, "--schedules", "constant"])
    files = set((tmp_path / ".cache" / "evidence").glob("*.json"))
    assert len(files) == 2 * 8 + 2 * 2
    monkeypatch.setattr(engine, "train", lambda *_: pytest.fail("it was there already"))
    convergence.main([*arguments, "--schedules", "constant"])
    text = (tmp_path / "convergence_toy_toy.md").read_text()
    assert "## Constant rate" in text and "BNP-SGD − SGD" in text
    assert len(json.loads((tmp_path / "convergence_toy_toy.json").read_text())["runs"]) == len(files)
    monkeypatch.setattr(engine, "train", train)
    before = {path: path.stat().st_mtime_ns for path in files}
    convergence.main([*arguments, "--schedules", "constant", "--methods", "SGD", "--fresh"])
    again = {path for path, changed in before.items() if path.stat().st_mtime_ns > changed}
    assert len(again) == 8 + 2 and set((tmp_path / ".cache" / "evidence").glob("*.json")) == files
    assert (tmp_path / "convergence_toy_toy.md").read_text().splitlines()[:-1] == text.splitlines()[:-1]
    with pytest.raises(SystemExit, match="--tasks nothing: preset toy has toy"):
        convergence.main([*arguments, "--tasks", "nothing"])
