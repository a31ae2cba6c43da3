"""The overhead benchmark's arithmetic on made-up timings, and what it counts as memory."""

from __future__ import annotations

import gc
import math
import time
from typing import Any

import pytest
import torch

pytest.importorskip("numpy", reason="the benchmarks compute with it")

from benchmarks import timing
from benchmarks.memory import highest, peak_bytes
from benchmarks.targets import added_ms, evaluate
from benchmarks.timing import Contestant, OutOfTimeError, Plan, alarm, cost, interleave, ratio, summary

# Timing


def contestant(name: str, rounds: list[list[float]], period: int = 1) -> Contestant:
    return Contestant(name, lambda: 0.0, period, rounds=rounds)


def test_the_cost_of_a_step_holds_the_expensive_one_of_each_period() -> None:
    steps = [[1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 11.0], [1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 101.0]]
    assert cost(steps, period=4) == pytest.approx((3.0 + 3.5) / 2)  # means 3, 3.5, 3, 26
    assert cost(steps, period=1) == 1.0  # which is why the period counts
    told = summary(contestant("x", steps, period=4))
    assert told["step_ms"] == pytest.approx(3250.0)
    assert told["mean_ms"] == pytest.approx(1e3 * (26 + 116) / 16)
    assert (told["rounds"], told["steps"]) == (2, 16)


def test_a_ratio_is_one_of_medians_with_an_interval_over_rounds() -> None:
    base = contestant("base", [[1.0, 1.0, 50.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    ours = contestant("ours", [[1.5, 1.5, 75.0], [3.0, 3.0, 3.0], [6.0, 6.0, 6.0]])
    found = ratio(ours, base)
    assert found["ratio"] == pytest.approx(1.5)
    # rounds are resampled together: whatever is drawn, a round of ours meets the same round of the base
    assert found["low"] == pytest.approx(1.5)
    assert found["high"] == pytest.approx(1.5)
    assert found["paired"] == pytest.approx(1.5)
    alone = ratio(contestant("peer", [[4.0, 4.0], [8.0, 8.0]]), base)  # fewer rounds: on its own
    assert alone["ratio"] == pytest.approx(3.0)
    assert alone["low"] is not None and alone["low"] < 2.0
    assert alone["paired"] is None
    once = ratio(contestant("peer", [[4.0]]), base)
    assert once == {"ratio": pytest.approx(2.0), "low": None, "high": None, "paired": None}


def test_a_machine_that_slows_down_leaves_the_paired_ratio() -> None:
    base = contestant("base", [[1.0], [1.0], [2.0], [2.0], [2.0]])
    ours = contestant("ours", [[1.2], [1.2], [1.2], [2.4], [2.4]])  # the slow time began within a round
    found = ratio(ours, base)
    assert found["ratio"] == pytest.approx(0.6)
    assert found["paired"] == pytest.approx(1.2)


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test has many more objects than a measuring process: a collection takes long."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


class FakeClock:
    """Steps that take the seconds they say, without anybody waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def contestant(self, name: str, seconds: float, **options: Any) -> Contestant:
        def step() -> float:
            self.now += seconds
            self.order.append(name)
            return seconds

        return Contestant(name, step, **options)


@pytest.mark.usefixtures("no_collection")
def test_methods_take_turns_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    a, b, c = clock.contestant("a", 1.0), clock.contestant("b", 2.0), clock.contestant("c", 1.0, period=2)
    protocol = interleave(
        [a, b, c], Plan(seconds=24.0, min_rounds=3, max_rounds=4, block=3.0, limit=math.inf, warm_up=0.5)
    )
    assert protocol == {"rounds": 4, "steps_per_block": 3, "first_step_dropped": False}
    warm_up, timed = clock.order[:6], clock.order[6:]
    assert warm_up == ["a", "a", "b", "b", "c", "c"]
    assert timed == (["a"] * 3 + ["b"] * 3 + ["c"] * 4) * 4  # c takes whole periods
    assert b.rounds == [[2.0] * 3] * 4


@pytest.mark.usefixtures("no_collection")
def test_the_first_of_short_steps_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    a = clock.contestant("a", 0.001)
    assert interleave([a], Plan(seconds=1.0, min_rounds=3, max_rounds=3, block=0.005))["first_step_dropped"]
    assert [len(r) for r in a.rounds] == [5, 5, 5]
    assert clock.order[-18:] == ["a"] * 18


@pytest.mark.usefixtures("no_collection")
def test_a_peer_takes_its_share_of_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr(timing, "alarm", lambda seconds: timing.contextmanager(lambda: iter([None]))())
    base, peer = clock.contestant("base", 1.0), clock.contestant("peer", 5.0, peer=True)
    interleave([base, peer], Plan(seconds=40.0, max_rounds=40, block=1.0, limit=math.inf))
    assert len(base.rounds) == 40
    # 10 s of warm-up count: a round when 10 + 5 k is at most the share of 40 s that has gone by
    assert len(peer.rounds) == 7
    turns = [i for i, name in enumerate(n for n in clock.order[4:]) if name == "peer"]
    assert turns[-1] > 30  # spread over the rounds, not all at the beginning


@pytest.mark.usefixtures("no_collection")
def test_a_peer_that_is_too_slow_is_cut_off() -> None:
    def forever() -> float:
        try:
            time.sleep(0.4)
        except Exception:  # as packages do: they must not catch it
            pytest.fail("the alarm was caught")
        return 0.4

    def quick() -> float:
        time.sleep(1e-3)
        return 1e-3

    base, peer = Contestant("base", quick), Contestant("peer", forever, peer=True)
    interleave([base, peer], Plan(seconds=0.1, min_rounds=3, max_rounds=3, block=1e-3, limit=0.1, warm_up=0.0))
    assert peer.over and peer.rounds == [] and peer.taken == 0
    assert len(base.rounds) == 3
    with pytest.raises(OutOfTimeError), alarm(0.01):
        time.sleep(1.0)


# Memory


def test_the_peak_counts_what_lives_before_the_step() -> None:
    changes = [(1, 100), (2, -40), (10, 30), (11, 30), (12, -50), (13, 20), (30, 999)]
    assert highest(changes, start=10, end=20) == 60 + 60
    assert highest(reversed(changes), start=12, end=20) == 120  # at its very start


class OneLayer:
    """A layer of n × n without bias, its momentum and a batch of b: the sizes are known."""

    def __init__(self, n: int, b: int) -> None:
        self.layer = torch.nn.Linear(n, n, bias=False)
        self.x = torch.randn(b, n)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1, momentum=0.9)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.layer(self.x).sum().backward()
        self.optimizer.step()


def test_peak_memory_of_a_known_net() -> None:
    n, b = 512, 64
    # at the end of backward: weight, momentum, gradient; input, output's expanded gradient aside, output
    by_hand = 4 * (3 * n * n + b * n)
    found = peak_bytes(lambda: OneLayer(n, b), 3)
    assert by_hand <= found <= 1.05 * by_hand
    with pytest.raises(ValueError, match="must be at least 3"):
        peak_bytes(lambda: OneLayer(n, b), 2)


def test_peak_memory_sees_a_copy_of_the_weights() -> None:
    class Copies(OneLayer):
        def step(self) -> None:
            super().step()
            copy = self.layer.weight.detach().clone()
            del copy

    n, b = 512, 8
    plain, copies = (peak_bytes(lambda kind=kind: kind(n, b), 3) for kind in (OneLayer, Copies))
    assert copies - plain == pytest.approx(4 * n * n, rel=0.03)


def test_what_dies_late_is_not_released_in_the_next_measurement() -> None:
    class Cyclic(OneLayer):
        def __init__(self, n: int, b: int) -> None:
            super().__init__(n, b)
            self.me = self

    first, second = (peak_bytes(lambda: Cyclic(512, 8), 3) for _ in range(2))
    assert first == second


# Targets


def row(name: str = "mlp-1024:60", **methods: dict[str, Any]) -> dict[str, Any]:
    workload, batch_size = name.split(":")
    return {"row": name, "workload": workload, "batch_size": int(batch_size), "methods": methods}


def timed(ms: float, value: float = 1.0, base: str = "sgd", **more: Any) -> dict[str, Any]:
    return {"step_ms": ms, "base": base, "ratio": value, "low": value, "high": value, "paired": value, **more}


def test_speed_targets_are_met_or_missed() -> None:
    def verdicts(name: str, value: float) -> list[tuple[str, float, bool]]:
        found = evaluate([row(name, sgd=timed(10.0), **{"bnp-sgd": timed(10 * value, value)})])
        return [(t["kind"], t["limit"], t["met"]) for t in found]

    assert verdicts("mlp-1024:60", 1.05) == [("speed", 1.05, True)]
    assert verdicts("mlp-1024:60", 1.051) == [("speed", 1.05, False)]
    assert verdicts("mlp-1024:1", 1.25) == [("speed", 1.25, True)]
    assert verdicts("mlp-64:1", 1.49) == [("speed", 1.5, True)]
    assert verdicts("cnn:2", 3.0) == []  # nothing is promised there


def test_added_milliseconds_against_rivals() -> None:
    found = evaluate(
        [
            row(
                "cnn:2",
                sgd=timed(10.0),
                bn=timed(11.0),
                kfac=timed(13.0),
                muon={"skipped": "no matrices"},
                soap={"over_s": 60.0, "steps_taken": 2},
                shampoo={"over_s": 0.1, "steps_taken": 9},
                **{"bnp-sgd": timed(12.0)},
            )
        ]
    )
    assert {t["against"]: (t["value"], t["limit"], t["met"]) for t in found} == {
        "bn": (2.0, 1.0, False),
        "kfac": (2.0, 3.0, True),
        "soap": (2.0, 20e3 - 10.0, True),  # cut off in the third step: 20 s each at least
        "shampoo": (2.0, 0.0, None),  # 10 ms each at least: that decides nothing
    }
    assert added_ms(row(sgd=timed(10.0)), "bn") is None


def test_memory_targets_by_form() -> None:
    results = {
        "sgd": timed(1.0, peak_bytes=1000),
        "adamw": timed(1.0, peak_bytes=1000),
        "bnp-sgd": timed(1.0, peak_bytes=1030, memory_ratio=1.03, preconditioned_bytes=200),
        "bnp-adamw": timed(1.0, 1.0, "adamw", peak_bytes=1210, memory_ratio=1.21, preconditioned_bytes=200),
    }
    found = {t["method"]: t for t in evaluate([row("cnn:2", **results)]) if t["kind"] == "memory"}
    assert (found["bnp-sgd"]["limit"], found["bnp-sgd"]["met"]) == (1.02, False)
    assert (found["bnp-adamw"]["limit"], found["bnp-adamw"]["met"]) == (pytest.approx(1.22), True)
