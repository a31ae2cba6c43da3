"""Checkpoints: bitwise resume, foreign and damaged ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bnp_optim import BNPreconditioner
from tests.conftest import inputs, mlp, same, train, weights


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["stateless", "momentum"])
def test_a_checkpoint_of_the_plain_base_warns_once_and_starts_cold(options: dict[str, float]) -> None:
    """SGD without momentum has no state: its checkpoint is foreign all the same."""
    model = mlp()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
    train(model, plain, inputs(1))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1, **options), model)  # type: ignore[arg-type]
    train(model, optimizer, inputs(1))
    with pytest.warns(UserWarning, match="no BNP statistics"):
        optimizer.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.statistics["0"].count == 0


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda d: d["state"][0].pop("bnp_mass"),
    "shape": lambda d: d["state"][0].update(bnp_mean=torch.zeros(5)),
    "none": lambda d: d["state"][0].update(bnp_mean=None),
    "number": lambda d: d["state"][0].update(bnp_variance=1.0),
    "header": lambda d: d.update(bnp=None),
    "version": lambda d: d["bnp"].update(version="x"),
    "steps": lambda d: d["bnp"].update(steps=None),
    "newer": lambda d: d["bnp"].update(version=99),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(kind: str) -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.Adam(model.parameters(), lr=0.1), model)
    train(model, optimizer, inputs(2))
    damaged = copy.deepcopy(optimizer.state_dict())
    DAMAGE[kind](damaged)
    train(model, optimizer, inputs(2, seed=2))
    before = copy.deepcopy(optimizer.state_dict()), weights(model)
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(damaged)
    assert same(before, (optimizer.state_dict(), weights(model)))
