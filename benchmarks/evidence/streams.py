"""The streams: river's own data sets, one with an abrupt shift, two synthetic ones with drift, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any, Literal

import numpy as np

Inputs = Literal["raw", "scaled"]


@dataclass(frozen=True)
class Stream:
    """Samples in the order in which they come.

    Args:
        x: (samples, features), float64.
        y: Class indices, or numbers.
        classes: How many; 0 for a regression.
        units: Of a regression whose targets are standardized while they come, as river's TargetStandardScaler does it:
            (samples + 1, 2), mean and standard deviation of the targets before each sample, and after the last.
        event: The sample after which something is watched; 0: none.
    """

    x: np.ndarray
    y: np.ndarray
    classes: int
    units: np.ndarray | None = None
    event: int = 0

    def target(self, i: int) -> float:
        """What a net learns at sample i: the number, in units of the targets up to and with it if they are scaled."""
        if self.units is None:
            return float(self.y[i])
        mean, std = self.units[i + 1]
        return float((self.y[i] - mean) / std) if std else 0.0

    def gap(self, i: int, output: Any) -> Any:
        """How far ``output`` is from sample i's number, in the units of y: scaled back by what was known before it."""
        return output - self.y[i] if self.units is None else output * self.units[i, 1] + self.units[i, 0] - self.y[i]

    @property
    def chance(self) -> float:
        """What a diverged model scores: the error of guessing, or of saying 0."""
        return 1 - 1 / self.classes if self.classes else float(np.abs(self.y).mean())


def _arrays(samples: Iterable[tuple[dict[str, Any], Any]], count: int, *, regression: bool = False) -> Stream:
    rows, targets = [], []
    for x, y in islice(samples, count):
        rows.append([float(x[name]) for name in sorted(x)])
        targets.append(y)
    if regression:
        return Stream(np.array(rows), np.array(targets, dtype=float), 0)
    names = sorted(set(targets))
    return Stream(np.array(rows), np.array([names.index(y) for y in targets]), len(names))


def _of_river(name: str, count: int, *, regression: bool = False) -> Stream:
    from river import datasets

    return _arrays(getattr(datasets, name)(), count, regression=regression)


def shifted(stream: Stream, seed: int = 0) -> Stream:
    """From the middle on features change places and scales (by factors from 1/10 to 10) and move by a new offset."""
    rng = np.random.default_rng(seed)
    x, half = stream.x.copy(), len(stream.x) // 2
    scale = x[:half].std(0) + 1e-12
    order = rng.permutation(x.shape[1])
    x[half:] = (x[half:] * 10 ** rng.uniform(-1, 1, x.shape[1]) + scale * rng.normal(size=x.shape[1]))[:, order]
    return Stream(x, stream.y, stream.classes)


def with_scaled_target(stream: Stream) -> Stream:
    """The same numbers, standardized by the mean and the sample deviation of those that have come."""
    before = [stream.y[:n] for n in range(len(stream.y) + 1)]
    units = [(y.mean() if len(y) else 0.0, y.std(ddof=1) if len(y) > 1 else 0.0) for y in before]
    return replace(stream, units=np.array(units))


def absurd(stream: Stream, factor: float, *, wrong: bool) -> Stream:
    """At one third of the stream one sample times ``factor``, with its answer or a wrong one: the stream's event."""
    x, y, event = stream.x.copy(), stream.y.copy(), len(stream.x) // 3
    x[event] *= factor
    y[event] = (y[event] + wrong) % stream.classes
    return replace(stream, x=x, y=y, event=event)


def _agrawal(count: int) -> Stream:
    from river.datasets import synth

    drift = synth.ConceptDriftStream(
        synth.Agrawal(classification_function=0, seed=1), synth.Agrawal(classification_function=2, seed=2),
        position=count // 2, width=count // 20, seed=3,
    )  # fmt: skip
    return _arrays(drift, count)


def _sea(count: int) -> Stream:
    from river.datasets import synth

    drift = synth.ConceptDriftStream(
        synth.SEA(variant=0, noise=0.1, seed=1), synth.SEA(variant=3, noise=0.1, seed=2),
        position=count // 2, width=count // 20, seed=3,
    )  # fmt: skip
    return _arrays(drift, count)


STREAMS: dict[str, Callable[[int], Stream]] = {
    "ImageSegments": partial(_of_river, "ImageSegments"),
    "Phishing": partial(_of_river, "Phishing"),
    "Bananas": partial(_of_river, "Bananas"),
    "TrumpApproval": partial(_of_river, "TrumpApproval", regression=True),
    "TrumpApproval, target scaled": lambda count: with_scaled_target(
        _of_river("TrumpApproval", count, regression=True)
    ),
    "ImageSegments, shift": lambda count: shifted(_of_river("ImageSegments", count)),
    "Shuttle": partial(_of_river, "Shuttle"),
    "Agrawal, drift": _agrawal,
    "SEA, drift": _sea,
}
SAMPLES = {
    "ImageSegments": 2310,
    "Phishing": 1250,
    "Bananas": 5300,
    "TrumpApproval": 1001,
    "TrumpApproval, target scaled": 1001,
    "ImageSegments, shift": 2310,
    "Shuttle": 10_000,
    "Agrawal, drift": 5000,
    "SEA, drift": 5000,
}  # fmt: skip; Shuttle has 49,097, almost all of them easy


# (stream, factor, whether the answer is wrong); at a right answer the softmax of a huge sample has no gradient
ABSURD: dict[str, tuple[str, float, bool]] = {
    f"{name}, {label}": (name, factor, wrong)
    for name in ("ImageSegments", "Bananas")
    for label, factor, wrong in (
        ("as it is", 1, False),
        ("sample × 1000", 1e3, False),
        ("sample × 1000, wrong answer", 1e3, True),
    )
}


def samples_of(name: str) -> int:
    """Of a stream of STREAMS or ABSURD."""
    return SAMPLES[ABSURD[name][0] if name in ABSURD else name]


@cache
def load(name: str, inputs: Inputs, samples: int) -> Stream:
    """A stream, raw or as river's StandardScaler hands it on sample by sample (each sample counts before it goes).

    Drifts and shifts come in the middle of the ``samples``; what is absurd comes after scaling.
    """
    if name in ABSURD:
        source, factor, wrong = ABSURD[name]
        return absurd(load(source, inputs, samples), factor, wrong=wrong)
    stream = STREAMS[name](samples)
    return stream if inputs == "raw" else replace(stream, x=scaled(stream.x))


def scaled(x: np.ndarray) -> np.ndarray:
    """Running standardization, as river's StandardScaler does it: population variance, 0 while that is 0."""
    count = np.arange(1, len(x) + 1)[:, None]
    origin = x[0]  # sums about a sample of the stream, not about 0, keep their digits
    mean = np.cumsum(x - origin, 0) / count
    variance = np.maximum(np.cumsum((x - origin) ** 2, 0) / count - mean**2, 0)
    # below: what rounding leaves of a constant
    std = np.sqrt(np.where(variance > 1e-12 * (1 + mean**2), variance, 0))
    return np.divide(x - origin - mean, std, out=np.zeros_like(x), where=std > 0)
