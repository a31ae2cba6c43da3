"""What the wrapper must know of the optimizer it wraps.

NOTE: the two-sided form runs the base in the coordinates z. Its update is exact if the base computes it from the
gradient alone; then the parameters are set to zero for the call, and what is there afterwards is Δz. Bases that
read the parameter (Adafactor's relative step, LAMB's and LARS's norms) see w instead, and Δz is a difference.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.optim import Optimizer

__all__ = ["BaseTraits", "become_optimizer", "enter", "is_zero", "leave", "leaves_of", "needs_closure", "traits_of"]

Form = Literal["gradient", "two_sided"]
Scale = Literal["trace", "common"]


@dataclass(frozen=True)
class BaseTraits:
    """How to run a base.

    Args:
        form: The form that ``mode="auto"`` picks.
        additive: Whether the update (without weight decay) is a function of the gradients alone.
        decoupled: Given a parameter group: is its weight decay decoupled (``w ← (1 - lr·λ)w``, AdamW) or L2
            (``g ← g + λw``)? None for a base of unknown class, whose decay is left to itself, and for a combination,
            whose leaves know.
        adaptive: Whether it rescales its gradient by entry or matrix, which P Pᵀ would fight.
        scale: What ``step_scale="auto"`` picks.
    """

    form: Form
    additive: bool
    decoupled: Callable[[dict[str, Any]], bool] | None
    adaptive: bool = True
    scale: Scale = "trace"


def _l2(group: dict[str, Any]) -> bool:
    return False


def _always(group: dict[str, Any]) -> bool:
    return True


def _by_flag(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


_ADAPTIVE_L2 = BaseTraits("two_sided", True, _l2)
_BY_FLAG = BaseTraits("two_sided", True, _by_flag)
_TABLE: dict[str, BaseTraits] = {
    "SGD": BaseTraits("gradient", True, _l2, adaptive=False),
    "ASGD": BaseTraits("gradient", False, _l2, adaptive=False),
    "Adam": _BY_FLAG,
    "AdamW": BaseTraits("two_sided", True, _always),
    "NAdam": _BY_FLAG,
    "RAdam": _BY_FLAG,
    "Adagrad": _ADAPTIVE_L2,
    "Adadelta": _ADAPTIVE_L2,
    "Adamax": _ADAPTIVE_L2,
    "RMSprop": _ADAPTIVE_L2,
    "Rprop": _ADAPTIVE_L2,
    "Muon": BaseTraits("two_sided", True, _always, scale="common"),  # torch >= 2.9
    "Adafactor": BaseTraits("two_sided", False, _always),
}
_UNKNOWN = BaseTraits("two_sided", False, None)


def leaves_of(base: Optimizer) -> list[Optimizer]:
    """The optimizers that do the work: those in a CombinedOptimizer (combinations nest), else ``base`` itself."""
    # NOTE: asked by name, since combined.py builds on this file
    parts: tuple[Optimizer, ...] = getattr(base, "_bnp_parts", ())
    return [leaf for part in parts for leaf in leaves_of(part)] or [base]


def traits_of(base: Optimizer) -> BaseTraits:
    """The traits of ``base``: of the class of torch.optim whose ``step`` it runs, else cautious ones.

    A subclass that brings its own ``step`` is another algorithm, unless it descends from SGD: then "auto" still
    picks the gradient form. A combination is two-sided if any of its leaves is: P ties a layer's weight to its
    bias, so both need the same form, and plain SGD takes the same steps in either. One scale for all layers is
    picked if any of its leaves needs it.
    """
    if is_zero(base):  # its own step runs the inner optimizer's, on this rank's share, and its weight decay
        inner = traits_of(base.optim)  # type: ignore[attr-defined]
        return replace(inner, form=inner.form if inner.adaptive else "gradient", additive=False, decoupled=None)
    leaves = leaves_of(base)
    if leaves != [base]:
        traits = [traits_of(leaf) for leaf in leaves]
        form: Form = "two_sided" if any(t.form == "two_sided" for t in traits) else "gradient"
        scale: Scale = "common" if any(t.scale == "common" for t in traits) else "trace"
        return BaseTraits(form, all(t.additive for t in traits), None, any(t.adaptive for t in traits), scale)
    for cls in type(base).__mro__:
        known = _TABLE.get(cls.__name__)
        if known is not None and getattr(torch.optim, cls.__name__, None) is cls:
            # NOTE: torch wraps ``step`` of whichever class is built first, so compare what is inside
            if inspect.unwrap(type(base).step) is inspect.unwrap(cls.step):
                # momentum collected in z follows P; in the gradient form it is a sum of steps of many P
                heavy = any(group.get("momentum", 0) for group in base.param_groups)
                return replace(known, form="two_sided") if known.form == "gradient" and heavy else known
            break
    if isinstance(base, torch.optim.SGD):
        return BaseTraits("gradient", False, None, adaptive=False)
    # there are many Muons; how they decay may differ, but not that a step has one size
    return replace(_UNKNOWN, scale="common") if any("Muon" in cls.__name__ for cls in type(base).__mro__) else _UNKNOWN


def is_zero(base: Optimizer) -> bool:
    """Whether ``base`` is torch's ZeroRedundancyOptimizer, by name: importing it takes long."""
    return any(
        c.__name__ == "ZeroRedundancyOptimizer" and c.__module__.startswith("torch.") for c in type(base).__mro__
    )


def needs_closure(base: Optimizer) -> bool:
    """Whether ``base`` evaluates the loss itself (LBFGS), several times a step."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return isinstance(base, torch.optim.LBFGS) or required


def enter(base: Optimizer) -> Callable[[], Any]:
    """Fire the base's own step pre-hooks, which see the raw gradients, and return its bare step.

    Global hooks have fired for the wrapper already. A step that somebody patched onto the instance is left whole.
    """
    patched = base.__dict__.get("step")
    if _is_foreign(patched):
        return base.step
    if patched is not None:
        base._opt_called = True  # type: ignore[attr-defined]  # what a scheduler's patch is there for
    step: Any = type(base).step
    args: tuple[Any, ...] = (base,)
    kwargs: dict[str, Any] = {}
    for pre_hook in base._optimizer_step_pre_hooks.values():
        args, kwargs = pre_hook(base, args, kwargs) or (args, kwargs)
    parts: tuple[Optimizer, ...] = getattr(base, "_bnp_parts", ())
    if parts:
        steps = [enter(part) for part in parts]
        return lambda: [run() for run in steps]
    return functools.partial(step.__wrapped__ if getattr(step, "hooked", False) else step, *args, **kwargs)


def leave(base: Optimizer) -> None:
    """Fire the base's own step post-hooks."""
    for part in getattr(base, "_bnp_parts", ()):
        leave(part)
    if not _is_foreign(base.__dict__.get("step")):
        for post_hook in base._optimizer_step_post_hooks.values():
            post_hook(base, (base,), {})


def _is_foreign(patched: Any) -> bool:
    """Whether ``step`` was patched on the instance by anyone but a learning-rate scheduler."""
    return patched is not None and not hasattr(patched, "_wrapped_by_lr_sched")


def become_optimizer(wrapper: Optimizer) -> None:
    """What ``Optimizer.__init__`` does, but for groups and state: those are the wrapped optimizers' own."""
    wrapper._optimizer_step_pre_hooks = OrderedDict()
    wrapper._optimizer_step_post_hooks = OrderedDict()
    wrapper._optimizer_state_dict_pre_hooks = OrderedDict()
    wrapper._optimizer_state_dict_post_hooks = OrderedDict()
    wrapper._optimizer_load_state_dict_pre_hooks = OrderedDict()
    wrapper._optimizer_load_state_dict_post_hooks = OrderedDict()
    wrapper._patch_step_function()
