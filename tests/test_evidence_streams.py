"""Streams: predict, then learn; scores, scaling, shifts, and which rate is chosen."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw")
pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks.evidence import progressive, streaming_plan, streaming_report, streams
from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.progressive import OtherRun, StreamRun, score, train
from benchmarks.evidence.replicas import run_streams
from benchmarks.evidence.runner import Cache, run_all
from benchmarks.evidence.streaming_plan import all_runs, chosen_rates
from benchmarks.evidence.streams import Stream, load, scaled, shifted


def made_up(samples: int) -> Stream:
    x = np.random.default_rng(0).normal(size=(samples, 3)) * [1, 10, 100] + [0, 5, 50]
    return Stream(x, (x[:, 1] > 5).astype(int), 2)


@pytest.fixture(autouse=True)
def toy_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    load.cache_clear()
    monkeypatch.setitem(streams.STREAMS, "toy", made_up)
    monkeypatch.setitem(streams.SAMPLES, "toy", 400)


def toy(name: str = "BNP-SGD", rate: float = 0.1, fold: int = 0) -> StreamRun:
    return StreamRun("toy", "raw", CONTENDERS[name], rate, 0, 800, fold)


def test_scaling_is_the_running_one() -> None:
    x = made_up(50).x
    x[:, 2] = 7.0
    found = scaled(x)
    for t in (1, 20, 49):
        seen = x[: t + 1, :2]
        np.testing.assert_allclose(found[t, :2], (x[t, :2] - seen.mean(0)) / seen.std(0), rtol=1e-9)
    assert (found[:, 2] == 0).all() and (found[0] == 0).all()


def test_scaling_is_that_of_river() -> None:
    preprocessing = pytest.importorskip("river.preprocessing", reason="river is not installed")
    x = made_up(60).x
    x[:30, 0] = 1.0  # constant for a while
    scaler, rows = preprocessing.StandardScaler(), []
    for row in x:
        sample = dict(enumerate(row))
        scaler.learn_one(sample)
        rows.append(list(scaler.transform_one(sample).values()))
    np.testing.assert_allclose(scaled(x), np.array(rows), rtol=1e-8, atol=1e-10)


def test_scaling_of_targets_is_that_of_river() -> None:
    preprocessing = pytest.importorskip("river.preprocessing", reason="river is not installed")
    from river.base import Regressor

    class Recorder(Regressor):
        learned = 0.0

        def learn_one(self, x: dict[str, float], y: float) -> None:
            self.learned = y

        def predict_one(self, x: dict[str, float]) -> float:
            return 0.7

    regression = Stream(np.zeros((40, 1)), np.random.default_rng(0).normal(40, 3, 40), 0)
    stream, recorder = streams.with_scaled_target(regression), Recorder()
    model = preprocessing.TargetStandardScaler(recorder)
    for i, y in enumerate(stream.y):
        assert stream.gap(i, 0.7) == pytest.approx(model.predict_one({}) - y, rel=1e-9)
        model.learn_one({}, y)
        assert stream.target(i) == pytest.approx(recorder.learned, rel=1e-9)
    assert regression.target(3) == stream.y[3] and regression.gap(3, 41.0) == 41.0 - stream.y[3]


def test_a_shift_comes_in_the_middle_and_keeps_the_answers() -> None:
    before = made_up(100)
    after = shifted(before)
    np.testing.assert_array_equal(after.x[:50], before.x[:50])
    assert (after.x[50:] != before.x[50:]).all()
    np.testing.assert_array_equal(after.y, before.y)
    correlation = np.corrcoef(after.x[50:].T, before.x[50:].T)[:3, 3:]
    assert sorted(np.abs(correlation).argmax(1)) == [0, 1, 2] and np.abs(correlation).max(1).min() > 1 - 1e-9


def test_scores() -> None:
    stream = Stream(np.zeros((100, 1)), np.tile([3.0, -1.0], 50), 0)
    assert stream.chance == 2
    errors = np.full(100, 0.5)
    errors[10] = 1e9  # an outlier of a regression counts as a guess
    assert score(errors, stream, 0.0)["error"] == pytest.approx((99 * 0.5 + 2) / 100)
    errors[50:] = np.nan
    result = score(errors, stream, 0.0)
    assert result["diverged"] and result["error"] == pytest.approx((49 * 0.5 + 51 * 2) / 100)
    assert result["blocks"][0] == 0.5 and result["blocks"][-1] == 2


def test_predictions_come_before_learning() -> None:
    """At a rate of nothing the error is the initial net's; the first block of a good run is no better than a guess."""
    still = train(toy("SGD", 1e-30))
    assert 0.3 < still["error"] < 0.7
    learned = train(toy(fold=20))
    assert learned["error"] < 0.1 and not learned["diverged"] and learned["blocks"][0] > 0.2
    assert learned == {**train(toy(fold=20)), "seconds": learned["seconds"]}


def test_folding_helps_from_its_sample_on() -> None:
    assert train(toy(fold=20))["error"] < train(toy())["error"] - 0.2
    assert toy(fold=20).key != toy().key


def test_a_diverged_net_scores_as_a_guess() -> None:
    result = train(toy("SGD", 1e30))
    assert result["diverged"] and result["error"] == pytest.approx(0.5, abs=0.02)


def test_last_value() -> None:
    stream = Stream(np.zeros((4, 1)), np.array([0, 0, 1, 1]), 2)
    assert progressive._last(stream).tolist() == [0, 0, 1, 0]
    assert progressive._last(Stream(np.zeros((3, 1)), np.array([2.0, 5.0, 4.0]), 0)).tolist() == [2, 3, 1]


def test_rates_are_chosen_per_stream_and_for_all_streams() -> None:
    """Rates .001, .003, .01, …: the third is best on raw inputs, the fourth on scaled ones and second on raw."""
    counts = {"toy": 300}
    errors = {"raw": [0.5, 0.5, 0.1, 0.12, 0.5, 0.5, 0.5, 0.5], "scaled": [0.5, 0.5, 0.2, 0.1, 0.5, 0.5, 0.5, 0.5]}
    rates = CONTENDERS["SGD"].rates
    results = {
        run: {"error": errors[run.inputs][rates.index(run.learning_rate)]} for run in all_runs(counts, ["SGD"], [0])
    }
    chosen = chosen_rates(results, counts, ["SGD", "BNP-SGD"])
    assert chosen == {("SGD", "toy", "raw"): (0.01, 0.03, 0.01), ("SGD", "toy", "scaled"): (0.03, 0.03, 0.03)}


def test_the_report_says_what_is_there(tmp_path: Path) -> None:
    counts = {"toy": 60}
    cache = Cache(tmp_path / "cache")
    nets = ["SGD", "BNP-SGD"]
    runs = all_runs(counts, nets, (0, 1))
    results = run_streams(runs, cache)
    assert set(results) == set(runs) == set(cache.found(runs))
    run_all([OtherRun("toy", "last value", 60)], cache, tmp_path)
    text = streaming_report.write(counts, nets, (1, 2), cache, tmp_path, quick=False)
    assert "**Trimmed**: the full protocol has toy 400." in text
    assert "1 seeds" in text and (tmp_path / "streaming.png").stat().st_size > 1000
    errors = [results[run]["error"] for run in all_runs(counts, ["SGD"], [1]) if run.inputs == "raw"]
    row = next(line for line in text.splitlines() if line.startswith("| SGD | toy | raw |"))
    found = [float(v.strip(" †")) for v in row.split("|")[4:-1]]
    assert all(math.isclose(a, b, abs_tol=6e-4) for a, b in zip(found, errors, strict=True))


def test_a_curve_that_was_not_published_is_made_anew(tmp_path: Path) -> None:
    counts, nets = {"toy": 100}, ["SGD"]
    cache = Cache(tmp_path)
    found = run_streams(all_runs(counts, nets, (0, 1)), cache)
    assert streaming_plan.without_curve(found, counts, nets) == []
    one = chosen_rates(found, counts, nets)["SGD", "toy", "raw"].one
    bare = {run: {"error": r["error"]} if run.seed else r for run, r in found.items()}
    missing = streaming_plan.without_curve(bare, counts, nets)
    assert [(r.inputs, r.seed, r.learning_rate) for r in missing] == [("raw", 1, one), ("scaled", 1, one)]
    cache.forget(missing)
    assert set(found) - set(cache.found(found)) == set(missing)
