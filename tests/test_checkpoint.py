"""Checkpoints: bitwise resume, foreign and damaged ones."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp, same, train, weights


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
    "bool": lambda d: d["bnp"].update(version=True),
    "older than the first": lambda d: d["bnp"].update(version=0),
    "steps below zero": lambda d: d["bnp"].update(steps=-1),
    "form": lambda d: d["bnp"].update(form="sideways"),
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


# ---- bitwise resume ------------------------------------------------------------------------------

BASES: dict[str, dict[str, Any]] = {
    "SGD": {},
    "SGD-momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adadelta": {},
    "Adamax": {},
    "Muon": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "spectral": {"step_scale": "spectral"},
    "common": {"step_scale": "common"},
    "interval": {"stat_interval": 3},
}


def wrapped(name: str, options: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    base = name.partition("-")[0]
    if not hasattr(torch.optim, base):
        pytest.skip(f"this torch has no {base}")
    model = mlp(bias=base != "Muon").to(dtype)
    return model, BNPreconditioner(
        getattr(torch.optim, base)(model.parameters(), lr=0.02, **BASES[name]), model, **options
    )


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", BASES)
def test_training_goes_on_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    model, optimizer = wrapped(name, options)
    train(model, optimizer, inputs(5))
    saved, parameters = through_a_file(optimizer.state_dict()), weights(model)
    train(model, optimizer, inputs(5, seed=2))

    fresh, resumed = wrapped(name, options)
    fresh.load_state_dict(parameters)
    kept = copy.deepcopy(saved)
    resumed.load_state_dict(saved)
    assert same(saved, kept)
    assert same(resumed.state_dict(), saved)
    train(fresh, resumed, inputs(5, seed=2))
    assert same(weights(fresh), weights(model))
    assert same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SGD-momentum", "RMSprop"])
def test_statistics_of_half_precision_parameters_are_saved_and_loaded_in_float32(name: str, dtype: torch.dtype) -> None:
    """torch's ``load_state_dict`` casts the base's own state to the parameter's dtype."""
    model, optimizer = wrapped(name, {}, dtype=dtype)
    train(model, optimizer, [x.to(dtype) for x in inputs(3)])
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"][0]["bnp_mean"].dtype == saved["state"][0]["bnp_variance"].dtype == torch.float32
    _, resumed = wrapped(name, {}, dtype=dtype)
    resumed.load_state_dict(saved)
    for layer, expected in optimizer.statistics.items():
        found = resumed.statistics[layer]
        assert found.mean.dtype == torch.float32
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance)
        assert not torch.equal(found.mean, found.mean.to(dtype).float())  # more than half precision would hold


def test_loading_drops_what_an_earlier_training_left() -> None:
    """Also the statistics of a layer that the checkpoint has not seen yet, and a direction of the power step."""
    model, optimizer = wrapped("SGD", {"step_scale": "spectral"})
    start, parameters = copy.deepcopy(optimizer.state_dict()), weights(model)
    train(model, optimizer, inputs(3))
    first = weights(model)
    model.load_state_dict(parameters)
    optimizer.load_state_dict(start)
    assert all(s.count == 0 for s in optimizer.statistics.values())
    train(model, optimizer, inputs(3))
    assert same(weights(model), first)


# ---- between plain and wrapped -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD-momentum", "Adam", "AdamW", "Adagrad", "Muon"])
def test_ours_loads_into_the_plain_base_which_steps(name: str) -> None:
    model, optimizer = wrapped(name, {})
    train(model, optimizer, inputs(3))
    other, unused = wrapped(name, {})
    plain = unused.base_optimizer
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    other.load_state_dict(weights(model))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        own = {k: v for k, v in plain.state[theirs].items() if not k.startswith("bnp_")}
        assert same(own, dict(optimizer.base_optimizer.state[mine]))
    unused.remove_hooks()
    train(other, plain, inputs(2, seed=2))
    train(model, optimizer.base_optimizer, inputs(2, seed=2))
    assert same(weights(other), weights(model))


def test_the_plain_bases_moments_are_taken_over() -> None:
    model, optimizer = wrapped("Adam", {})
    plain = optimizer.base_optimizer
    train(model, plain, inputs(3))
    saved = through_a_file(plain.state_dict())
    fresh, resumed = wrapped("Adam", {})
    with pytest.warns(UserWarning, match="no BNP statistics") as caught:
        resumed.load_state_dict(saved)
    assert len(caught) == 1
    assert same(resumed.base_optimizer.state_dict(), saved)
    train(fresh, resumed, inputs(1))
    assert int(resumed.state[fresh[0].weight]["step"]) == 4 and resumed.statistics["0"].count == 8


# ---- refusals ------------------------------------------------------------------------------------


def _other_layers(optimizer: BNPreconditioner) -> BNPreconditioner:
    model = mlp()
    return BNPreconditioner(torch.optim.Adam(model.parameters(), lr=0.1), model, skip=["2"])


def _other_shapes(optimizer: BNPreconditioner) -> BNPreconditioner:
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return BNPreconditioner(torch.optim.Adam(model.parameters(), lr=0.1), model)


def _other_groups(optimizer: BNPreconditioner) -> BNPreconditioner:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    return BNPreconditioner(torch.optim.Adam(groups, lr=0.1), model)


def _fewer_parameters(optimizer: BNPreconditioner) -> BNPreconditioner:
    model = mlp()
    return BNPreconditioner(torch.optim.Adam(model[0].parameters(), lr=0.1), model)


@pytest.mark.parametrize("build", [_other_layers, _other_shapes, _other_groups, _fewer_parameters])
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(build: Callable[..., BNPreconditioner]) -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.Adam(model.parameters(), lr=0.1), model)
    train(model, optimizer, inputs(2))
    saved = optimizer.state_dict()
    other = build(optimizer)
    features = other._model[0].in_features
    train(other._model, other, inputs(4, seed=2, features=features))
    before = copy.deepcopy(other.state_dict()), weights(other._model)
    with pytest.raises(ValueError, match=r"state_?dict|parameter group"):
        other.load_state_dict(saved)
    assert same(before, (other.state_dict(), weights(other._model)))


# ---- hooks and accumulation ----------------------------------------------------------------------


def test_state_dict_and_load_hooks_fire_once_in_order() -> None:
    model, optimizer = wrapped("AdamW", {})
    train(model, optimizer, inputs(1))
    events: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda opt: events.append(("save", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: events.append(("load", opt, saved.pop("extra"))))
    optimizer.register_load_state_dict_post_hook(
        lambda opt: events.append(("loaded", opt, int(opt.statistics["0"].count)))
    )
    saved = optimizer.state_dict()
    train(model, optimizer, inputs(1))
    optimizer.load_state_dict(saved)
    assert events == [("save", optimizer), ("load", optimizer, 1), ("loaded", optimizer, 8)]
    assert saved["extra"] == 1  # the hook popped from its own copy


@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW"])
def test_a_checkpoint_amid_gradient_accumulation(name: str) -> None:
    """It disturbs neither the running training, nor does it leave that one's samples in the one that loads it."""
    a, b, c, d = inputs(4)

    def start() -> Any:
        model, optimizer = wrapped(name, {})
        train(model, optimizer, [a])
        optimizer.zero_grad()
        backward(model, b)
        return model, optimizer

    model, optimizer = start()
    saved, parameters = through_a_file(optimizer.state_dict()), weights(model)
    undisturbed, other = start()
    for m, o in ((model, optimizer), (undisturbed, other)):
        backward(m, c)
        o.step()
    assert same(weights(model), weights(undisturbed)) and optimizer.statistics["0"].count == 24
    assert same(optimizer.state_dict(), other.state_dict())

    # load into a wrapper that is itself amid accumulation; its gradients are the caller's to zero, as ever
    resumed_model, resumed = start()
    resumed_model.load_state_dict(parameters)
    resumed.load_state_dict(copy.deepcopy(saved))  # torch's own entries are taken over, not copied
    for p in resumed_model.parameters():
        p.grad = None
    train_from_file, fresh = wrapped(name, {})
    train_from_file.load_state_dict(parameters)
    fresh.load_state_dict(saved)
    for m, o in ((resumed_model, resumed), (train_from_file, fresh)):
        backward(m, d)
        o.step()
    assert resumed.statistics["0"].count == fresh.statistics["0"].count == 16
    assert same(weights(resumed_model), weights(train_from_file))


def momentum(mode: str, heavy: float = 0.9) -> tuple[nn.Module, BNPreconditioner]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1, momentum=heavy), model, mode=mode)


@pytest.mark.parametrize(("saved", "loads"), [("gradient", "auto"), ("two_sided", "gradient")])
def test_moments_of_the_other_form_are_refused(saved: str, loads: str) -> None:
    model, optimizer = momentum(saved)
    train(model, optimizer, [torch.randn(4, 3)])
    file = copy.deepcopy(optimizer.state_dict())
    other, receiver = momentum(loads)
    train(other, receiver, [torch.ones(4, 3)])
    before = copy.deepcopy(receiver.state_dict())
    with pytest.raises(ValueError, match=f"saved in the form '{saved}'.*Pass mode='{saved}'"):
        receiver.load_state_dict(file)
    assert same(receiver.state_dict(), before)

    model, optimizer = momentum(saved, heavy=0.0)  # without moments the forms are one
    train(model, optimizer, [torch.randn(4, 3)])
    momentum(loads, heavy=0.0)[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_format_1_had_the_gradient_form_around_momentum() -> None:
    model, optimizer = momentum("gradient")
    train(model, optimizer, [torch.randn(4, 3)])
    file = copy.deepcopy(optimizer.state_dict())
    file["bnp"] = {"version": 1, "steps": 1}
    with pytest.raises(ValueError, match="Pass mode='gradient'"):
        momentum("auto")[1].load_state_dict(copy.deepcopy(file))
    for chosen in ("gradient", "two_sided"):  # who passes a mode knows
        momentum(chosen)[1].load_state_dict(copy.deepcopy(file))
