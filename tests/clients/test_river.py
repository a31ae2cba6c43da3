"""river's streams, scalers and metrics around a plain loop at batch size 1: predict, then learn."""

from __future__ import annotations

import functools
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import count

river = pytest.importorskip("river", reason="river is not installed")
from river import datasets, metrics, preprocessing  # noqa: E402

SAMPLES, DECAY = 1000, 0.99
BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


@functools.cache
def segments(scale: bool) -> list[tuple[Tensor, str]]:
    """Of river's ImageSegments: 18 features, seven classes, shuffled; scaled as they come by, or raw."""
    scaler = preprocessing.StandardScaler()
    samples = []
    for features, label in islice(river.stream.shuffle(datasets.ImageSegments(), buffer_size=500, seed=1), SAMPLES):
        if scale:
            scaler.learn_one(features)
            features = scaler.transform_one(features)
        row = [features[name] for name in sorted(features)]
        samples.append((torch.tensor([row], dtype=torch.float32), label))
    return samples


def learn(base: str, samples: list[tuple[Tensor, str]], *, wrap: bool = True) -> tuple[float, Any]:
    """Progressive accuracy and the optimizer; classes get a number when they first come up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 32), nn.ReLU(), nn.Linear(32, 7))
    optimizer: Any = BASES[base](model.parameters())
    if wrap:
        optimizer = BNPreconditioner(optimizer, model, stat_decay=DECAY)
    accuracy = metrics.Accuracy()
    classes: dict[str, int] = {}
    for x, label in samples:
        y = torch.tensor([classes.setdefault(label, len(classes))])
        output = model(x)
        accuracy.update(int(y), int(output.argmax()))
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
    return accuracy.get(), optimizer


@pytest.mark.parametrize("base", BASES)
def test_statistics_are_the_exponentially_weighted_ones_of_the_stream(base: str) -> None:
    """μ and σ² of all samples, the k-th last with the weight ρᵏ; the raw features differ by thousands in scale."""
    data = segments(False)[:400]
    _, optimizer = learn(base, data)
    samples = torch.cat([x for x, _ in data]).double().numpy()
    weight = DECAY ** np.arange(len(data) - 1, -1, -1)[:, None]
    mean = (weight * samples).sum(0) / weight.sum()
    variance = (weight * (samples - mean) ** 2).sum(0) / weight.sum()
    found = optimizer.statistics["0"]
    assert count(optimizer) == len(data)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.variance.numpy(), variance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_it_learns_the_stream(base: str) -> None:
    """At a rate at which plain SGD does not, by far; a class in seven is chance."""
    accuracy, optimizer = learn(base, segments(True))
    assert accuracy > 0.75, accuracy
    assert count(optimizer) == SAMPLES
    if base == "SGD":
        assert learn(base, segments(True), wrap=False)[0] < 0.6
