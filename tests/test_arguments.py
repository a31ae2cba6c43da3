"""Bad arguments are refused at the door, by a message that says what to do, before anything is attached."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner, register_layer
from tests.conftest import backward, hook_count, inputs, mlp, train


@pytest.mark.parametrize(
    ("name", "value", "error", "remedy"),
    [
        ("stat_decay", "0.9", TypeError, "such as 0.99"),
        ("stat_decay", None, TypeError, "such as 0.99"),
        ("stat_decay", True, TypeError, "such as 0.99"),
        ("stat_decay", 1.0, ValueError, "in [0, 1)"),
        ("stat_decay", -0.1, ValueError, "in [0, 1)"),
        ("stat_decay", float("nan"), ValueError, "in [0, 1)"),
        ("var_rel_eps", "1e-2", TypeError, "such as 1e-2"),
        ("var_rel_eps", -1e-9, ValueError, "at least 0"),
        ("var_rel_eps", float("inf"), ValueError, "at least 0"),
        ("var_eps", None, TypeError, "such as 1e-4"),
        ("var_eps", 0.0, ValueError, "above 0"),
        ("var_eps", float("nan"), ValueError, "above 0"),
        ("mode", "both", ValueError, "one of 'auto', 'gradient', 'two_sided'"),
        ("mode", None, ValueError, "one of 'auto', 'gradient', 'two_sided'"),
        ("step_scale", "norm", ValueError, "one of 'auto', 'trace', 'common', 'spectral', 'fan_in', None"),
        ("step_scale", 1.0, ValueError, "one of 'auto', 'trace', 'common', 'spectral', 'fan_in', None"),
        ("variance", "none", ValueError, "one of 'total', 'batch'"),
        ("stat_interval", 0, ValueError, "a whole number of at least 1"),
        ("stat_interval", 1.5, ValueError, "a whole number of at least 1"),
        ("stat_interval", float("inf"), ValueError, "a whole number of at least 1"),
        ("stat_interval", "2", TypeError, "a whole number of at least 1"),
        ("skip", 3, TypeError, "skip=[...]"),
        ("skip", None, TypeError, "skip=[...]"),
        ("skip", "0", TypeError, "skip=[...]"),
        ("skip", nn.Linear, TypeError, "skip=[...]"),
        ("skip", [3], TypeError, "classes, names or modules"),
        ("skip", [int], TypeError, "classes, names or modules"),
        ("skip", ["no.such.layer"], ValueError, "named_modules()"),
    ],
)
def test_a_bad_value_is_named_with_its_argument_and_a_remedy(
    name: str, value: Any, error: type[Exception], remedy: str
) -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error) as caught:
        BNPreconditioner(base, model, **{name: value})
    shown = repr(value[0]) if isinstance(value, list) else repr(value)
    for part in (name, shown, remedy):
        assert part in str(caught.value)
    assert hook_count(model) == 0 and "step" not in vars(base)


def _lbfgs(model: nn.Module) -> Optimizer:
    return torch.optim.LBFGS(model.parameters())


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda m: (None, m), ("optimizer must be", "NoneType", "torch.optim.SGD(model.parameters()")),
        (lambda m: (m.parameters(), m), ("optimizer must be", "generator", "torch.optim.SGD(model.parameters()")),
        (lambda m: (torch.optim.SGD, m), ("optimizer must be", "type", "torch.optim.SGD(model.parameters()")),
        (lambda m: (_lbfgs(m), m), ("LBFGS", "several times a step", "SGD or AdamW")),
        (lambda m: (NeedsClosure(m.parameters()), m), ("NeedsClosure", "several times a step", "SGD or AdamW")),
        (lambda m: (torch.optim.SGD(m.parameters()), m(inputs(1)[0])), ("model must be", "Tensor", "pass the module")),
        (lambda m: (torch.optim.SGD(m.parameters()), list(m)), ("model must be", "list", "pass the module")),
        (
            lambda m: (torch.optim.SGD(m.parameters()), nn.DataParallel(m)),
            ("nn.DataParallel", "model.module"),
        ),
    ],
    ids=["none", "parameters", "class", "lbfgs", "closure", "output", "list", "data parallel"],
)
def test_what_is_no_optimizer_or_no_model_is_refused(build: Any, parts: tuple[str, ...]) -> None:
    model = mlp()
    optimizer, wrong = build(model)
    with pytest.raises(TypeError) as caught:
        BNPreconditioner(optimizer, wrong)
    assert all(part in str(caught.value) for part in parts)
    assert hook_count(model) == 0


def test_wrapping_twice_is_refused() -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match="already a BNPreconditioner: wrap the base optimizer once"):
        BNPreconditioner(optimizer, model)
    assert hook_count(model) == 2


def test_a_generator_of_skip_rules_is_not_used_up_by_the_check() -> None:
    model = mlp()
    optimizer = BNPreconditioner(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        skip=(name for name in ["0"]),  # type: ignore[arg-type]
    )
    assert list(optimizer.statistics) == ["2"]


def test_options_may_be_given_to_the_papers_letter() -> None:
    model = mlp()
    optimizer = BNPreconditioner.paper(torch.optim.SGD(model.parameters(), lr=0.1), model, stat_decay=0.5)
    (x,) = inputs(1)
    train(model, optimizer, [x])
    found = optimizer.statistics["0"]
    torch.testing.assert_close(found.mean, 0.5 * x.mean(0))
    torch.testing.assert_close(found.variance, 0.5 + 0.5 * x.var(0, correction=0))
    with pytest.raises(ValueError, match="stat_decay"):
        BNPreconditioner.paper(torch.optim.SGD(model.parameters(), lr=0.1), model, stat_decay=2)


@pytest.mark.parametrize(("module_type", "adapter"), [(nn.Linear(1, 1), None), (int, None), (nn.Linear, None)])
def test_register_layer_names_what_is_wrong(module_type: Any, adapter: Any) -> None:
    with pytest.raises(TypeError, match=r"module_type must be|adapter must be"):
        register_layer(module_type, adapter)


# ---- warnings, each once -------------------------------------------------------------------------


def caught_in(act: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught]


def test_a_model_that_does_not_match_the_optimizer_warns_once() -> None:
    model, other = mlp(), mlp()

    def act() -> None:
        optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), other)
        train(model, optimizer, inputs(3))
        optimizer.rescan()

    (message,) = caught_in(act)
    assert "no layer of the Sequential has its weight in the groups of the SGD" in message
    assert "built from this model's parameters" in message


def test_the_gradient_form_in_an_adaptive_base_warns_once() -> None:
    model = mlp()

    def act() -> None:
        train(model, BNPreconditioner(torch.optim.Adam(model.parameters()), model, mode="gradient"), inputs(3))

    (message,) = caught_in(act)
    assert "mode='gradient' feeds P Pᵀ g to Adam" in message and "mode='auto'" in message


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.ASGD, torch.optim.AdamW])
def test_defaults_do_not_warn(base: Any) -> None:
    model = mlp()
    assert caught_in(lambda: train(model, BNPreconditioner(base(model.parameters(), lr=0.1), model), inputs(2))) == []


def test_gradients_without_a_forward_warn_once_and_pass_through() -> None:
    """What a model looks like that was compiled, and called, before it was wrapped."""
    model = mlp()
    x = inputs(1)[0]
    output = model(x)
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = [p.detach().clone() for p in model.parameters()]
    output.square().mean().backward()
    raw = [p.grad.clone() for p in model.parameters()]
    messages = caught_in(lambda: [optimizer.step() for _ in range(2)])
    assert len(messages) == 1 and "no forward pass of any preconditioned layer was seen" in messages[0]
    for p, w, g in zip(model.parameters(), before, raw, strict=True):
        assert torch.equal(p.detach(), w.sub(g, alpha=0.1).sub(g, alpha=0.1))


def test_a_step_of_rate_zero_without_a_forward_does_not_warn() -> None:
    """torch.distributed.checkpoint takes one to create the base's state."""
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.Adam(model.parameters(), lr=0.0), model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert caught_in(optimizer.step) == []
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.1
    backward(model, inputs(1)[0])
    assert caught_in(optimizer.step) == []
