"""CombinedOptimizer alone: one optimizer over the groups of several."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bnp_optim import BNPreconditioner, CombinedOptimizer
from tests.conftest import backward, inputs, mlp, same, train, weights
from tests.test_optim_db import Bag, every_input, go, state_of


def apart(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and the rest."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]


def combined(model: nn.Module, **options: Any) -> CombinedOptimizer:
    matrices, rest = apart(model)
    return CombinedOptimizer([SGD(matrices, lr=0.1, momentum=0.9), AdamW(rest, lr=0.01, **options)])


def save_and_load(what: Any) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- as one optimizer ----------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("parts", [1, 2])
def test_optimizers_of_one_kind_are_that_optimizer(info: Any, kwargs: dict[str, Any], parts: int) -> None:
    """Every entry of torch's data base: bitwise, state_dict and resume included."""

    def build() -> tuple[Bag, CombinedOptimizer]:
        model = Bag()
        items = list(model.items)
        shares = [items] if parts == 1 else [items[:1], items[1:]]
        return model, CombinedOptimizer([info.optim_cls(share, **copy.deepcopy(kwargs)) for share in shares])

    plain = Bag()
    reference = info.optim_cls(plain.parameters(), **copy.deepcopy(kwargs))
    model, optimizer = build()
    go(plain, reference, 5)
    go(model, optimizer, 5)
    assert same(state_of(plain, reference), state_of(model, optimizer))
    saved = save_and_load(optimizer.state_dict())
    assert same(saved["state"], reference.state_dict()["state"])
    assert [i for group in saved["param_groups"] for i in group["params"]] == [0, 1, 2]
    if parts == 1:
        assert same(saved, reference.state_dict())
    fresh, resumed = build()
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(saved))
    assert same(resumed.state_dict(), saved)
    go(fresh, resumed, 2)
    go(model, optimizer, 2)
    assert same(state_of(fresh, resumed), state_of(model, optimizer))


def test_groups_are_the_optimizers_own_in_order_and_the_state_is_a_view() -> None:
    model = mlp()
    optimizer = combined(model)
    sgd, adamw = optimizer.optimizers
    assert all(a is b for a, b in zip(optimizer.param_groups, sgd.param_groups + adamw.param_groups, strict=True))
    assert len(optimizer.state) == 0
    train(model, optimizer, inputs(2))
    matrix, bias = model[0].weight, model[0].bias
    assert list(optimizer.state) == [*sgd.state, *adamw.state] and len(optimizer.state) == 4
    assert optimizer.state[bias] is adamw.state[bias] and optimizer.state.get(matrix) is sgd.state[matrix]
    assert optimizer.state.get("nothing") is None and "nothing" not in optimizer.state
    for p, entry in optimizer.state.items():  # as Lightning moves it to a device
        optimizer.state[p] = {**entry, "seen": True}
    assert sgd.state[matrix]["seen"] and adamw.state[bias]["seen"]
    del optimizer.state[bias]
    assert bias not in adamw.state
    assert optimizer.state[bias] == {} and bias in adamw.state  # made where it belongs
    assert optimizer.state.setdefault(matrix, {}) is sgd.state[matrix]
    optimizer.state.clear()
    assert not sgd.state and not adamw.state


def test_groups_state_and_defaults_can_be_assigned() -> None:
    model = mlp()
    optimizer = combined(model)
    sgd, adamw = optimizer.optimizers
    train(model, optimizer, inputs(1))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.state, optimizer.param_groups, optimizer.defaults = (
        optimizer.state,
        optimizer.param_groups,
        optimizer.defaults,
    )
    assert same(optimizer.state_dict(), before) and adamw.defaults["lr"] == 0.01
    assert sgd.state[model[0].weight] and adamw.state[model[0].bias]
    # a split group goes to the optimizer of its parameters, in whatever order
    first, second = sgd.param_groups[0]["params"]
    biases = adamw.param_groups[0]
    optimizer.param_groups = [biases, *({**sgd.param_groups[0], "params": [p]} for p in (first, second))]
    assert [g["params"] for g in sgd.param_groups] == [[first], [second]] and adamw.param_groups == [biases]
    # one whose parameters are all new keeps its place
    new = [{**group, "params": [torch.zeros(2, requires_grad=True)]} for group in optimizer.param_groups]
    optimizer.param_groups = new
    assert sgd.param_groups == new[:2] and adamw.param_groups == new[2:]
    with pytest.raises(ValueError, match=r"param_groups\[0\] belongs to 0 of the combined"):
        optimizer.param_groups = [{"params": [first]}]
    with pytest.raises(ValueError, match=r"param_groups\[0\] belongs to 2 of the combined"):
        optimizer.param_groups = [{"params": [p for group in new for p in group["params"]]}]
    optimizer.defaults = {**optimizer.defaults, "lr": 3.0}
    assert sgd.defaults["lr"] == adamw.defaults["lr"] == 3.0
    optimizer.state = {}
    assert not optimizer.state and not sgd.state


def test_a_closure_runs_once_with_gradients() -> None:
    model, expected = mlp(), mlp()
    optimizer = combined(model)
    train(expected, combined(expected), inputs(3))
    calls: list[bool] = []
    for x in inputs(3):

        def closure(x: Any = x) -> Any:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            return backward(model, x)

        with torch.no_grad():
            now = model(x).square().mean()
            assert torch.equal(optimizer.step(closure), now)
    assert calls == [True] * 3
    assert same(weights(model), weights(expected))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_step_hook_fires_once(wrapped: bool) -> None:
    """Inside the wrapper the parts' pre-hooks, too, see raw gradients, and their weights in place."""
    model = mlp()
    parts = combined(model)
    sgd, adamw = parts.optimizers
    optimizer: Optimizer = BNPreconditioner(parts, model) if wrapped else parts
    events: list[str] = []
    backward(model, inputs(1)[0])
    gradient, weight = model[0].weight.grad.clone(), model[0].weight.detach().clone()

    def note(what: str) -> Any:
        def hook(opt: Optimizer, args: Any, kwargs: Any) -> None:
            events.append(f"{what} {type(opt).__name__}")
            assert len(opt.param_groups) == (1 if opt in (sgd, adamw) else 2)
            if what == "pre":
                assert torch.equal(model[0].weight.grad, gradient) and torch.equal(model[0].weight, weight)

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    for opt in (parts, sgd, adamw):
        opt.register_step_pre_hook(note("pre"))
        opt.register_step_post_hook(note("post"))
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    inner = ["pre SGD", "pre AdamW", "post SGD", "post AdamW"]
    name = type(optimizer).__name__
    own = ["pre CombinedOptimizer", *inner, "post CombinedOptimizer"]
    assert events == [f"global pre {name}", *own, f"global post {name}"]


def test_state_dict_hooks_of_all_fire_and_may_replace_it() -> None:
    model = mlp()
    optimizer = combined(model)
    train(model, optimizer, inputs(1))
    events: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: events.append("pre"))
    optimizer.optimizers[0].register_state_dict_pre_hook(lambda opt: events.append("part"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "mark": 1})
    saved = optimizer.state_dict()
    assert events == ["pre", "part"] and saved["mark"] == 1

    def slower(opt: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, "param_groups": [{**group, "lr": 0.125} for group in saved["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(slower)
    optimizer.register_load_state_dict_post_hook(lambda opt: events.append(f"lr {opt.param_groups[1]['lr']}"))
    optimizer.load_state_dict(saved)
    assert events[2:] == ["lr 0.125"]


def test_a_state_dict_of_other_groups_changes_nothing() -> None:
    model = mlp()
    optimizer = combined(model)
    train(model, optimizer, inputs(1))
    before = copy.deepcopy(optimizer.state_dict())
    extra = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for other in (SGD(model.parameters(), lr=0.1), CombinedOptimizer([*optimizer.optimizers[::-1], extra])):
        with pytest.raises(ValueError, match=r"parameter groups of sizes .*, the combined optimizers have \[2, 2\]"):
            optimizer.load_state_dict(other.state_dict())
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_checkpoint(flat: bool) -> None:
    """By parameter names; torch steps once with lr 0, of which no trace is left."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = mlp()
    optimizer = combined(model)
    train(model, optimizer, inputs(3))
    optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())
    resumed = combined(fresh)
    set_optimizer_state_dict(fresh, resumed, saved, options=options)
    assert same(weights(fresh), weights(model))
    for m, o in ((model, optimizer), (fresh, resumed)):
        train(m, o, inputs(3, seed=2))
    assert same(weights(fresh), weights(model))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_alike(way: Any) -> None:
    model = mlp()
    optimizer = combined(model)
    train(model, optimizer, inputs(2))
    twin, clone = way((model, optimizer))
    assert [type(part) for part in clone.optimizers] == [SGD, AdamW]
    before = copy.deepcopy((weights(model), optimizer.state_dict()))
    train(twin, clone, inputs(2, seed=2))
    assert same((weights(model), optimizer.state_dict()), before)
    train(model, optimizer, inputs(2, seed=2))
    assert same((weights(twin), clone.state_dict()), (weights(model), optimizer.state_dict()))


# ---- groups that are added -----------------------------------------------------------------------


def test_added_groups_go_to_the_last_optimizer_or_to_the_one_that_is_named() -> None:
    model = mlp()
    sgd, adamw = SGD([model[0].weight], lr=0.1), AdamW([model[0].bias], lr=0.01)
    optimizer = CombinedOptimizer([sgd, adamw])
    with pytest.raises(ValueError, match=r"param_group\['optimizer'\] is 2: it must be one of 0 \(SGD\), 1 \(AdamW\)"):
        optimizer.add_param_group({"params": [model[2].bias], "optimizer": 2})
    for bad, error, match in (
        ([model[2].bias], TypeError, "param_group must be a dict"),
        ({"params": [model[0].weight]}, ValueError, r"more than one parameter group: the one of shape \(6, 4\)"),
        ({"params": [("name", model[0].weight)]}, ValueError, "more than one parameter group"),
        ({"params": [model[0].bias]}, ValueError, "more than one parameter group"),
        ({"params": {model[2].bias}}, TypeError, "ordered collections"),
        ({"params": [1.0]}, TypeError, "can only optimize Tensors"),
    ):
        with pytest.raises(error, match=match):
            optimizer.add_param_group(bad)  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": model[2].bias, "lr": 0.5})
    optimizer.add_param_group({"params": (p for p in [model[2].weight]), "optimizer": 0})
    assert len(sgd.param_groups) == len(adamw.param_groups) == 2
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.01, 0.5]
    assert all("optimizer" not in group for group in optimizer.param_groups)
    other = nn.Linear(2, 2)
    optimizer.add_param_group({"params": other.weight, "optimizer": sgd})
    assert sgd.param_groups[2]["params"] == [other.weight]


# ---- clients -------------------------------------------------------------------------------------


def test_schedulers_move_all_groups() -> None:
    model = mlp()
    optimizer = combined(model)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    train(model, optimizer, inputs(1))
    cosine.step()
    plateau.step(1.0)
    plateau.step(1.0)
    expected = [rate * (1 + 2**-0.5) / 2 / 2 for rate in (0.1, 0.01)]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_one_cycle_cycles_momenta_that_are_called_alike_and_says_where_they_are_not() -> None:
    model = mlp()
    matrices, rest = apart(model)
    alike = CombinedOptimizer([Adam(matrices, lr=0.1), AdamW(rest, lr=0.1)])
    options: dict[str, Any] = {"max_lr": [0.5, 0.05], "total_steps": 5}
    schedule = lr_scheduler.OneCycleLR(alike, **options)
    assert [group["betas"][0] for group in alike.param_groups] == [0.95, 0.95]
    train(model, alike, inputs(1))
    schedule.step()
    assert all(0.85 <= group["betas"][0] < 0.95 for group in alike.param_groups)
    momenta = CombinedOptimizer([SGD(matrices, lr=0.1, momentum=0.9), torch.optim.RMSprop(rest, momentum=0.5)])
    lr_scheduler.OneCycleLR(momenta, **options)
    assert [group["momentum"] for group in momenta.param_groups] == [0.95, 0.95]

    mixed = combined(model)
    with pytest.raises(ValueError, match="momentum or beta1"):
        lr_scheduler.OneCycleLR(mixed, **options)
    lr_scheduler.OneCycleLR(mixed, cycle_momentum=False, **options)
    assert [round(group["lr"], 4) for group in mixed.param_groups] == [0.02, 0.002]
    # or each by itself
    schedules = [lr_scheduler.OneCycleLR(part, max_lr=0.5, total_steps=5) for part in mixed.optimizers]
    assert mixed.param_groups[0]["momentum"] == mixed.param_groups[1]["betas"][0] == 0.95
    train(model, mixed, inputs(1))
    for each in schedules:
        each.step()  # warnings are errors: they know that the optimizer has stepped
    assert mixed.param_groups[0]["momentum"] < 0.95


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fused_part_does_not_step_with_scaled_gradients(wrapped: bool) -> None:
    """A scaler hands its scale to optimizers that support it: this one must not claim so."""
    results = []
    for scaled in (False, True):
        model = mlp()
        optimizer: Optimizer = combined(model, fused=True)
        assert not hasattr(optimizer, "_step_supports_amp_scaling")
        optimizer = BNPreconditioner(optimizer, model) if wrapped else optimizer
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for x in inputs(3):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


# ---- errors --------------------------------------------------------------------------------------


def test_what_cannot_be_combined() -> None:
    model = mlp()
    sgd = SGD(model.parameters(), lr=0.1)
    some = AdamW([torch.zeros(1, requires_grad=True), model[2].weight])
    for bad, error, match in (
        ([], ValueError, "optimizers is empty"),
        (sgd, TypeError, "must be a list of optimizers, got SGD"),
        (3, TypeError, "must be a list of optimizers, got int"),
        ([sgd, model], TypeError, r"optimizers\[1\] is a Sequential"),
        ([torch.optim.LBFGS(model.parameters())], TypeError, r"optimizers\[0\], LBFGS, evaluates the loss several"),
        ([BNPreconditioner(sgd, model)], TypeError, "combine the plain optimizers and wrap the combination"),
        ([sgd, sgd], ValueError, "hold the same parameter, number 0 of the latter, of shape"),
        (
            [sgd, some],
            ValueError,
            r"optimizers\[0\] \(SGD\) and optimizers\[1\] \(AdamW\) hold the same parameter, number 1 of the latter, "
            r"of shape \(3, 6\)",
        ),
    ):
        with pytest.raises(error, match=match):
            CombinedOptimizer(bad)  # type: ignore[arg-type]
    assert repr(CombinedOptimizer(iter([sgd]))).startswith("CombinedOptimizer([SGD (\nParameter Group 0")
