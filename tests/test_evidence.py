"""The evidence engine: runs, their keys and cache, the plan, and the arithmetic of the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import convergence
from benchmarks.data import Split
from benchmarks.evidence import contenders, engine, times
from benchmarks.evidence.contenders import CONTENDERS, Contender, CovarianceRate, bnp, fingerprint, started
from benchmarks.evidence.engine import SCHEDULES, Run, train
from benchmarks.evidence.plan import PRESETS, UNFOLDED, Preset, Scope, choose
from benchmarks.evidence.report import markdown
from benchmarks.evidence.runner import Cache, published, run_all
from benchmarks.evidence.tables import cells_of, lifts, one_rates
from benchmarks.evidence.tasks import TASKS, Task
from benchmarks.evidence.times import keep_times, load_times, samples_to, step_times
from benchmarks.workloads import mlp
from bnp_optim import BNPreconditioner

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def split() -> Split:
    x = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.5).long()
    return Split(x, y, x[:100], y[:100])


TOY = Task(
    "toy", "toy", lambda _: split(), lambda norm: mlp((12, 10, 2), norm), {10: 400, 20: 400}, 100, 50, chance=0.5
)


@pytest.fixture(autouse=True)
def toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", TOY)


def toy(name: str = "SGD", rate: float = 0.1, seed: int = 0, schedule: str = "constant", samples: int = 400) -> Run:
    return Run("toy", CONTENDERS[name], rate, 10, samples, seed, schedule)


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if c.base not in contenders.PACKAGES])
def test_every_contender_learns_the_toy(name: str) -> None:
    run = toy(name, {"adaptive": 0.01, "sgd": 0.1}["adaptive" if CONTENDERS[name].rates[0] < 1e-3 else "sgd"])
    result = train(replace(run, samples=2000), split())
    assert result["accuracy"] > 0.85 and not result["diverged"], result["accuracy"]
    assert result["curve"][-1][0] == 2000


def test_equal_runs_are_equal_and_share_weights_and_order_with_others() -> None:
    first, again, other = (train(toy(name), split()) for name in ("BNP-SGD", "BNP-SGD", "SGD"))
    assert first["curve"] == again["curve"] and first["accuracy"] == again["accuracy"]
    assert [n for n, _ in first["curve"]] == [n for n, _ in other["curve"]]
    still = [train(toy(name, rate=1e-30), split())["accuracy"] for name in ("SGD", "momentum", "AdamW")]
    assert len(set(still)) == 1  # at the start they are the same net


def test_linear_decay_ends_near_zero_and_constant_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setitem(contenders.BASES, "sgd", lambda model, lr: Spy(model.parameters(), lr=lr))
    train(toy(schedule="linear"), split())
    assert seen == pytest.approx([0.1 * (1 - i / 40) for i in range(40)])


def test_a_diverged_run_scores_chance_to_the_end_of_its_curve() -> None:
    result = train(toy(rate=1e30), split())
    assert result["diverged"] and result["accuracy"] == 0.5
    assert result["curve"][-1] == (400, 0.5)
    assert len(result["curve"]) == len(engine.curve_steps(40))


def test_a_method_that_cannot_go_on_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Decomposing(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            if self.steps > 30:
                torch.linalg.svd(torch.full((2, 2), torch.nan))
            return super().step(closure)

    monkeypatch.setitem(contenders.BASES, "sgd", lambda model, lr: Decomposing(model.parameters(), lr=lr))
    result = train(toy(), split())
    assert result["diverged"] and result["accuracy"] == 0.5
    assert [n for n, _ in result["curve"]] == [n * 10 for n in sorted(engine.curve_steps(40))]
    assert [a == 0.5 for n, a in result["curve"] if n > 300] == [True] * sum(n > 30 for n in engine.curve_steps(40))


def test_several_passes_see_every_sample_equally_often() -> None:
    seen = engine._order(toy(samples=400), 200)
    assert torch.bincount(seen, minlength=200).tolist() == [2] * 200
    assert sorted(seen[:200].tolist()) == list(range(200))


def test_keys_tell_apart_what_matters_and_only_that() -> None:
    runs = [
        toy(),
        toy(rate=0.3),
        toy(seed=1),
        toy(schedule="linear"),
        toy("BNP-SGD"),
        toy("BN + SGD"),
        toy(samples=200),
    ]
    assert len({run.key for run in runs}) == len(runs)
    renamed = replace(toy(), contender=replace(CONTENDERS["SGD"], name="something else"))
    assert renamed.key == toy().key
    assert bnp("x", "sgd", step_scale="trace", mode="gradient").bnp == ()  # the defaults, spelled out
    variants = [bnp("x", "momentum"), bnp("x", "momentum", mode="gradient"), bnp("x", "momentum", stat_decay=0.9)]
    assert len({v.key for v in variants}) == 3
    assert bnp("x", "momentum") == bnp("x", "momentum", mode="two_sided")


def test_the_fingerprint_follows_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(CONTENDERS["SGD"], name="")
    wrapped = bnp("", "sgd")
    before = fingerprint(plain), fingerprint(wrapped)
    fingerprint.cache_clear()
    assert (fingerprint(plain), fingerprint(wrapped)) == before

    def doubled(self: BNPreconditioner, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(1 + 1e-4)
        return step(self, closure)

    step = BNPreconditioner.step
    monkeypatch.setattr(BNPreconditioner, "step", doubled)
    fingerprint.cache_clear()
    assert fingerprint(plain) == before[0] and fingerprint(wrapped) != before[1]
    fingerprint.cache_clear()


def test_the_fingerprint_of_packages_follows_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.metadata, "version", lambda name: f"{name} 1.2")
    fingerprint.cache_clear()
    soap, kfac = (fingerprint(CONTENDERS[name]) for name in ("SOAP", "K-FAC"))
    assert soap == "pytorch_optimizer pytorch_optimizer 1.2"
    assert kfac.startswith("singd singd 1.2 ('T', 1) ") and "('damping', 0.1)" in kfac
    monkeypatch.setitem(contenders.OPTIONS["kfac, no momentum"], "damping", 0.2)
    fingerprint.cache_clear()
    assert fingerprint(CONTENDERS["SOAP"]) == soap and fingerprint(CONTENDERS["K-FAC"]) != kfac
    fingerprint.cache_clear()


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise contenders.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(contenders.metadata, "version", missing)
    fingerprint.cache_clear()
    with pytest.raises(SystemExit):
        convergence.main(["--quick", "--methods", "K-FAC", "--report", "--output", str(tmp_path)])
    assert "singd is not installed: pip install -e '.[benchmarks]'" in capsys.readouterr().err
    fingerprint.cache_clear()


def test_the_rate_of_covariances_is_bounded_by_the_batch_size() -> None:
    net = torch.nn.Linear(3, 2)
    rate = CovarianceRate(net, 0.01, 0.1, 50)
    found = {}
    for batch_size in (1, 4, 64):
        net(torch.zeros(batch_size, 3))
        found[batch_size] = [rate(step) for step in (0, 25, 50, 1000)]
    assert found[1] == pytest.approx([0.01] * 4)
    assert found[4] == pytest.approx([0.01, 0.02, 0.04, 0.04])
    assert found[64] == pytest.approx([0.01, 0.1**1.5, 0.1, 0.1])


def test_runs_resume_from_the_cache_and_from_published_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [toy(rate=r) for r in (0.01, 0.1)]
    calls: list[float] = []

    def counted(run: Run, data: Split) -> dict[str, Any]:
        calls.append(run.learning_rate)
        return train(run, data)

    monkeypatch.setattr(engine, "train", counted)
    first = run_all(runs[:1], Cache(tmp_path / "a"), tmp_path)
    both = run_all(runs, Cache(tmp_path / "a"), tmp_path)
    assert calls == [0.01, 0.1]
    assert both[runs[0]]["accuracy"] == first[runs[0]]["accuracy"]
    lines = [{"key": run.key, **run.describe(), "result": result} for run, result in both.items()]
    (tmp_path / "published.json").write_text(json.dumps({"runs": lines}))
    again = run_all(runs, Cache(tmp_path / "b", published(tmp_path)), tmp_path)
    assert calls == [0.01, 0.1]
    assert json.dumps(again[runs[1]]) == json.dumps(both[runs[1]])


def test_what_is_forgotten_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [toy(rate=r) for r in (0.01, 0.1)]
    run_all(runs, Cache(tmp_path), tmp_path)
    lines = [{"key": run.key, "result": {"accuracy": 0.0}} for run in runs]
    (tmp_path / "published.json").write_text(json.dumps({"runs": lines}))
    cache = Cache(tmp_path, [tmp_path / "published.json"])
    cache.forget(runs[:1])
    assert set(cache.found(runs)) == {runs[1]}
    monkeypatch.setattr(engine, "train", lambda *_: {"accuracy": 0.25})
    assert run_all(runs, cache, tmp_path)[runs[0]] == {"accuracy": 0.25}


def test_no_run_begins_after_the_time_is_up(tmp_path: Path) -> None:
    assert run_all([toy()], Cache(tmp_path), tmp_path, until=0.0) == {}


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


def test_a_folded_net_starts_from_the_first_inputs_of_its_run_normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FOLD", 30)
    nets = {}

    def kept(model: torch.nn.Module, contender: Contender, inputs: Any) -> torch.nn.Module:
        nets[contender.name] = [p.detach().clone() for p in started(model, contender, inputs).parameters()]
        return model

    monkeypatch.setattr(engine, "started", kept)
    data = split()
    for name in ("AdamW", "AdamW, folded", "BNP-AdamW, folded"):
        train(toy(name, seed=3), data)
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(3))
    variance, mean = torch.var_mean(data.train_x[order[:30]], 0, unbiased=False)
    weight, bias = nets["AdamW"][:2]
    expected = weight / (variance + 1e-4).sqrt()
    torch.testing.assert_close(nets["AdamW, folded"][0], expected)
    torch.testing.assert_close(nets["AdamW, folded"][1], bias - expected @ mean)
    for mine, theirs in zip(nets["AdamW, folded"], nets["BNP-AdamW, folded"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_bnp_on_a_folded_net_is_compared_with_its_base_on_a_folded_net() -> None:
    names = ("AdamW", "AdamW, folded", "BNP-AdamW", "BNP-AdamW, folded")
    scope = Scope("toy", {10: 400}, names, ("constant",), ())
    pairs = [(x.contender, x.base) for x in lifts(cells_of(scope, made_up(scope)))]
    assert pairs == [("BNP-AdamW", "AdamW"), ("BNP-AdamW, folded", "AdamW, folded")]


def test_rates_are_chosen_on_the_tuning_seed_and_lifts_are_paired() -> None:
    scope = Scope("toy", {10: 400}, ("SGD", "BNP-SGD"), ("constant",), (1, 2), whole_grid=False)
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
    scope = Scope("toy", {10: 400}, ("Muon", "SGD"), SCHEDULES, (1, 2), whole_grid=False, close=((10, "linear"),))
    results: dict[Run, Any] = {run: {"accuracy": 0.5, "curve": []} for run in scope.tuning()}
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
    scope = Scope(
        "toy", {10: 400, 20: 400}, ("SGD", "AdamW"), ("constant",), (1, 2), whole_grid=False, untuned=("SGD",)
    )
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
    slow = {name for name in UNFOLDED if CONTENDERS[name].slow}
    assert slow == {"SOAP", "BNP-SOAP", "K-FAC", "Shampoo"}
    assert cells == {(n, b) for n in UNFOLDED for b in (1, 16)} - {(n, 1) for n in (*slow, "BN + SGD", "BN + AdamW")}
    document = json.loads((RESULTS / "convergence_digits_quick.json").read_text())
    made = {json.dumps({k: v for k, v in run.items() if k not in ("key", "result")}) for run in document["runs"]}
    assert {json.dumps(run.describe()) for run in scope.tuning()} <= made
    assert len(made) == len(scope.tuning()) + len(cells) * len(scope.seeds)
    assert document["cpu_seconds"] < 360


def test_recurrent_nets_are_the_same_for_all_and_muon_takes_their_matrices() -> None:
    (scope,) = [s for s in PRESETS["short"].scopes if s.task == "sequential"]
    assert {CONTENDERS[n].norm for n in scope.contenders} == {"none", "ln"}
    assert set(UNFOLDED) - set(scope.contenders) == {
        "BN + SGD", "BN + AdamW", "GN + AdamW", "ON + SGD", "ON + AdamW", "K-FAC",
    }  # fmt: skip
    x = torch.rand(3, 784, generator=torch.Generator().manual_seed(0))
    nets = {}
    for norm in ("none", "ln"):
        torch.manual_seed(0)
        nets[norm] = TASKS["sequential"].build(norm)
    plain, normalized = nets["none"], nets["ln"]
    torch.testing.assert_close(plain.rnn.weight_hh_l0, normalized.rnn.weight_hh_l0)
    last = plain.rnn(x.view(3, 28, 28))[1][0][0]
    torch.testing.assert_close(plain(x), plain.head(last))
    torch.testing.assert_close(normalized(x), normalized.head(torch.nn.functional.layer_norm(last, (128,))))
    with pytest.raises(ValueError, match="norm is 'bn'"):
        TASKS["sequential"].build("bn")
    muon, rest = CONTENDERS["Muon"].make(plain, 0.01).param_groups
    assert [tuple(p.shape) for p in muon["params"]] == [(512, 28), (512, 128)]
    assert [tuple(p.shape) for p in rest["params"]] == [(512,), (512,), (10, 128), (10,)]
    assert (muon["lr"], rest["lr"]) == (pytest.approx(0.1), 0.01)


def _preset() -> Any:
    from benchmarks.evidence.plan import PRESETS

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
    preset = Preset("toy", (Scope("toy", {10: 100}, ("SGD", "BNP-SGD"), seeds=(1, 2), whole_grid=False),))
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
