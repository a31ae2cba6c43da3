"""torch's own optimizer data base: on parameters that belong to no layer the wrapper is the base, bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from tests.conftest import same

common_optimizers = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch without its tests")

pytestmark = pytest.mark.filterwarnings("ignore:BNPreconditioner. no layer of the")
REFUSED = {"LBFGS", "SparseAdam"}  # calls the loss itself; takes sparse gradients only


class Bag(nn.Module):
    """Parameters that belong to no layer: matrices, as Muon wants them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.items = nn.ParameterList(torch.randn(*shape, generator=generator) for shape in [(3, 4), (1, 2), (4, 1)])

    def forward(self) -> Tensor:
        return sum((p - k).square().sum() + p.sum() * p.prod() for k, p in enumerate(self.items))  # type: ignore[return-value]


def _inputs() -> list[Any]:
    found = []
    for info in common_optimizers.optim_db:
        if info.optim_cls.__name__ in REFUSED:
            continue
        for i, case in enumerate(info.optim_inputs_func(device="cpu")):
            found.append(pytest.param(info, case.kwargs, id=f"{info.optim_cls.__name__}-{i}-{case.desc}"))
    return found


def _first_inputs() -> list[Any]:
    """One per class, with some state in it where it can be had."""
    last = {p.values[0].optim_cls: p for p in _inputs()}
    return [pytest.param(*p.values, id=cls.__name__) for cls, p in last.items()]


every_input = pytest.mark.parametrize(("info", "kwargs"), _inputs())
every_class = pytest.mark.parametrize(("info", "kwargs"), _first_inputs())


def build(info: Any, kwargs: dict[str, Any]) -> tuple[Bag, BNPreconditioner]:
    model = Bag()
    return model, BNPreconditioner(info.optim_cls(model.parameters(), **copy.deepcopy(kwargs)), model)


def go(model: Bag, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


def state_of(model: Bag, optimizer: Optimizer) -> Any:
    return [(p.detach(), optimizer.state.get(p, {})) for p in model.parameters()]


@every_input
def test_training_equals_the_base_and_resumes(info: Any, kwargs: dict[str, Any]) -> None:
    plain = Bag()
    base = info.optim_cls(plain.parameters(), **copy.deepcopy(kwargs))
    go(plain, base, 5)
    model, optimizer = build(info, kwargs)
    go(model, optimizer, 5)
    assert same(state_of(plain, base), state_of(model, optimizer))
    # the state_dict has nothing but the base's in it, and a round trip through a file keeps every bit
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    parameters, saved = torch.load(file, weights_only=True)
    assert same({k: v for k, v in saved.items() if k != "bnp"}, base.state_dict())
    fresh, resumed = build(info, kwargs)
    fresh.load_state_dict(parameters)
    resumed.load_state_dict(copy.deepcopy(saved))
    assert same(resumed.state_dict(), saved)
    go(fresh, resumed, 2)
    go(model, optimizer, 2)
    assert same(state_of(fresh, resumed), state_of(model, optimizer))


@every_class
def test_a_deep_copy_has_every_public_attribute_and_is_independent(info: Any, kwargs: dict[str, Any]) -> None:
    model, optimizer = build(info, kwargs)
    go(model, optimizer, 2)
    twin, clone = copy.deepcopy((model, optimizer))
    public = [name for name in vars(optimizer) if not name.startswith("_")]
    assert public == [name for name in vars(clone) if not name.startswith("_")]
    assert type(clone) is BNPreconditioner and type(clone.base_optimizer) is info.optim_cls
    assert same(state_of(twin, clone), state_of(model, optimizer))
    assert all(a is b for a, b in zip(clone.param_groups[0]["params"], twin.parameters(), strict=True))
    before = copy.deepcopy(state_of(model, optimizer))
    go(twin, clone, 2)
    assert same([(p, dict(s)) for p, s in state_of(model, optimizer)], [(p, dict(s)) for p, s in before])
    go(model, optimizer, 2)
    assert same(state_of(twin, clone), state_of(model, optimizer))


@every_class
def test_without_gradients_nothing_happens(info: Any, kwargs: dict[str, Any]) -> None:
    model, optimizer = build(info, kwargs)
    before = copy.deepcopy(state_of(model, optimizer))  # Adagrad has its state from the start
    optimizer.step()
    assert same([(p, dict(s)) for p, s in state_of(model, optimizer)], [(p, dict(s)) for p, s in before])


@every_class
def test_zero_gradients_do_what_they_do_in_the_base(info: Any, kwargs: dict[str, Any]) -> None:
    """Not nothing where weight decay is."""
    plain = Bag()
    base = info.optim_cls(plain.parameters(), **copy.deepcopy(kwargs))
    model, optimizer = build(info, kwargs)
    for m, o in ((plain, base), (model, optimizer)):
        for p in m.parameters():
            p.grad = torch.zeros_like(p)
        o.step()
    assert same(state_of(plain, base), state_of(model, optimizer))


@every_class
def test_groups_can_be_added_and_duplicates_are_refused(info: Any, kwargs: dict[str, Any]) -> None:
    if info.optim_cls is torch.optim.Adagrad and torch.__version__.startswith("2.6."):
        pytest.skip("Adagrad of torch 2.6 makes no state for groups that are added")
    model = Bag()
    first, second, third = model.items
    base = info.optim_cls([first], **copy.deepcopy(kwargs))
    optimizer = BNPreconditioner(base, model)
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    assert optimizer.param_groups is base.param_groups and len(base.param_groups) == 2
    assert base.param_groups[1]["lr"] == 0.25
    for bad, error, match in (
        ({"params": [first]}, ValueError, "more than one parameter group"),
        ({"params": {third}}, TypeError, "ordered collections"),
        ({"params": [third.detach() * third]}, ValueError, "non-leaf"),
        ({"params": [1.0]}, TypeError, "can only optimize Tensors"),
        ([third], TypeError, "param_group must be a dict"),
    ):
        with pytest.raises(error, match=match):
            optimizer.add_param_group(bad)  # type: ignore[arg-type]
    assert len(base.param_groups) == 2
    before = third.detach().clone()
    go(model, optimizer, 1)
    assert not torch.equal(first, Bag().items[0]) and not torch.equal(second, Bag().items[1])
    assert torch.equal(third, before)


@every_class
def test_load_hooks_run_in_order_and_may_replace_the_state_dict(info: Any, kwargs: dict[str, Any]) -> None:
    model, optimizer = build(info, kwargs)
    go(model, optimizer, 1)
    events: list[str] = []

    def double(opt: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        events.append("replace")
        saved["param_groups"] = [{**group, "lr": 0.125} for group in saved["param_groups"]]
        return saved

    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: events.append("second"))
    optimizer.register_load_state_dict_pre_hook(double, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: events.append(f"lr {opt.param_groups[0]['lr']}"))
    saved = optimizer.state_dict()
    lr = saved["param_groups"][0]["lr"]
    optimizer.load_state_dict(saved)
    assert events == ["replace", "second", "lr 0.125"]
    assert saved["param_groups"][0]["lr"] == lr


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_wrapped(name: str) -> None:
    model = Bag()
    base = getattr(torch.optim, name)(list(model.parameters()))
    if name == "LBFGS":
        with pytest.raises(TypeError, match="several times a step"):
            BNPreconditioner(base, model)
        return
    optimizer = BNPreconditioner(base, model)  # sparse gradients alone: passes them through
    for p in model.parameters():
        p.grad = torch.ones_like(p).to_sparse()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
