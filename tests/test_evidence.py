"""The evidence engine: runs, what they start from, their keys and their cache."""

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
from benchmarks.evidence import contenders, engine
from benchmarks.evidence.contenders import CONTENDERS, PEERS, Contender, CovarianceRate, bnp, fingerprint, started
from benchmarks.evidence.engine import Run, train
from benchmarks.evidence.plan import PRESETS
from benchmarks.evidence.runner import Cache, published, run_all
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.variants import he_start
from benchmarks.workloads import cnn, mlp
from bnp_optim import BNPreconditioner
from tests.evidence_toy import TOY, split, toy


@pytest.fixture(autouse=True)
def toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", TOY)


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if c.base not in contenders.PACKAGES])
def test_every_contender_learns_the_toy(name: str) -> None:
    run = toy(name, {"sgd": 0.1, "momentum": 0.03}.get(CONTENDERS[name].base, 0.01))
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


def test_he_start_is_for_relus_and_for_convolutions_alone() -> None:
    for norm in ("none", "bn"):
        torch.manual_seed(0)
        net = he_start(cnn(norm))
        weight, bias = net.conv5.weight, net.conv5.bias
        assert weight.var().item() == pytest.approx(2 / (32 * 9), rel=0.05)
        assert bias is None if norm == "bn" else not bias.any()
        assert net.head.weight.abs().max() <= 1 / 8  # PyTorch's: uniform in ± 1/√64


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


@pytest.mark.parametrize("name", ["momentum, g clipped", "BN + SGD, g clipped"])
def test_what_is_g_clipped_steps_by_clipped_gradients(name: str) -> None:
    torch.manual_seed(0)
    contender, x = CONTENDERS[name], 50 * torch.randn(8, 5)
    model = mlp((5, 4, 3), contender.norm)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = contender.make(model, 0.1)
    torch.nn.functional.cross_entropy(100 * model(x), torch.arange(8) % 3).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 10
    optimizer.step()
    for p, start, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.1 * g / norm, rtol=1e-4, atol=1e-6)


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


def test_recurrent_nets_are_the_same_for_all_and_muon_takes_their_matrices() -> None:
    (scope,) = [s for s in PRESETS["short"].scopes if s.task == "sequential"]
    assert {CONTENDERS[n].norm for n in scope.contenders} == {"none", "ln"}
    assert set(PEERS) - set(scope.contenders) == {
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
