"""Predict, then learn, sample by sample: neural nets, river's models, and the last value."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.evidence.contenders import Contender
from benchmarks.evidence.streams import Inputs, Stream, load
from benchmarks.workloads import mlp
from bnp_optim import fold_normalization

PROTOCOL = 2
BLOCKS = 50  # of which the mean error is kept
AFTER = ((1, 100), (101, 500))  # samples after an event, of which it is kept too
WIDTHS = (32, 32)


@dataclass(frozen=True)
class StreamRun:
    """An MLP 32-32 on a stream, in float32, cross-entropy or squared error, one step per sample.

    Args:
        fold: After so many samples, which are predicted and kept, express the initial weights in normalized
            coordinates (:func:`bnp_optim.fold_normalization`) and learn from them, in their order; 0: do not.
    """

    stream: str
    inputs: Inputs
    contender: Contender
    learning_rate: float
    seed: int
    samples: int
    fold: int = 0

    @cached_property
    def key(self) -> str:
        stream = load(self.stream, self.inputs, self.samples)
        content = hashlib.sha256(stream.x.round(6).tobytes() + stream.y.tobytes()).hexdigest()[:12]
        parts = (PROTOCOL, self.stream, self.inputs, content, self.contender.key, self.learning_rate, self.seed,
                 (self.fold, "then learned from", "in its units") if self.fold else 0, WIDTHS, torch.__version__,
                 *(() if stream.units is None else ("target scaled",)))  # fmt: skip
        return "s" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def describe(self) -> dict[str, Any]:
        """What a line of the results says of it."""
        return {
            "stream": self.stream, "inputs": self.inputs, "method": self.contender.name,
            "learning_rate": self.learning_rate, "seed": self.seed, "samples": self.samples, "fold": self.fold,
        }  # fmt: skip

    def execute(self, _: Path) -> dict[str, Any]:
        """Go through the stream once."""
        return train(self)


def train(run: StreamRun) -> dict[str, Any]:
    """The progressive error of a net; see :func:`score`."""
    stream = load(run.stream, run.inputs, run.samples)
    x = torch.from_numpy(stream.x).float()
    torch.manual_seed(run.seed)
    model = mlp((x.shape[1], *WIDTHS, stream.classes or 1), run.contender.norm)
    with run.contender.context():
        errors, seconds = _learn(run, model, x, stream)
    return score(errors, stream, seconds)


def _learn(run: StreamRun, model: nn.Module, x: torch.Tensor, stream: Stream) -> tuple[Any, float]:
    errors = np.full(len(x), np.nan)
    optimizer = None if run.fold else run.contender.make(model, run.learning_rate)
    start = time.process_time()

    def learn(loss: torch.Tensor) -> None:
        assert optimizer is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for i in range(len(x)):
        if i == run.fold and optimizer is None:
            fold_normalization(model, x[:i])
            optimizer = run.contender.make(model, run.learning_rate)
            for j in range(i):
                learn(_loss(stream, j, model(x[j : j + 1])))
        output = model(x[i : i + 1])
        if stream.classes:
            errors[i] = int(output.argmax()) != int(stream.y[i])
        else:
            errors[i] = abs(stream.gap(i, output.item()))
        loss = _loss(stream, i, output)
        if not math.isfinite(loss.item()):
            errors[i] = np.nan
            break
        if optimizer is not None:
            learn(loss)
    return errors, time.process_time() - start


def _loss(stream: Stream, i: int, output: torch.Tensor) -> torch.Tensor:
    if stream.classes:
        return F.cross_entropy(output, torch.tensor([int(stream.y[i])]))
    return F.mse_loss(output[:, 0], output.new_tensor([stream.target(i)]))


def score(errors: np.ndarray, stream: Stream, seconds: float) -> dict[str, Any]:
    """Mean error (a share of wrong answers, or the mean absolute error), and the means of BLOCKS blocks.

    From a prediction that is not finite on a model has diverged, and scores chance; no error of a regression counts
    for more than that either. After a stream's event also the mean errors of the samples AFTER it.
    """
    diverged = bool(np.isnan(errors).any())
    errors = np.minimum(np.where(np.isnan(errors), stream.chance, errors), max(stream.chance, 1.0))
    return {
        "error": round(float(errors.mean()), 6),
        "diverged": diverged,
        "seconds": round(seconds, 3),
        "blocks": [round(float(b.mean()), 5) for b in np.array_split(errors, BLOCKS)],
        **({"after": _after(errors, stream.event)} if stream.event else {}),
    }


def _after(errors: np.ndarray, event: int) -> list[float]:
    return [round(float(errors[event + first : event + last + 1].mean()), 5) for first, last in AFTER]


def _last(stream: Stream) -> np.ndarray:
    before = np.concatenate([[0], stream.y[:-1]])
    return (before != stream.y).astype(float) if stream.classes else np.abs(before - stream.y)


def _linear(stream: Stream) -> Any:
    from river import linear_model, preprocessing

    scaler = preprocessing.StandardScaler()
    if stream.classes == 0:
        return scaler | _in_units(stream, linear_model.LinearRegression())
    return scaler | (linear_model.LogisticRegression() if stream.classes == 2 else linear_model.SoftmaxRegression())


def _tree(stream: Stream) -> Any:
    from river import tree

    return tree.HoeffdingTreeClassifier() if stream.classes else _in_units(stream, tree.HoeffdingTreeRegressor())


def _in_units(stream: Stream, model: Any) -> Any:
    from river import preprocessing

    return model if stream.units is None else preprocessing.TargetStandardScaler(model)


def _of_river(make: Callable[[Stream], Any]) -> Callable[[Stream], np.ndarray]:
    def errors(stream: Stream) -> np.ndarray:
        model, found = make(stream), np.zeros(len(stream.x))
        for i, (row, target) in enumerate(zip(stream.x.tolist(), stream.y.tolist(), strict=True)):
            x = dict(enumerate(row))
            y = bool(target) if stream.classes == 2 else target
            guess = model.predict_one(x)
            found[i] = guess != y if stream.classes else abs(guess - y)
            model.learn_one(x, y)
        return found

    return errors


OTHERS: dict[str, Callable[[Stream], np.ndarray]] = {
    "last value": _last,
    "scaler + linear model": _of_river(_linear),
    "Hoeffding tree": _of_river(_tree),
}


@dataclass(frozen=True)
class OtherRun:
    """A model without a learning rate to choose, and without a seed, on raw inputs."""

    stream: str
    name: str
    samples: int

    @cached_property
    def key(self) -> str:
        stream = load(self.stream, "raw", self.samples)
        content = hashlib.sha256(stream.x.round(6).tobytes() + stream.y.tobytes()).hexdigest()[:12]
        parts = (PROTOCOL, self.stream, content, self.name, metadata.version("river"))
        return "o" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def describe(self) -> dict[str, Any]:
        """What a line of the results says of it."""
        return {"stream": self.stream, "inputs": "raw", "method": self.name, "samples": self.samples}

    def execute(self, _: Path) -> dict[str, Any]:
        """Go through the stream once."""
        stream = load(self.stream, "raw", self.samples)
        start = time.process_time()
        errors = OTHERS[self.name](stream)
        return score(errors, stream, time.process_time() - start)
