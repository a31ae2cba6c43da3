"""BNPSGD, BNPAdam, BNPAdamW: the base's steps inside the wrapper, whatever they are built from."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bnp_optim
from bnp_optim import BNPSGD, BNPAdam, BNPAdamW, BNPMuon, BNPreconditioner
from tests.conftest import hook_count, inputs, mlp, same, train, weights

PAIRS: dict[Any, tuple[Any, dict[str, Any]]] = {
    BNPSGD: (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    BNPAdam: (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True, "weight_decay": 0.1}),
    BNPAdamW: (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-6, "maximize": False, "foreach": False}),
}
OPTIONS: dict[str, Any] = {"stat_decay": 0.9, "step_scale": "spectral", "skip": ["2"]}
SOURCES: dict[str, Callable[[nn.Module], tuple[Any, dict[str, Any]]]] = {
    "the model": lambda m: (m, {}),
    "the model twice": lambda m: (m, {"model": m}),
    "parameters and model": lambda m: (m.parameters(), {"model": m}),
    "parameters": lambda m: (m.parameters(), {}),
    "a list": lambda m: (list(m.parameters()), {}),
    "names": lambda m: (m.named_parameters(), {}),
    "groups": lambda m: ([{"params": m.parameters()}], {}),
}
every_name = pytest.mark.parametrize("cls", PAIRS, ids=lambda c: c.__name__)


@every_name
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["default", "options"])
def test_steps_are_those_of_the_wrapped_base(cls: Any, source: str, options: dict[str, Any]) -> None:
    base_class, base_options = PAIRS[cls]
    model, expected = mlp(), mlp()
    params, where = SOURCES[source](model)
    optimizer = cls(params, **base_options, **where, **options)
    reference = BNPreconditioner(base_class(expected.parameters(), **base_options), expected, **options)
    train(model, optimizer, inputs(5))
    train(expected, reference, inputs(5))
    assert same(weights(model), weights(expected))
    assert type(optimizer.base_optimizer) is base_class and isinstance(optimizer, BNPreconditioner)
    assert repr(optimizer) == repr(reference).replace("BNPreconditioner", cls.__name__)
    assert str(optimizer.coverage()) == str(reference.coverage())
    saved, other = optimizer.state_dict(), reference.state_dict()
    for group in saved["param_groups"]:
        group.pop("param_names", None)
    assert same(saved, other)


@pytest.mark.parametrize("cls", [BNPSGD, BNPAdam, BNPAdamW, BNPMuon], ids=lambda c: c.__name__)
def test_signatures_have_every_option_of_both_with_its_default(cls: Any) -> None:
    """Written out by hand, so compared with what they stand for."""
    own = dict(inspect.signature(cls).parameters)
    wrapper = [p for p in inspect.signature(BNPreconditioner).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for parameter in wrapper:
        mine = own.pop(parameter.name)
        assert (mine.default, mine.annotation) == (parameter.default, parameter.annotation), parameter.name
    assert next(iter(own)) == "params" and own.pop("model").default is None
    base = getattr(torch.optim, cls.__name__.removeprefix("BNP"), None)
    if base is None:
        pytest.skip("this torch has no Muon")
    theirs = dict(inspect.signature(base).parameters)
    assert not {p.name for p in wrapper} & theirs.keys()  # or one would hide the other
    if cls is BNPMuon:
        assert own.pop("lr").default == 10 * theirs.pop("lr").default
        adamw = inspect.signature(torch.optim.AdamW).parameters
        for name in ("betas", "eps", "weight_decay"):
            assert own.pop(f"adamw_{name}").default == adamw[name].default
        assert own.pop("adamw_lr").default is None and own.pop("head").default is None
    else:
        assert [n for n in own if n in theirs] == list(theirs)  # also in this order, for positional use
        own.pop("decoupled_weight_decay", None), theirs.pop("decoupled_weight_decay", None)  # came with torch 2.7
    assert {n: p.default for n, p in own.items()} == {n: p.default for n, p in theirs.items()}


def test_an_option_that_this_torch_lacks_is_left_out_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    monkeypatch.setattr(torch.optim, "Adam", Older)
    assert BNPAdam(mlp(), lr=0.5).param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="amsgrad"):
        BNPAdam(mlp(), amsgrad=True)


def test_generators_are_consumed_once() -> None:
    model = mlp()
    taken: list[int] = []

    def parameters() -> Iterator[nn.Parameter]:
        for i, p in enumerate(model.parameters()):
            taken.append(i)
            yield p

    BNPSGD(parameters(), lr=0.1)
    assert taken == [0, 1, 2, 3]
    group = {"params": parameters(), "lr": 0.3}
    optimizer = BNPAdamW([group], model=model)
    assert taken == [0, 1, 2, 3] * 2 and optimizer.param_groups[0] is group  # as torch keeps it


def test_names_of_parameters_are_kept() -> None:
    model = mlp()
    groups = BNPSGD(model.named_parameters()).param_groups
    assert groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.filterwarnings("ignore:BNPreconditioner. mode='gradient' feeds")
@every_name
def test_the_papers_letter(cls: Any) -> None:
    model, expected = mlp(), mlp()
    optimizer = cls.paper(model.parameters(), lr=0.05, stat_decay=0.9)
    reference = BNPreconditioner.paper(PAIRS[cls][0](expected.parameters(), lr=0.05), expected, stat_decay=0.9)
    assert type(optimizer) is cls
    train(model, optimizer, inputs(4))
    train(expected, reference, inputs(4))
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@every_name
def test_copies(cls: Any, way: Any) -> None:
    model = mlp()
    optimizer = cls(model.parameters(), lr=0.01, skip=["2"])
    train(model, optimizer, inputs(3))
    twin, clone = way((model, optimizer))
    assert type(clone) is cls and repr(clone) == repr(optimizer)
    for m, o in ((model, optimizer), (twin, clone)):
        train(m, o, inputs(3, seed=2))
    assert same((weights(twin), clone.state_dict()), (weights(model), optimizer.state_dict()))


def test_errors_are_those_of_base_and_wrapper_and_leave_no_hook() -> None:
    model = mlp()
    for options, error, match in (
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"stat_decay": 2.0}, ValueError, "stat_decay is 2.0"),
        ({"skip": ["nowhere"]}, ValueError, "skip names 'nowhere'"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module"),
    ):
        with pytest.raises(error, match=match):
            BNPSGD(model.parameters(), **options)  # type: ignore[arg-type]
    for bad, error, match in (
        ([], ValueError, "empty parameter list"),
        (model[0].weight, TypeError, "should be an iterable"),
        ([{"params": set(model.parameters())}], TypeError, "ordered collections"),
    ):
        for cls in (BNPSGD, BNPMuon) if hasattr(torch.optim, "Muon") else (BNPSGD,):
            with pytest.raises(error, match=match):
                cls(bad)
    with pytest.raises(TypeError, match="already a BNPreconditioner"):
        BNPreconditioner(BNPSGD(model), model)
    assert hook_count(model) == 0


def test_building_anew_leaves_one_set_of_hooks() -> None:
    """As clients do when an option changes or the model has grown."""
    model = mlp()
    optimizer = BNPSGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer, inputs(2))
        optimizer = BNPSGD(model.parameters(), lr=0.1)
        assert hook_count(model) == 2
    assert optimizer.statistics["0"].count == 0


def test_exports() -> None:
    assert {"BNPSGD", "BNPAdam", "BNPAdamW", "BNPMuon", "CombinedOptimizer"} <= set(bnp_optim.__all__)
    assert all(hasattr(bnp_optim, name) for name in bnp_optim.__all__)
