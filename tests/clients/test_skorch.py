"""skorch: estimators that build, rebuild, copy and save their optimizer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bnp_optim import BNPAdamW, BNPMuon, BNPreconditioner
from tests.conftest import hook_count, same, weights

skorch = pytest.importorskip("skorch", reason="skorch is not installed")
sklearn = pytest.importorskip("sklearn.base")


class Classifier(nn.Module):
    """4 → 6 → 3, always with the same weights."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def data() -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    y = generator.integers(3, size=60)
    x = generator.normal(size=(60, 4)) + 3.0 * np.eye(3, 4)[y] + 5.0
    return x.astype(np.float32), y


def estimator(**options: Any) -> Any:
    fixed: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss,
        "optimizer": BNPAdamW,
        "lr": 0.05,
        "optimizer__stat_decay": 0.9,
        "max_epochs": 2,
        "batch_size": 12,
        "train_split": None,
        "iterator_train__shuffle": False,
        "verbose": 0,
    }
    return skorch.NeuralNetClassifier(Classifier, **(fixed | options))


def test_fit_takes_the_steps_of_a_loop() -> None:
    """skorch passes closures and parameter groups."""
    x, y = data()
    net = estimator(optimizer__betas=(0.8, 0.9)).fit(x, y)
    model = Classifier()
    base = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.9))
    optimizer = BNPreconditioner(base, model, stat_decay=0.9)
    for _ in range(2):
        for i in range(0, 60, 12):
            optimizer.zero_grad()
            output = model(torch.from_numpy(x[i : i + 12]))
            nn.functional.cross_entropy(output, torch.from_numpy(y[i : i + 12])).backward()
            optimizer.step()
    assert type(net.optimizer_) is BNPAdamW
    assert same(weights(net.module_), weights(model))
    assert net.optimizer_.statistics["0"].count == 120


def test_partial_fit_goes_on_and_fit_starts_anew() -> None:
    x, y = data()
    net = estimator()
    net.partial_fit(x, y).partial_fit(x, y)
    assert net.optimizer_.statistics["0"].count == 240
    first = weights(net.module_)
    net.fit(x, y)
    assert net.optimizer_.statistics["0"].count == 120
    assert hook_count(net.module_) == 2 and not same(weights(net.module_), first)
    assert same(weights(net.module_), weights(estimator().fit(x, y).module_))


def test_parameters_set_on_an_initialized_estimator() -> None:
    """skorch writes them into the groups and forgets them: what is not read from there needs a new estimator."""
    x, y = data()
    net = estimator(max_epochs=1).fit(x, y)
    net.set_params(lr=0.5, optimizer__weight_decay=0.3)
    group = net.optimizer_.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.3)
    net.set_params(optimizer__stat_decay=0.5)
    assert "stat_decay=0.9" in repr(net.optimizer_)
    other = sklearn.clone(net).set_params(optimizer__stat_decay=0.5).initialize()
    assert "stat_decay=0.5" in repr(other.optimizer_)
    net.set_params(module__width=8)  # builds module and optimizer
    net.partial_fit(x, y)
    assert net.optimizer_.statistics["2"].mean.numel() == 8
    assert hook_count(net.module_) == 2


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["deepcopy", "pickle"],
)
def test_copies_and_clones(way: Any) -> None:
    x, y = data()
    net = estimator().fit(x, y)
    assert same(weights(sklearn.clone(net).fit(x, y).module_), weights(net.module_))
    twin = way(net)
    before = weights(net.module_)
    twin.partial_fit(x, y)
    assert same(weights(net.module_), before)
    net.partial_fit(x, y)
    assert same(weights(twin.module_), weights(net.module_))
    assert same(twin.optimizer_.state_dict(), net.optimizer_.state_dict())


def test_saved_parameters_go_on_bitwise(tmp_path: Path) -> None:
    x, y = data()
    net = estimator().fit(x, y)
    files = {"f_params": tmp_path / "module.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net.save_params(**files)
    other = estimator().initialize()
    other.load_params(**files)
    assert other.optimizer_.statistics["0"].count == 120
    for each in (net, other):
        each.partial_fit(x, y)
    assert same(weights(other.module_), weights(net.module_))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_groups_by_pattern() -> None:
    x, y = data()
    net = estimator(optimizer=BNPMuon, optimizer__param_groups=[("*.bias", {"lr": 0.2})]).fit(x, y)
    assert [(len(g["params"]), g["lr"]) for g in net.optimizer_.param_groups] == [
        (1, 0.05),
        (2, pytest.approx(0.02)),
        (1, 0.005),
    ]
    assert net.optimizer_.statistics["2"].count == 120
