"""torch.distributed.checkpoint's state_dict functions, which need no process group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from bnp_optim import BNPreconditioner
from tests.conftest import inputs, mlp, same, train, weights

BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def start(base: str) -> Any:
    model = mlp()
    return model, BNPreconditioner(BASES[base](model.parameters()), model)


@pytest.mark.parametrize("full", [False, True], ids=["local", "full"])
@pytest.mark.parametrize("base", BASES)
def test_statistics_travel_by_parameter_name(base: str, full: bool) -> None:
    """On the way in torch calls ``step()`` once with zero gradients and lr 0: no trace of it may be left."""
    options = StateDictOptions(full_state_dict=full)
    model, optimizer = start(base)
    train(model, optimizer, inputs(5))
    optimizer.zero_grad()
    statistics = optimizer.statistics
    # a checkpoint on disk is a copy; as it comes from torch it shares the momentum buffers with the optimizer
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert torch.equal(saved["state"]["0.weight"]["bnp_mean"], statistics["0"].mean)

    fresh, resumed = start(base)
    fresh.load_state_dict(model.state_dict())
    before = weights(fresh)
    set_optimizer_state_dict(fresh, resumed, saved, options=options)
    assert same(weights(fresh), before)
    for name, expected in statistics.items():
        found = resumed.statistics[name]
        assert same([found.mean, found.variance, found.count], [expected.mean, expected.variance, expected.count])
    for m, o in ((model, optimizer), (fresh, resumed)):
        train(m, o, inputs(5, seed=2))
    assert same(weights(fresh), weights(model))


def test_the_flattened_form_keeps_the_base_and_starts_cold() -> None:
    """torch unflattens only what the *base's* state names, so the statistics cannot travel: there is a warning."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = start("AdamW")
    train(model, optimizer, inputs(5))
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert torch.equal(saved["state.0.weight.bnp_mean"], optimizer.statistics["0"].mean)
    fresh, resumed = start("AdamW")
    with pytest.warns(UserWarning, match="no BNP statistics"):
        set_optimizer_state_dict(fresh, resumed, saved, options=options)
    assert resumed.statistics["0"].count == 0
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert same(optimizer.state[mine], resumed.state[theirs])


def test_a_checkpoint_of_an_optimizer_that_saw_no_sample_stays_cold() -> None:
    """torch.distributed.checkpoint takes a step without samples before it saves, too."""
    model, optimizer = start("AdamW")
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["state"]["0.weight"]["bnp_count"] == 0
    fresh, resumed = start("AdamW")
    set_optimizer_state_dict(fresh, resumed, saved)
    assert "no samples yet" in resumed.coverage()["0.weight"].why
    plain, cold = start("AdamW")
    for m, o in ((fresh, resumed), (plain, cold)):
        o.state.clear()  # torch's step of rate 0 counts as one
        train(m, o, inputs(2))
    assert same(weights(fresh), weights(plain))
