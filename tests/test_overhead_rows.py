"""The overhead benchmark's nets, methods, rows and command line."""

from __future__ import annotations

import gc
import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks import methods, overhead, rows
from benchmarks.methods import METHODS, Training, hidden_matrices, why_not
from benchmarks.phases import PHASES, PhasedStep, profile
from benchmarks.rows import WORKLOADS, Row, measure
from benchmarks.timing import Plan

BRIEF = Plan(seconds=0.02, min_rounds=3, max_rounds=3, block=1e-4, warm_up=0.0)
OLD = torch.__version__.startswith("2.6.")


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test has many more objects than a measuring process: a collection takes long."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


# Nets and methods


@pytest.mark.parametrize(
    ("name", "norm", "count"),
    [
        ("mlp-64", "none", 4 * (64 * 64 + 64) + 650),
        ("mlp-1024", "none", 785 * 1024 + 2 * 1025 * 1024 + 1025 * 10),
        ("cnn", "none", 448 + 2320 + 4640 + 9248 + 18496 + 650),
        ("cnn", "bn", 432 + 2304 + 4608 + 9216 + 18432 + 650 + 2 * 160),
        ("resnet18", "none", 11_169_162),
        ("resnet18", "bn", 11_173_962),
        ("gpt-block", "none", 7_087_872),
        ("resnet50", "bn", 25_557_032),
        ("resnet50", "none", 25_557_032 - 26_560),
        ("vit-b", "none", 86_567_656),
        ("gpt2-124m", "none", 124_439_808),
    ],
)
def test_parameter_counts(name: str, norm: Any, count: int) -> None:
    with torch.device("meta"):
        net = WORKLOADS[name].build(norm)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("name", ["vit-b", "gpt2-124m", "resnet50", "resnet18", "gpt-block", "cnn"])
def test_nets_and_losses_fit_together(name: str) -> None:
    with torch.device("meta"):
        x, y = WORKLOADS[name].data(2)
        for norm in WORKLOADS[name].norms:
            assert WORKLOADS[name].loss(WORKLOADS[name].build(norm)(x), y).shape == ()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("workload", ["mlp-64", "cnn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the peers' packages
def test_each_method_steps(name: str, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "LEARNING_RATE", 1e-2)  # the benchmark's own moves less than float32 can show
    method, work = METHODS[name], WORKLOADS[workload]
    if name.endswith("-compiled") and OLD:
        pytest.skip("the compiler of torch 2.6 warns of itself")
    if method.package is not None:
        pytest.importorskip(method.package, reason="a peer, in the extra 'benchmarks'")
    reason = why_not(method, work, 2)
    if reason is not None:
        assert name == "muon"
        pytest.skip(reason)
    training = Training(work, 2, method)
    before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
    for _ in range(method.period + 1):  # some do nothing before their first expensive step
        training.step()
    still = [n for n, p in training.model.named_parameters() if p.equal(before[n])]
    assert still == []
    assert training.finite()
    size = training.preconditioned_bytes()
    assert size == (sum(p.nbytes for p in training.model.parameters()) if name.startswith("bnp-") else None)


def test_methods_share_net_and_inputs() -> None:
    one, other = (Training(WORKLOADS["mlp-64"], 4, METHODS[name]) for name in ("sgd", "bnp-adamw"))
    assert all(p.equal(q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert len(one.batches) == 16
    assert all(x.equal(u) and y.equal(v) for (x, y), (u, v) in zip(one.batches, other.batches, strict=True))
    assert one.forward().equal(other.forward())


def test_reasons_not_to_run() -> None:
    cnn, mlp, block = WORKLOADS["cnn"], WORKLOADS["mlp-64"], WORKLOADS["gpt-block"]
    assert why_not(METHODS["bn"], mlp, 1) == "impossible at batch size 1"
    assert why_not(METHODS["bn"], mlp, 2) is None
    assert why_not(METHODS["ln"], block, 8) == "the net has LayerNorm already"
    assert hidden_matrices(cnn.build("none")) == []
    assert len(hidden_matrices(mlp.build("none"))) == 4
    assert len(hidden_matrices(block.build("none"))) == 4


@pytest.mark.usefixtures("no_collection")
def test_phases_add_up_to_the_step() -> None:
    step = PhasedStep(Training(WORKLOADS["mlp-64"], 4, METHODS["bnp-sgd"]))
    seconds = [step() for _ in range(3)]
    assert [sum(phases) for phases in step.samples] == pytest.approx(seconds)
    assert all(len(phases) == len(PHASES) and min(phases) >= 0 for phases in step.samples)
    assert step.samples[-1][list(PHASES).index("base")] > 0  # the wrapper called the base's step
    result = profile(WORKLOADS["mlp-64"], 4, "bnp-adamw", BRIEF)
    assert list(result) == [*PHASES, "all"]
    assert result["after"]["base_us"] == 0.0


# A row, from end to end


@pytest.mark.usefixtures("no_collection")
def test_a_row_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("sgd", "bnp-sgd", "bn", "adamw", "bnp-adamw")
    small = Row("mlp-64", 1, names, BRIEF, ("bnp-sgd",))
    result = measure(small)
    assert result["methods"]["bn"] == {"skipped": "impossible at batch size 1"}
    assert result["methods"]["sgd"]["ratio"] == 1.0
    assert result["methods"]["bnp-adamw"]["base"] == "adamw"
    ours, base = result["methods"]["bnp-sgd"], result["methods"]["sgd"]
    assert ours["ratio"] == pytest.approx(ours["step_ms"] / base["step_ms"])
    assert ours["memory_ratio"] == ours["peak_bytes"] / base["peak_bytes"] > 1

    rows.keep(small, result, tmp_path)
    assert rows.kept(small, tmp_path) == json.loads(json.dumps(result))
    assert rows.kept(Row("mlp-64", 1, names, BRIEF, ("bnp-sgd",), sources="others"), tmp_path) is None

    monkeypatch.setattr(overhead, "run_all", lambda *_: [result])
    overhead.main(["--quick", "--workloads", "mlp-64:1", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "overhead_quick_part.json").read_text())
    assert written["rows"][0]["methods"]["bnp-sgd"]["ratio"] == pytest.approx(ours["ratio"], rel=1e-4)
    assert {t["kind"] for t in written["targets"]} == {"speed", "memory"}
    assert "| mlp-64:1 | bnp-sgd / sgd | 1.50 |" in (tmp_path / "overhead_quick_part.md").read_text()
    assert (tmp_path / "overhead_quick_part.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_row_in_a_process_of_its_own() -> None:
    shares: list[float] = []
    result = rows.measure_apart(Row("mlp-64", 2, ("sgd", "bn"), BRIEF), shares.append)
    assert result["methods"]["bn"]["ratio"] > 0
    assert shares == sorted(shares) and shares[-1] == 1.0
    with pytest.raises(RuntimeError, match="mlp-64:1: the measuring process ended without a result"):
        rows.measure_apart(Row("mlp-64", 1, ("nobody",), BRIEF), shares.append)


def test_bases_come_along_and_rows_are_picked() -> None:
    parsed = {"methods": ["bnp-adamw"], "workloads": [("cnn", 2)], "device": "cpu", "quick": False}
    (picked,) = overhead.pick_rows(Namespace(**parsed, seconds=1.0, limit=1.0, threads=1), "a machine")
    assert (picked.name, picked.methods, picked.profiled) == ("cnn:2", ("adamw", "bnp-adamw"), ("bnp-adamw",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "adam"], "no method 'adam'; there are sgd, bnp-sgd"),
        (["--workloads", "mlp-64:x"], "no workload 'mlp-64:x'; write one of mlp-64"),
        (["--limit", "0"], "--limit is 0.0, it must be above 0"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.skipif(OLD, reason="the compiler of torch 2.6 has other settings")
def test_compiled_nets_of_a_process_keep_their_own_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = torch._dynamo.config
    before = {key: getattr(settings, key) for key in ("skip_nnmodule_hook_guards", "recompile_limit")}
    torch._dynamo.reset()
    with settings.patch(before):  # puts them back afterwards
        for name in ("sgd", "bnp-sgd"):
            training = Training(WORKLOADS["mlp-64"], 4, METHODS[name], compiled=True)
            training.step()
            training.step()
    torch._dynamo.reset()
    (wrapper,) = training.optimizers
    assert {int(layer.count) for layer in wrapper.statistics.values()} == {8}  # type: ignore[attr-defined]
