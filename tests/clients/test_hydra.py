"""Configurations that name what to call: Hydra's ``_target_``."""

from __future__ import annotations

from typing import Any

import pytest

from bnp_optim import BNPSGD, BNPAdamW
from tests.conftest import inputs, mlp, same, train, weights

hydra = pytest.importorskip("hydra.utils", reason="hydra-core is not installed")


def test_an_optimizer_by_target() -> None:
    """Hydra copies lists of tensors, so it is given the parameters by hand."""
    model, expected = mlp(), mlp()
    config = {"_target_": "bnp_optim.BNPAdamW", "lr": 0.01, "betas": [0.8, 0.9], "stat_decay": 0.9, "skip": ["2"]}
    partial = hydra.instantiate(config, _partial_=True)
    optimizer = partial(model.parameters())
    reference = BNPAdamW(expected, lr=0.01, betas=(0.8, 0.9), stat_decay=0.9, skip=["2"])
    assert type(optimizer) is BNPAdamW
    train(model, optimizer, inputs(4))
    train(expected, reference, inputs(4))
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize("convert", ["none", "all"])
def test_parameters_passed_through_instantiate(convert: str) -> None:
    model = mlp()
    config: dict[str, Any] = {"_target_": "bnp_optim.BNPSGD", "_convert_": convert, "lr": 0.1, "step_scale": None}
    for params in (model.parameters(), model):
        optimizer = hydra.instantiate(config, params=params)
        assert type(optimizer) is BNPSGD
        held = optimizer.param_groups[0]["params"]
        assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
        assert list(optimizer.statistics) == ["0", "2"]
