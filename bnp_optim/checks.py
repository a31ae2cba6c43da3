"""Arguments, checked at the door: errors name the argument, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bnp_optim.bases import is_zero, needs_closure
from bnp_optim.discovery import SkipRule, clean_name

__all__ = [
    "check_after_backward",
    "check_decay",
    "check_differentiable",
    "check_following",
    "check_max_norm",
    "check_objects",
    "check_options",
    "check_whole_norm",
    "checked_skip",
]

# Their optimizers' steps unscale, skip, or do nothing while gradients accumulate: ours must not come before
_TRAINERS = ("accelerate", "lightning_fabric", "pytorch_lightning", "lightning")


def check_objects(optimizer: Any, model: Any) -> None:
    """Refuse what is no optimizer or no model, and the ones that cannot work."""
    check_engines(optimizer, model)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: build it first, such as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and any(_is_a(optimizer, trainer) for trainer in _TRAINERS):
        name = type(inner).__name__
        raise TypeError(
            f"optimizer is the {type(optimizer).__name__} that a trainer has made of {name}: wrap {name} before, and "
            f"hand the trainer BNPreconditioner({name}(...), model)"
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"optimizer {type(optimizer).__name__} was made without torch.optim.Optimizer.__init__, so no hooks can be "
            "put on it: wrap the optimizer that it holds, as in PostLocalSGDOptimizer(BNPreconditioner(...), averager)"
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


def check_engines(optimizer: Any, model: Any) -> None:
    """Refuse engines that flatten parameters, or step inside backward: by their names, for none need be installed."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    groups = getattr(optimizer, "param_groups", None) or []
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    parameters += [p for group in groups for p in group["params"]]
    if any(_is_a(x, "deepspeed") for x in (optimizer, *modules)) or any(hasattr(p, "ds_id") for p in parameters):
        raise TypeError(
            "model and optimizer belong to DeepSpeed, whose ZeRO flattens parameters and gradients, so that a layer's "
            "gradient is nowhere to be found: train with torch's fully_shard or DistributedDataParallel"
        )
    if any(_is_a(m, "torch.distributed.fsdp", "FullyShardedDataParallel") for m in modules) or any(
        getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) for p in parameters
    ):
        raise TypeError(
            "model is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters, so that a layer's "
            "gradient is nowhere to be found: use torch.distributed.fsdp.fully_shard (FSDP2), and wrap after it"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in parameters):
        raise TypeError(
            "optimizer holds parameters that are stepped inside backward (_apply_optimizer_in_backward), where a "
            "layer's gradients are never all there: let the optimizer step after backward"
        )


def check_decay(optimizer: Optimizer, form: str) -> None:
    """Refuse the base whose weight decay cannot be told apart from its step."""
    if is_zero(optimizer) and form == "two_sided" and any(g.get("weight_decay", 0) for g in optimizer.param_groups):
        raise ValueError(
            "optimizer is a ZeroRedundancyOptimizer with weight_decay, which in the two-sided form would decay "
            "preconditioned coordinates: set weight_decay=0, use mode='gradient', or shard with fully_shard instead"
        )


def check_after_backward() -> None:
    """Refuse a step that a gradient's hook takes."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "step() was called inside backward, by a hook on a gradient, where the samples and gradients of a step "
            "are not all there: call it after backward"
        )


def check_differentiable(optimizer: Optimizer, *, has_layers: bool) -> None:
    """Refuse to differentiate through the step, which works in place."""
    if has_layers and any(group.get("differentiable", False) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer {type(optimizer).__name__} has differentiable=True, but gradients are preconditioned in "
            "place, which cannot be differentiated: build it with differentiable=False"
        )


def checked_skip(skip: Any, model: nn.Module, name: str = "skip") -> tuple[SkipRule, ...]:
    """The rules of the argument ``name``, each of which fits the model."""
    if isinstance(skip, (str, type, nn.Module)) or not isinstance(skip, Iterable):
        raise TypeError(
            f"{name} must be a collection of module classes, names or modules, got {skip!r}: write {name}=[...]"
        )
    rules = tuple(skip)
    names = {clean_name(n) for n, _ in model.named_modules()}
    for rule in rules:
        if isinstance(rule, str):
            if rule not in names:
                raise ValueError(f"{name} names {rule!r}, which is no module of the model: see model.named_modules()")
        elif not (isinstance(rule, nn.Module) or (isinstance(rule, type) and issubclass(rule, nn.Module))):
            raise TypeError(f"{name} holds {rule!r}: give module classes, names or modules")
    return rules


def check_options(
    stat_decay: Any,
    var_rel_eps: Any,
    var_eps: Any,
    mode: Any,
    step_scale: Any,
    variance: Any,
    stat_interval: Any,
    max_observations: Any,
) -> None:
    """Refuse options of the wrong type or out of their range."""
    check_number("stat_decay", stat_decay, lambda x: 0 <= x < 1, "in [0, 1), such as 0.99")
    check_number("var_rel_eps", var_rel_eps, lambda x: 0 <= x < math.inf, "at least 0, such as 1e-2")
    check_number("var_eps", var_eps, lambda x: 0 < x < math.inf, "above 0, such as 1e-4")
    check_choice("mode", mode, ("auto", "gradient", "two_sided"))
    check_choice("step_scale", step_scale, ("auto", "trace", "common", "spectral", "fan_in", None))
    check_choice("variance", variance, ("total", "batch"))
    whole = "a whole number of at least 1"
    check_number("stat_interval", stat_interval, lambda x: 1 <= x < math.inf and x == int(x), whole)
    if max_observations is not None:
        check_number("max_observations", max_observations, lambda x: 1 <= x < math.inf and x == int(x), whole)


def check_whole_norm(max_norm: Any, *, sharded: bool) -> None:
    """Refuse to clip where no rank holds the norm."""
    if sharded and max_norm is not None:
        raise ValueError(
            f"max_norm is {max_norm!r}, but weights are sharded, so that no rank holds the norm of Pᵀg: leave it None, "
            "and clip g with torch.nn.utils.clip_grad_norm_"
        )


def check_max_norm(max_norm: Any, mode: str) -> None:
    """Refuse what is no norm, and the form that has no Pᵀg to clip."""
    if max_norm is None:
        return
    check_number("max_norm", max_norm, lambda x: 0 < x < math.inf, "above 0, such as 1.0, or None")
    if mode == "gradient":
        raise ValueError(
            f"max_norm is {max_norm!r} with mode='gradient', which has no Pᵀg to clip: leave mode='auto', or clip g "
            "with torch.nn.utils.clip_grad_norm_"
        )


def check_following(follow_inputs: bool, form: str, own_form: str, *, sharded: bool) -> None:
    """Refuse to express anew what a base remembers in w, or what no rank holds."""
    if not follow_inputs:
        return
    if form == "gradient" != own_form:
        raise ValueError(
            "follow_inputs is True with mode='gradient', in which the gradients that the base remembers would stay in "
            "the units of before: leave mode='auto'"
        )
    if sharded:
        raise ValueError("follow_inputs is True, but weights are sharded: normalize the inputs before the model")


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


def _is_a(thing: Any, package: str, name: str = "") -> bool:
    """Whether a class of ``thing`` comes from ``package``, and has that name."""
    return any(
        f"{cls.__module__}.".startswith(f"{package}.") and name in ("", cls.__name__) for cls in type(thing).__mro__
    )
