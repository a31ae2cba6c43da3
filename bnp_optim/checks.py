"""Arguments, checked at the door: errors name the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from bnp_optim.bases import needs_closure
from bnp_optim.discovery import SkipRule, clean_name

__all__ = ["check_choice", "check_differentiable", "check_number", "check_objects", "checked_skip"]

# Their optimizers' steps unscale, skip, or do nothing while gradients accumulate: ours must not come before
_TRAINERS = ("accelerate", "lightning_fabric", "pytorch_lightning", "lightning")


def check_objects(optimizer: Any, model: Any) -> None:
    """Refuse what is no optimizer or no model, and the ones that cannot work."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: build it first, such as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and any(_package(cls) in _TRAINERS for cls in type(optimizer).__mro__):
        name = type(inner).__name__
        raise TypeError(
            f"optimizer is the {type(optimizer).__name__} that a trainer has made of {name}: wrap {name} before, and "
            f"hand the trainer BNPreconditioner({name}(...), model)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the module, not its output")
    if needs_closure(optimizer):
        raise TypeError(
            f"optimizer {type(optimizer).__name__} evaluates the loss several times a step, so no gradient can be "
            "preconditioned for it: use a first-order optimizer such as SGD or AdamW"
        )
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        raise TypeError(
            "model contains nn.DataParallel, which trains replicas that no hook can follow: train on one device, "
            "with the module inside it (model.module)"
        )


def check_differentiable(optimizer: Optimizer, *, has_layers: bool) -> None:
    """Refuse to differentiate through the step, which works in place."""
    if has_layers and any(group.get("differentiable", False) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer {type(optimizer).__name__} has differentiable=True, but gradients are preconditioned in "
            "place, which cannot be differentiated: build it with differentiable=False"
        )


def checked_skip(skip: Any, model: nn.Module) -> tuple[SkipRule, ...]:
    """The rules of ``skip``, each of which fits the model."""
    if isinstance(skip, (str, type, nn.Module)) or not isinstance(skip, Iterable):
        raise TypeError(
            f"skip must be a collection of module classes, names or modules, got {skip!r}: write skip=[...]"
        )
    rules = tuple(skip)
    names = {clean_name(name) for name, _ in model.named_modules()}
    for rule in rules:
        if isinstance(rule, str):
            if rule not in names:
                raise ValueError(f"skip names {rule!r}, which is no module of the model: see model.named_modules()")
        elif not (isinstance(rule, nn.Module) or (isinstance(rule, type) and issubclass(rule, nn.Module))):
            raise TypeError(f"skip holds {rule!r}: give module classes, names or modules")
    return rules


def check_number(name: str, value: Any, valid: Callable[[float], bool], remedy: str) -> None:
    """Refuse what is no number, or not a valid one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, it must be a number {remedy}")
    if not valid(value):
        raise ValueError(f"{name} is {value!r}, it must be {remedy}")


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(map(repr, choices))}")


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
