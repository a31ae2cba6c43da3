"""deep-river: neural networks that learn from streams, one sample at a time, and grow with their features.

It wants an older torch and river than this project's environment has: ``make test-deep-river`` runs this file in one
of its own.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPSGD, BNPAdamW, BNPreconditioner
from tests.conftest import hook_count, same, weights

base = pytest.importorskip("deep_river.base", reason="deep-river is not installed here: make test-deep-river")
classification = pytest.importorskip("deep_river.classification")
regression = pytest.importorskip("deep_river.regression")


class Net(nn.Module):
    """n → 8 → 1, or to scores of classes."""

    def __init__(self, n_features: int = 3, outputs: int = 1, **_: Any) -> None:
        super().__init__()
        self.n_features, self.outputs = n_features, outputs
        torch.manual_seed(7)
        self.first = nn.Linear(n_features, 8)
        self.last = nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return y if self.outputs == 1 else y.softmax(-1)


def stream(samples: int, features: str = "abc") -> Iterator[tuple[dict[str, float], float]]:
    """Off-centre features in unlike scales."""
    generator = random.Random(1)
    for _ in range(samples):
        x = {name: 10**k * generator.gauss(0, 1) / 3 + 2 for k, name in enumerate(features)}
        yield x, (x["a"] - 2) * 3 + (x["b"] - 2) * 0.3


def regressor(net: nn.Module, **options: Any) -> Any:
    fixed: dict[str, Any] = {"optimizer_fn": BNPSGD, "loss_fn": "mse", "lr": 0.1}
    return regression.Regressor(module=net, **(fixed | options))


@pytest.mark.parametrize("cls", [BNPSGD, BNPAdamW])
def test_learning_one_by_one_takes_the_steps_of_a_loop(cls: Any) -> None:
    """It tries the class on a tensor that nobody owns first: no warning, which would be an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = regressor(Net(), optimizer_fn=cls, lr=0.05)
    assert type(model.optimizer) is cls and hook_count(model.module) == 2
    net = Net()
    kind = {BNPSGD: torch.optim.SGD, BNPAdamW: torch.optim.AdamW}[cls]
    optimizer = BNPreconditioner(kind(net.parameters(), lr=0.05), net)  # type: ignore[operator]
    for x, y in stream(50):
        model.learn_one(x, y)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(torch.tensor([list(x.values())])), torch.tensor([[y]]))
        loss.backward()
        optimizer.step()
    assert same(weights(model.module), weights(net))
    assert model.optimizer.statistics["first"].count == 50  # though it trains in eval mode at first


def test_growth_rebuilds_the_optimizer() -> None:
    """New features widen the first layer; the grown weight is a new parameter under a new optimizer."""
    model = regressor(Net(2), is_feature_incremental=True)
    first = model.optimizer
    for x, y in stream(20, "ab"):
        model.learn_one(x, y)
    assert model.optimizer is first and first.statistics["first"].count == 20
    del first
    for x, y in stream(20, "abcd"):
        model.learn_one(x, y)
    assert model.module.first.weight.shape == (8, 4)
    assert model.optimizer.statistics["first"].mean.shape == (4,)
    assert model.optimizer.statistics["first"].count == 20
    assert len(model.optimizer.coverage().preconditioned) == 4
    assert hook_count(model.module) == 2  # the old wrapper's are gone
    assert model.optimizer.param_groups[0]["params"][0] is model.module.first.weight


def test_classes_that_come_later() -> None:
    model = classification.Classifier(
        module=Net(3, 2),
        optimizer_fn=BNPAdamW,
        loss_fn="cross_entropy",
        lr=0.02,
        is_class_incremental=True,
        is_feature_incremental=True,
    )
    for i, (x, _) in enumerate(stream(90)):
        label = "low" if x["a"] < 1.9 else "high"
        model.learn_one(x, label if i < 30 or x["b"] < 3 else "other")
    assert model.module.last.weight.shape[0] == 3
    assert hook_count(model.module) == 2
    assert set(model.predict_proba_one(x)) == {"low", "high", "other"}
    assert model.optimizer.coverage()["last.weight"].preconditioned


def test_clones_and_copies() -> None:
    model = regressor(Net())
    for x, y in stream(10):
        model.learn_one(x, y)
    clone = model.clone(copy_weights=True)
    assert type(clone.optimizer) is BNPSGD and hook_count(clone.module) == hook_count(model.module) == 2
    assert same(weights(clone.module), weights(model.module))
    assert clone.optimizer.statistics["first"].count == 0
    twin = copy.deepcopy(model)
    for x, y in stream(10):
        clone.learn_one(x, y)
        twin.learn_one(x, y)
    assert model.optimizer.statistics["first"].count == 10
    assert clone.optimizer.statistics["first"].count == 10 and twin.optimizer.statistics["first"].count == 20
    for x, y in stream(10):
        model.learn_one(x, y)
    assert same(weights(twin.module), weights(model.module))


def test_a_saved_estimator_goes_on(tmp_path: Any) -> None:
    model = regressor(Net())
    for x, y in stream(10):
        model.learn_one(x, y)
    model.save(tmp_path / "model.pkl")
    loaded = regression.Regressor.load(tmp_path / "model.pkl")
    for x, y in stream(10):
        model.learn_one(x, y)
        loaded.learn_one(x, y)
    assert loaded.optimizer.statistics["first"].count == 20
    assert same(weights(loaded.module), weights(model.module))
