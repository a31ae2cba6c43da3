"""Ablations: what is left out, absurd samples, and what is run again on other seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks.evidence import confirm, recovery, streams
from benchmarks.evidence.contenders import CONTENDERS, bnp
from benchmarks.evidence.progressive import score
from benchmarks.evidence.question import Question, StreamQuestion
from benchmarks.evidence.questions import QUESTIONS
from benchmarks.evidence.streams import Stream, load, scaled
from benchmarks.workloads import mlp


@pytest.fixture(autouse=True)
def toy_stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    x = np.random.default_rng(0).normal(size=(900, 3)) * [1, 10, 100]
    monkeypatch.setitem(streams.STREAMS, "toy", lambda n: Stream(x[:n], (x[:n, 1] > 0).astype(int), 2))
    monkeypatch.setitem(streams.SAMPLES, "toy", 900)
    for name, (factor, wrong) in {"as it is": (1, False), "× 1000": (1e3, False), "wrong": (1e3, True)}.items():
        monkeypatch.setitem(streams.ABSURD, f"toy, {name}", ("toy", factor, wrong))
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.mark.parametrize(
    ("variant", "inside"),
    [
        ("", ["fc1", "fc2", "fc3", "head"]),
        ("without the first", ["fc2", "fc3", "head"]),
        ("without the last", ["fc1", "fc2", "fc3"]),
        ("without both", ["fc2", "fc3"]),
        ("first only", ["fc1"]),
    ],
)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_what_a_variant_leaves_out(variant: str, inside: list[str], base: str) -> None:
    optimizer: Any = bnp("", base, variant).make(mlp((5, 4, 4, 4, 2), "none"), 0.1)
    assert sorted(optimizer.coverage().preconditioned) == sorted(f"{n}.{p}" for n in inside for p in ("weight", "bias"))


def test_one_sample_is_absurd_after_scaling() -> None:
    calm = load("toy, as it is", "scaled", 900)
    np.testing.assert_array_equal(calm.x, scaled(streams.STREAMS["toy"](900).x))
    right, wrong = (load(f"toy, {n}", "scaled", 900) for n in ("× 1000", "wrong"))
    assert calm.event == right.event == wrong.event == 300 and load("toy", "scaled", 900).event == 0
    for stream in (right, wrong):
        np.testing.assert_array_equal(np.delete(stream.x, 300, 0), np.delete(calm.x, 300, 0))
        np.testing.assert_allclose(stream.x[300], 1000 * calm.x[300])
    np.testing.assert_array_equal(right.y, calm.y)
    assert (wrong.y != calm.y).nonzero()[0].tolist() == [300] and wrong.y[300] == 1 - calm.y[300]
    assert streams.samples_of("toy, × 1000") == 900


def test_errors_after_an_event_are_kept() -> None:
    errors = np.zeros(900)
    errors[300] = 1  # the absurd sample itself does not count
    errors[301:311] = 1
    errors[500:600] = 1
    assert score(errors, load("toy, × 1000", "scaled", 900), 0.0)["after"] == [0.1, 0.25]
    assert "after" not in score(errors, load("toy", "scaled", 900), 0.0)


def test_the_table_of_recoveries_takes_the_rate_of_the_calm_stream() -> None:
    places = tuple((f"toy, {n}", "scaled") for n in ("as it is", "× 1000"))
    question = StreamQuestion("q", "Q?", {"SGD": (CONTENDERS["SGD"], 0)}, places)  # type: ignore[arg-type]
    results = {}
    for run in question.runs("full", (0, 1)):
        calm = run.stream.endswith("as it is")
        best = run.learning_rate == (0.03 if calm else 0.1)  # the absurd stream's own best rate is not asked for
        after = [0.2 + 0.1 * run.seed, 0.1] if calm else [0.5, 0.4]
        dead = not calm and run.seed == 1 and run.learning_rate == 0.03
        results[run] = {"error": 0.1 if best else 0.3, "after": after, "diverged": dead}
    assert "| SGD | 0.03 | .250, .100 | .500, .400 †1 |" in list(recovery.table(question, (0, 1), results))


def grids(best: float, others: float) -> confirm.Grids:
    """Of the variant; the default has .8 at rate .1 and .5 elsewhere."""
    rates = CONTENDERS["SGD"].rates
    default = dict.fromkeys(rates, 0.5) | {0.1: 0.8}
    return {("toy", "new", 10): dict.fromkeys(rates, others) | {0.3: best}, ("toy", "old", 10): default}


QUESTION = Question("q", "Q?", {"new": bnp("new", "sgd"), "old": CONTENDERS["SGD"]}, {"toy": {10: 400}}, {"new": "old"})


@pytest.mark.parametrize(
    ("best", "others", "again"), [(0.806, 0.5, True), (0.803, 0.5, False), (0.79, 0.53, True), (0.79, 0.51, False)]
)
def test_what_looks_better_is_run_again(best: float, others: float, again: bool) -> None:
    found = list(confirm.pairs(QUESTION, grids(best, others)))
    assert [(p.variant, p.default, p.rates) for p in found] == [("new", "old", (0.3, 0.1))] * again
    runs = confirm.runs(QUESTION, "short", grids(best, others))
    assert [(r.contender.name, r.learning_rate, r.seed) for r in runs] == [
        (name, rate, seed) for seed in (1, 2, 3) for name, rate in (("new", 0.3), ("SGD", 0.1))
    ] * again


def test_differences_are_paired() -> None:
    before = grids(0.806, 0.5)
    new = {1: 0.82, 2: 0.74, 3: 0.93}
    old = {1: 0.80, 2: 0.73, 3: 0.90}
    results = {
        run: {"accuracy": (new if run.contender.name == "new" else old)[run.seed]}
        for run in confirm.runs(QUESTION, "short", before)
    }
    rows = list(confirm.table(QUESTION, "short", before, results))
    assert "| new (0.3) | old (0.1) | toy, 10 | +.020 ± .006 |" in rows  # of .02, .01 and .03
    assert list(confirm.table(QUESTION, "short", before, {})) == []


def test_every_variant_varies_a_contender_of_its_base() -> None:
    for question in QUESTIONS.values():
        for variant, default in getattr(question, "against", {}).items():
            contenders = question.contenders
            assert contenders[variant].base == contenders[default].base  # type: ignore[union-attr]
            assert contenders[variant] != contenders[default]
