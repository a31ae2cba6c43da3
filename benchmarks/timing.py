"""Interleaved timing of training steps, and the cost and the ratios that come of it.

In each round every method takes a block of steps, A B C A B C, so that what disturbs the machine disturbs all alike.
In rows of short steps the first step of a block is not counted: it finds the caches full of the others' tensors.
A method whose work repeats every ``period`` steps takes whole periods, and its cost per step is the mean over a
period: a median over its steps would not see the expensive one. The cost is the median over all periods; with
period 1 that is the median over all steps. Ratios are ratios of costs, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHORT_STEP = 0.02  # seconds; in rows of longer steps the first step of a block counts
RESAMPLES = 1000


class OutOfTimeError(BaseException):
    """A method has used up its time. Like KeyboardInterrupt no Exception: packages catch those and go on."""


@dataclass
class Contestant:
    """One method in a row.

    Args:
        step: Takes one training step; returns its seconds.
        period: Steps after which its work repeats.
        peer: Takes part in as many rounds as its time allows; all others take part in every round.
        rounds: Seconds of the counted steps, by round.
        spent: Seconds so far, warm-up included.
        taken: Steps so far.
        allowance: Seconds that the limit leaves out: what the base needs for as many steps as a peer must take.
        stopped: Whether the limit cut it off.
    """

    name: str
    step: Callable[[], float]
    period: int = 1
    peer: bool = False
    rounds: list[list[float]] = field(default_factory=list)
    spent: float = 0.0
    taken: int = 0
    allowance: float = 0.0
    stopped: bool = False
    estimate: float = math.nan

    @property
    def over(self) -> bool:
        """Whether it was cut off before its first counted block."""
        return self.stopped and not self.rounds

    def run(self, steps: int) -> list[float]:
        """Take that many steps, without garbage collection; returns their seconds."""
        seconds: list[float] = []
        start = time.perf_counter()
        gc.disable()
        try:
            for _ in range(steps):
                seconds.append(self.step())
                self.taken += 1
        finally:
            gc.enable()
            self.spent += time.perf_counter() - start
        return seconds


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        seconds: Time for each method, about; it gives the number of rounds, and a peer's share of them.
        min_rounds: Rounds at least, however long they take.
        max_rounds: Rounds at most.
        block: Seconds of a block of steps of the first contestant.
        limit: Seconds after which a peer is cut off, on top of what the base needs for one period and its warm-up.
        warm_up: Seconds of warm-up, after two steps.
    """

    seconds: float = 20.0
    min_rounds: int = 10
    max_rounds: int = 100
    block: float = 0.02
    limit: float = 60.0
    warm_up: float = 0.3


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the body after that time, at the next instruction of Python (main thread only)."""

    def ring(*_: Any) -> None:
        raise OutOfTimeError

    if seconds == math.inf:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interleave(
    contestants: Sequence[Contestant], plan: Plan, progress: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Warm up, then time ``contestants`` round by round; the first one sets the steps of a block.

    ``progress`` gets the share that is done. Returns the rounds, the counted steps of a block of the methods of
    period 1, and whether the first step of each block was dropped.
    """
    for i, contestant in enumerate(contestants):
        contestant.allowance = 0.0 if i == 0 else contestants[0].estimate * (contestant.period + 3)
        _warm_up(contestant, plan)
        progress(0.3 * (i + 1) / len(contestants))
    steady = [c.estimate for c in contestants if not c.peer]
    steps = max(1, math.ceil(plan.block / contestants[0].estimate))
    drop = contestants[0].estimate < SHORT_STEP
    fitting = int(plan.seconds / (max(steady) * (steps + drop)))
    rounds = max(plan.min_rounds, min(plan.max_rounds, fitting))
    for r in range(rounds):
        for contestant in contestants:
            # a peer joins when it is behind its share of time, so that its rounds spread over all of them
            if contestant.peer and contestant.rounds and contestant.spent > plan.seconds * (r + 1) / rounds:
                continue
            if not contestant.stopped:
                _block(contestant, math.ceil(steps / contestant.period) * contestant.period, drop, plan)
        gc.collect()
        progress(0.3 + 0.7 * (r + 1) / rounds)
    return {"rounds": rounds, "steps_per_block": steps, "first_step_dropped": drop}


def _warm_up(contestant: Contestant, plan: Plan) -> None:
    with _limited(contestant, plan):
        seconds = contestant.run(2)  # the first allocates states, builds eigenbases, compiles
        while sum(seconds[1:]) < plan.warm_up and len(seconds) < 50:
            seconds += contestant.run(1)
        contestant.estimate = statistics.median(seconds[1:])


def _block(contestant: Contestant, steps: int, drop: bool, plan: Plan) -> None:
    with _limited(contestant, plan):
        if contestant.peer and contestant.estimate * (steps + drop) > plan.seconds / 3:
            steps = contestant.period  # as little as possible of what is slow
        seconds = contestant.run(steps + drop)
        contestant.rounds.append(seconds[drop:])


@contextmanager
def _limited(contestant: Contestant, plan: Plan) -> Iterator[None]:
    """Cut a peer off at the limit; whole blocks that it has taken still count."""
    try:
        with alarm(plan.limit + contestant.allowance - contestant.spent if contestant.peer else math.inf):
            yield
    except OutOfTimeError:
        contestant.stopped = True


def costs(rounds: Sequence[Sequence[float]], period: int) -> np.ndarray:
    """Mean seconds per step of each whole period: rounds × periods."""
    return np.asarray(rounds, dtype=float).reshape(len(rounds), -1, period).mean(2)


def cost(rounds: Sequence[Sequence[float]], period: int) -> float:
    """Seconds of a step: the median, over all periods, of the mean over a period."""
    return float(np.median(costs(rounds, period)))


def ratio(ours: Contestant, base: Contestant, *, seed: int = 0) -> dict[str, float | None]:
    """Cost of ``ours`` over cost of ``base``, with the bootstrap's central 95 % over rounds, in "low" and "high".

    Rounds that both took part in are resampled together. A peer with fewer rounds is resampled on its own; with
    only one round there is no interval (None). "paired" is the median over rounds of the ratio within a round: it
    leaves the same ratio standing where the machine was slower for a part of the run, and None for a peer.
    """
    mine, theirs = costs(ours.rounds, ours.period), costs(base.rounds, base.period)
    value = float(np.median(mine) / np.median(theirs))
    if len(mine) < 2 or len(theirs) < 2:
        return {"ratio": value, "low": None, "high": None, "paired": None}
    generator = np.random.default_rng(seed)
    pick = generator.integers(len(mine), size=(RESAMPLES, len(mine)))
    other = pick if len(theirs) == len(mine) else generator.integers(len(theirs), size=(RESAMPLES, len(theirs)))
    values = _medians(mine[pick]) / _medians(theirs[other])
    low, high = np.percentile(values, [2.5, 97.5])
    paired = None
    if len(mine) == len(theirs):
        paired = float(np.median(np.median(mine, axis=1) / np.median(theirs, axis=1)))
    return {"ratio": value, "low": float(low), "high": float(high), "paired": paired}


def _medians(resamples: np.ndarray) -> np.ndarray:
    return np.median(resamples.reshape(len(resamples), -1), axis=1)


def summary(contestant: Contestant) -> dict[str, Any]:
    """Milliseconds of a step: cost, mean, quartiles of the steps, and the cost by round."""
    steps = 1e3 * np.ravel(contestant.rounds)
    return {
        "step_ms": 1e3 * cost(contestant.rounds, contestant.period),
        "mean_ms": float(steps.mean()),
        "quartiles_ms": [float(q) for q in np.percentile(steps, [25, 50, 75])],
        "rounds": len(contestant.rounds),
        "steps": len(steps),
        "by_round_ms": [1e3 * float(np.median(c)) for c in costs(contestant.rounds, contestant.period)],
    }
