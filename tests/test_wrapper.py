"""The wrapper is an optimizer like any other: its objects, hooks, closures, groups and bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp, train, weights


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW], ids=["gradient", "two_sided"])
def test_a_rate_set_by_the_bases_own_step_hook_holds_in_that_step(
    base_class: type[Optimizer],
) -> None:
    """AdamW decays by default: the wrapper then lends it edited copies of its groups."""
    model = mlp()
    base = base_class(model.parameters(), lr=1.0, weight_decay=0.1)  # type: ignore[call-arg]
    optimizer = BNPreconditioner(base, model)

    def freeze(opt: Optimizer, args: Any, kwargs: Any) -> None:
        opt.param_groups[0]["lr"] = 0.0

    base.register_step_pre_hook(freeze)
    before = weights(model)
    backward(model, inputs(1)[0])
    optimizer.step()
    assert base.param_groups[0]["lr"] == 0.0
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_hooks_of_the_base_see_its_own_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = BNPreconditioner(base, model)
    own, seen = list(base.param_groups), []

    def look(opt: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append((len(opt.param_groups) == len(own), opt.param_groups[0]["weight_decay"]))

    base.register_step_pre_hook(look)
    base.register_step_post_hook(look)
    backward(model, inputs(1)[0])
    optimizer.step()
    assert seen == [(True, 0.1), (True, 0.1)]


def test_a_subclass_is_known_whoever_was_built_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch patches ``step`` into the class of the first instance: still the same algorithm."""
    step = torch.optim.Adamax.step
    monkeypatch.setattr(torch.optim.Adamax, "step", getattr(step, "__wrapped__", step))  # as in a fresh process

    class Mine(torch.optim.Adamax):
        pass

    results = []
    for _ in range(2):
        model = mlp()
        train(model, BNPreconditioner(Mine(model.parameters(), lr=0.1, weight_decay=0.1), model), inputs(3))
        results.append(weights(model))
    model = mlp()
    train(
        model,
        BNPreconditioner(torch.optim.Adamax(model.parameters(), lr=0.1, weight_decay=0.1), model),
        inputs(3),
    )
    for name, value in weights(model).items():
        assert torch.equal(value, results[0][name]), name
        assert torch.equal(value, results[1][name]), name


def test_a_group_added_in_the_middle_of_accumulation_loses_no_samples() -> None:
    """Their gradients are in .grad when step() comes."""
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    first, second = inputs(2)
    backward(model, first)
    optimizer.add_param_group({"params": model[2].parameters()})
    backward(model, second)
    optimizer.step()
    assert optimizer.statistics["0"].count == 16
    torch.testing.assert_close(optimizer.statistics["0"].mean, torch.cat([first, second]).mean(0))


# ---- closures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW], ids=["gradient", "two_sided"])
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_a_closure_runs_once_with_gradients_and_gives_the_same_numbers(base_class: Any, outside: Any) -> None:
    model, expected = mlp(), mlp()
    optimizer = BNPreconditioner(base_class(model.parameters(), lr=0.1), model)
    train(expected, BNPreconditioner(base_class(expected.parameters(), lr=0.1), expected), inputs(4))
    calls: list[bool] = []
    for x in inputs(4):

        def closure(x: Any = x) -> Any:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            return backward(model, x)

        with torch.no_grad():
            now = model(x).square().mean()
        with outside():
            loss = optimizer.step(closure)
        assert torch.equal(loss, now)
    assert calls == [True] * 4
    for name, value in weights(expected).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert optimizer.step() is None


# ---- the base's own objects ----------------------------------------------------------------------


def test_groups_state_and_defaults_are_the_bases_own_and_can_be_assigned() -> None:
    model = mlp()
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = BNPreconditioner(base, model)
    assert isinstance(optimizer, Optimizer) and optimizer.base_optimizer is base
    for name, value in {"param_groups": [dict(base.param_groups[0])], "state": {}, "defaults": {"lr": 3.0}}.items():
        assert getattr(optimizer, name) is getattr(base, name)
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) is getattr(base, name) is value
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    with pytest.raises(AttributeError):
        _ = optimizer.no_such_thing  # nothing is forwarded that was not meant to be


def test_a_rate_set_through_the_wrapper_acts() -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    backward(model, inputs(1)[0])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    for p, w in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), w.sub(p.grad, alpha=0.5))


# ---- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW], ids=["gradient", "two_sided"])
def test_every_step_hook_fires_once_with_its_own_optimizer(base_class: Any) -> None:
    model = mlp()
    base = base_class(model.parameters(), lr=0.1)
    optimizer = BNPreconditioner(base, model)
    events: list[tuple[str, Optimizer]] = []

    def note(what: str) -> Any:
        return lambda opt, args, kwargs: events.append((what, opt))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        base.register_step_pre_hook(note("base pre")),
        base.register_step_post_hook(note("base post")),
    ]
    try:
        backward(model, inputs(1)[0])
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert [what for what, _ in events] == ["global pre", "pre", "base pre", "base post", "post", "global post"]
    assert all(opt is (base if what.startswith("base") else optimizer) for what, opt in events)
    optimizer.step()
    assert len(events) == 6


def test_a_pre_hook_sees_raw_gradients_and_a_post_hook_preconditioned_ones() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = BNPreconditioner(base, model)
    seen: dict[str, Any] = {}

    def note(what: str) -> Any:
        return lambda *_: seen.update({what: model[0].weight.grad.clone()})

    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    base.register_step_pre_hook(note("base pre"))
    base.register_step_post_hook(note("base post"))
    backward(model, inputs(1)[0])
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(seen["pre"], raw) and torch.equal(seen["base pre"], raw)
    assert torch.equal(seen["post"], model[0].weight.grad) and torch.equal(seen["base post"], seen["post"])
    assert not torch.allclose(seen["post"], raw, rtol=0.1)
