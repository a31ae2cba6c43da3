"""From parameters alone to the modules that own them."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPSGD, BNPAdamW, BNPMuon
from bnp_optim.ownership import Ownerless, find_model
from tests.conftest import inputs, mlp, same, train, weights


class Holder(nn.Module):
    """A module with others in it, as a LightningModule is."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_the_smallest_module_that_contains_all_owners() -> None:
    net = mlp()
    outer = Holder(net=Holder(net=net), loss=nn.Linear(2, 2))
    assert find_model(list(outer.net.parameters())) is net  # type: ignore[union-attr]
    assert find_model(list(outer.parameters())) is outer
    assert find_model([net[2].bias]) is net[2]
    other = Holder(net=net)  # a second tree around the same module
    assert find_model(list(net.parameters())) is net and other.net is net


def test_names_say_which_of_the_modules_is_meant() -> None:
    net = mlp()
    outer = Holder(net=net)
    for names, expected in ((["2"], net), (["net.2"], outer), (["net.2", "net"], outer), (["nowhere"], net)):
        assert find_model(list(net.parameters()), names) is expected
    for cls in (BNPSGD, BNPMuon) if hasattr(torch.optim, "Muon") else (BNPSGD,):
        assert list(cls(net.parameters(), skip=["net.2"]).statistics) == ["net.0"]
        assert list(cls(net.parameters(), skip=["2"]).statistics) == ["0"]
        with pytest.raises(ValueError, match="skip names 'net'"):
            cls(net.parameters(), skip=["net", "2"])
        with pytest.raises(TypeError, match="skip must be a collection"):
            cls(net.parameters(), skip="2")


@pytest.mark.parametrize("called", [False, True])
def test_a_compiled_model_is_the_module_in_it(called: bool) -> None:
    net = mlp()
    compiled = torch.compile(net, backend="eager")
    if called:
        compiled(inputs(1)[0]).sum().backward()
        net.zero_grad()
    assert find_model(list(compiled.parameters())) is net


def test_two_networks_under_one_optimizer() -> None:
    first, second = mlp(), nn.Linear(4, 2)
    found = find_model([*second.parameters(), *first.parameters()])
    assert isinstance(found, nn.ModuleList) and {id(m) for m in found} == {id(first), id(second)}
    optimizer = BNPSGD([*first.parameters(), *second.parameters()], lr=0.1)
    (first(inputs(1)[0]).sum() + second(inputs(1)[0]).sum()).backward()
    optimizer.step()
    assert sorted(int(s.count) for s in optimizer.statistics.values()) == [8, 8, 8]


def test_tied_weights_have_several_owners_in_one_tree() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert find_model(list(model.parameters())) is model


@pytest.mark.parametrize("cls", [BNPSGD, BNPAdamW])
def test_a_replaced_layer_that_is_still_alive_is_ambiguous(cls: Any) -> None:
    model = mlp()
    old = model[0]
    model[0] = nn.Linear(4, 6)
    model[0].weight = old.weight
    with pytest.raises(ValueError, match=r"weight of a Linear is also that of a Linear.*model="):
        cls(model.parameters())
    assert cls(model.parameters(), model=model).statistics.keys() == {"0", "2"}
    del old
    assert cls(model.parameters()).statistics.keys() == {"0", "2"}


def test_what_waits_for_the_garbage_collector_does_not_count() -> None:
    model = mlp()
    dead = nn.Linear(4, 6)
    dead.weight = model[0].weight
    dead.itself = [dead]  # a cycle
    gc.disable()
    try:
        del dead
        assert find_model(list(model.parameters())) is model
    finally:
        gc.enable()


def test_parameters_that_nobody_owns_take_the_bases_steps() -> None:
    loose = [torch.ones(3, 2, requires_grad=True)]
    plain = [torch.ones(3, 2, requires_grad=True)]
    with pytest.warns(UserWarning, match="no live module has these parameters") as caught:
        optimizer = BNPAdamW(loose, lr=0.1)
    assert len(caught) == 1
    base = torch.optim.AdamW(plain, lr=0.1)
    for parameters, o in ((loose, optimizer), (plain, base)):
        for _ in range(3):
            o.zero_grad()
            parameters[0].pow(3).sum().backward()  # type: ignore[attr-defined]
            o.step()  # type: ignore[attr-defined]
    assert torch.equal(loose[0], plain[0])
    assert isinstance(find_model(loose), Ownerless)


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.empty(1)])
def test_a_probe_with_nothing_to_train_is_no_reason_to_warn(tensor: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BNPSGD([tensor], lr=0.1).step()


def test_some_parameters_without_owner_pass_through() -> None:
    model, expected = mlp(), mlp()
    loose = torch.ones(2, requires_grad=True)
    optimizer = BNPSGD([*model.parameters(), loose], lr=0.1)
    train(expected, BNPSGD(expected, lr=0.1), inputs(3))
    for x in inputs(3):
        optimizer.zero_grad()
        (model(x).square().mean() + loose.sum()).backward()
        optimizer.step()
    assert same(weights(model), weights(expected))
    torch.testing.assert_close(loose.detach(), torch.full((2,), 0.7))


def test_strange_objects_are_not_woken() -> None:
    """What only pretends to be a module must not run, or fail, because we look around."""

    class Sleeping:
        @property
        def __class__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("woken")

    sleeper, model = Sleeping(), mlp()
    half_built = nn.Module.__new__(nn.Linear)
    assert find_model(list(model.parameters())) is model
    assert type(sleeper) is Sleeping and type(half_built) is nn.Linear
