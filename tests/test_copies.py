"""Copies of models and optimizers are independent; dead wrappers leave nothing behind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.conftest import backward, hook_count, inputs, mlp, same, train, weights


def through_torch_save(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda what: pickle.loads(pickle.dumps(what)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("options", [{}, {"step_scale": "spectral", "stat_interval": 3}], ids=["default", "spectral"])
@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_model_and_optimizer_trains_on_alone_and_alike(way: str, base_class: Any, options: Any) -> None:
    model = mlp()
    optimizer = BNPreconditioner(base_class(model.parameters(), lr=0.05), model, **options)
    train(model, optimizer, inputs(4))
    twin, clone = WAYS[way]((model, optimizer))
    assert hook_count(twin) == hook_count(model) == 2
    before = weights(model), copy.deepcopy(optimizer.state_dict())
    train(twin, clone, inputs(4, seed=2))
    assert same((weights(model), optimizer.state_dict()), before)
    train(model, optimizer, inputs(4, seed=2))
    assert same((weights(twin), clone.state_dict()), (weights(model), optimizer.state_dict()))
    assert clone.statistics["0"].count in (64, 24)  # all of them, or every third step


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_model_alone_writes_into_nobodys_statistics(way: str) -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    twin = WAYS[way](model)
    (x,) = inputs(1)
    backward(twin, x)
    assert hook_count(twin) == 0  # gone at the first call
    optimizer.step()
    assert optimizer.statistics["0"].count == 0
    own = BNPreconditioner(torch.optim.SGD(twin.parameters(), lr=0.1), twin)
    train(twin, own, [x])
    assert own.statistics["0"].count == 8 and optimizer.statistics["0"].count == 0


@pytest.mark.parametrize("way", WAYS)
def test_samples_on_their_way_stay_with_the_original(way: str) -> None:
    """A copy made between backward and step: its model has the gradient (torch copies it), not the samples."""
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    a, b = inputs(2)
    train(model, optimizer, [a])
    optimizer.zero_grad()
    backward(model, b)
    twin, clone = WAYS[way]((model, optimizer))
    optimizer.step()
    clone.zero_grad()
    train(twin, clone, [b])
    assert optimizer.statistics["0"].count == clone.statistics["0"].count == 16
    assert same(weights(twin), weights(model))


def test_a_rescan_amid_accumulation_loses_no_samples() -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    a, b = inputs(2)
    backward(model, a)
    optimizer.rescan()
    backward(model, b)
    optimizer.step()
    assert optimizer.statistics["0"].count == 16
    torch.testing.assert_close(optimizer.statistics["0"].mean, torch.cat([a, b]).mean(0))


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
    assert hook_count(model) == 0 and caught.tb is not None  # though the traceback keeps the wrapper alive
