"""Weight decay regularizes w, whichever coordinates the base runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.transform import from_z, precondition, to_z
from tests.conftest import backward, inputs, takes, train, weights

LR, DECAY = 0.01, 0.3


def net() -> nn.Sequential:
    """Layers and parameters that belong to none, in one group."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))


def transformed(optimizer: BNPreconditioner, transform: Callable[..., None], gradients: list[Tensor]) -> list[Tensor]:
    """``gradients`` of ``net()`` after ``transform`` with the present statistics, by hand."""
    result = [g.clone() for g in gradients]
    first, last = (optimizer._tracker.factors(layer) for layer in optimizer._tracker.layers)
    transform(result[0].unsqueeze(0), result[1].unsqueeze(0), first)
    transform(result[4].unsqueeze(0), None, last)
    return result


def feed(base: Optimizer) -> list[Tensor]:
    """The gradients that the base's first moment took in at its first step."""
    beta = base.param_groups[0]["betas"][0]
    return [base.state[p]["exp_avg"] / (1 - beta) for group in base.param_groups for p in group["params"]]


DECOUPLED: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"decoupled_weight_decay": True},
    "NAdam": {"decoupled_weight_decay": True},
    "RAdam": {"decoupled_weight_decay": True},
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_decay_shrinks_w_by_exactly_one_factor(name: str, foreach: bool, maximize: bool) -> None:
    missing = [option for option in DECOUPLED[name] if not takes(name, option)]
    if missing:
        pytest.skip(f"this torch's {name} has no {missing[0]}")
    model = net()
    base = getattr(torch.optim, name)(
        model.parameters(), lr=LR, weight_decay=DECAY, foreach=foreach, maximize=maximize, **DECOUPLED[name]
    )
    optimizer = BNPreconditioner(base, model)
    with torch.no_grad():  # warm, far from P = I, but without moments in the base
        for p in model.parameters():
            p.add_(0.1)
    lr, base.param_groups[0]["lr"] = LR, 0.0
    train(model, optimizer, inputs(3))
    base.param_groups[0]["lr"] = lr
    base.state.clear()
    before = weights(model)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, value in weights(model).items():
        assert torch.equal(value, before[key] * (1 - LR * DECAY)), key


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_l2_decay_enters_before_the_change_of_coordinates(foreach: bool, maximize: bool) -> None:
    """The base is fed Pᵀ(g + λw); parameters outside layers g + λw, by the base itself. Ascent feeds Pᵀ(-g + λw)."""
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=DECAY, foreach=foreach, maximize=maximize)
    optimizer = BNPreconditioner(base, model)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, inputs(1)[0])
    sign = -1 if maximize else 1
    expected = [sign * p.grad + DECAY * w for p, w in zip(model.parameters(), before, strict=True)]
    optimizer.step()
    expected = transformed(optimizer, to_z, expected)
    for found, value in zip(feed(base), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_in_the_gradient_form_adds_decay_after_the_preconditioning(maximize: bool) -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY, maximize=maximize)
    optimizer = BNPreconditioner(base, model)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, inputs(1)[0])
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    sign = -1 if maximize else 1
    for w, old, g in zip(model.parameters(), before, transformed(optimizer, precondition, gradients), strict=True):
        torch.testing.assert_close(w.detach(), old - LR * (sign * g + DECAY * old), rtol=1e-6, atol=1e-8)


def test_groups_with_different_decays_keep_their_own() -> None:
    """As everybody writes it: decay for the matrices, none for the rest; and a rate of its own for the last layer."""
    model = net()
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.5},
        {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0.0},
        {"params": [model[2].weight], "weight_decay": 0.1, "lr": 0.2},
    ]
    base = torch.optim.AdamW(groups, lr=LR)
    optimizer = BNPreconditioner(base, model)
    before = weights(model)
    backward(model, inputs(1)[0])
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert optimizer.statistics["2"].count == 8  # preconditioned indeed
    factors = {"0.weight": 1 - LR * 0.5, "2.weight": 1 - 0.2 * 0.1}
    for key, value in weights(model).items():
        assert torch.equal(value, before[key] * factors.get(key, 1.0)), key


class Broken(torch.optim.AdamW):
    """Runs AdamW's step, whose state initialization raises."""

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = [dict(group) for group in self.param_groups]
        super()._init_group(*args, **kwargs)
        raise RuntimeError("out of memory")


def test_the_groups_are_the_users_own_again_when_the_base_raises() -> None:
    model = net()
    base = Broken(model.parameters(), lr=LR, weight_decay=DECAY)
    optimizer = BNPreconditioner(base, model)
    groups, group = base.param_groups, base.param_groups[0]
    members = list(group["params"])
    before = weights(model)
    backward(model, inputs(1)[0])
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert [g["weight_decay"] for g in base.seen] == [0.0, DECAY]  # what it had to work with
    assert base.param_groups is groups and groups == [group] and groups[0] is group
    assert group["weight_decay"] == DECAY and all(a is b for a, b in zip(group["params"], members, strict=True))
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), key


def test_the_groups_are_the_users_own_again_after_a_step() -> None:
    model = net()
    base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    optimizer = BNPreconditioner(base, model)
    groups, group = base.param_groups, base.param_groups[0]
    train(model, optimizer, inputs(2))
    assert optimizer.param_groups is base.param_groups is groups
    assert len(groups) == 1 and groups[0] is group and group["weight_decay"] == DECAY
    assert len(group["params"]) == 5


class SignSGD(Optimizer):
    """A base of unknown class: w ← (1 - lr·λ)w - lr·sign(g). Keeps what it saw."""

    def __init__(self, params: Any, lr: float = LR, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen = []
        for group in self.param_groups:
            for p in group["params"]:
                self.seen.append(p.detach().clone())
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])


def test_a_base_of_unknown_class_sees_w_and_warns_of_its_decay_once() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"SignSGD is no optimizer of torch\.optim") as caught:
        optimizer = BNPreconditioner(SignSGD(model.parameters(), weight_decay=DECAY), model)
    assert len(caught) == 1
    assert "weight_decay=0" in str(caught[0].message)
    train(model, optimizer, inputs(3))  # no second one: warnings are errors
    before = [w.clone() for w in model.parameters()]
    optimizer.zero_grad()
    backward(model, inputs(1)[0])
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.base_optimizer.seen, strict=True))


def test_a_base_of_unknown_class_moves_w_by_p_times_its_update() -> None:
    model = net()
    optimizer = BNPreconditioner(SignSGD(model.parameters()), model)  # no decay, no warning
    before = [w.detach().clone() for w in model.parameters()]
    backward(model, inputs(1)[0])
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    fed = transformed(optimizer, to_z, gradients)
    expected = transformed(optimizer, from_z, [-LR * g.sign() for g in fed])
    for w, old, move in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(w.detach() - old, move, rtol=0, atol=2e-7)
