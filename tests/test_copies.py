"""Copies of models and optimizers are independent; dead wrappers leave nothing behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp


def test_a_copy_of_a_model_with_two_wrappers_runs() -> None:
    """As in a notebook whose cell ran twice, or while the first wrapper waits for the garbage collector."""
    model = mlp()
    wrappers = [BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model) for _ in range(2)]
    clone = copy.deepcopy(model)
    x = inputs(1)[0]
    assert torch.equal(clone(x), model(x))
    assert [len(m._forward_hooks) for m in clone.modules()] == [0] * 4
    assert all(w.statistics["0"].count == 0 for w in wrappers)


def test_a_model_that_holds_its_optimizer_can_be_copied() -> None:
    """torch's own optimizers allow it; the copy's optimizer must belong to the copy."""
    model = mlp()
    model.optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    clone = copy.deepcopy(model)
    clone.optimizer.zero_grad()  # type: ignore[operator, union-attr]  # attaches: the model is whole only now
    backward(clone, inputs(1)[0])
    clone.optimizer.step()  # type: ignore[operator, union-attr]
    assert clone.optimizer.statistics["0"].count == 8  # type: ignore[union-attr, index]
    assert model.optimizer.statistics["0"].count == 0


def test_no_hook_is_left_when_construction_fails_on_a_warning() -> None:
    model: nn.Module = mlp()
    with pytest.warns(UserWarning, match="mode='gradient'"):  # the case that raises below
        BNPreconditioner(torch.optim.Adam(model.parameters()), model, mode="gradient").remove_hooks()
    with pytest.raises(UserWarning, match="mode='gradient'") as caught:
        BNPreconditioner(torch.optim.Adam(model.parameters()), model, mode="gradient")
    del caught
    gc.collect()
    assert all(not m._forward_hooks for m in model.modules())
