"""What the wrapper must know of the optimizer it wraps.

NOTE: the two-sided form runs the base in the coordinates z. Its update is exact if the base computes it from the
gradient alone; then the parameters are set to zero for the call, and what is there afterwards is Δz. Bases that
read the parameter (Adafactor's relative step, LAMB's and LARS's norms) see w instead, and Δz is a difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

__all__ = ["BaseTraits", "needs_closure", "traits_of"]

Form = Literal["gradient", "two_sided"]


@dataclass(frozen=True)
class BaseTraits:
    """How to run a base.

    Args:
        form: The form that ``mode="auto"`` picks.
        additive: Whether the update (without weight decay) is a function of the gradients alone.
        decoupled: Given a parameter group: is its weight decay decoupled (``w ← (1 - lr·λ)w``, AdamW) or L2
            (``g ← g + λw``)? None for a base of unknown class, whose decay is left to itself.
        adaptive: Whether it rescales its gradient by entry or matrix, which P Pᵀ would fight.
    """

    form: Form
    additive: bool
    decoupled: Callable[[dict[str, Any]], bool] | None
    adaptive: bool = True


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
    "Muon": BaseTraits("two_sided", True, _always),  # torch >= 2.9
    "Adafactor": BaseTraits("two_sided", False, _always),
}
_UNKNOWN = BaseTraits("two_sided", False, None)


def traits_of(base: Optimizer) -> BaseTraits:
    """The traits of ``base``: of the class of torch.optim whose ``step`` it runs, else cautious ones.

    A subclass that brings its own ``step`` is another algorithm, unless it descends from SGD: then "auto" still
    picks the gradient form.
    """
    for cls in type(base).__mro__:
        if "step" in vars(cls):
            known = _TABLE.get(cls.__name__) if getattr(torch.optim, cls.__name__, None) is cls else None
            if known is not None:
                return known
            break
    if isinstance(base, torch.optim.SGD):
        return BaseTraits("gradient", False, None, adaptive=False)
    return _UNKNOWN


def needs_closure(base: Optimizer) -> bool:
    """Whether ``base`` evaluates the loss itself (LBFGS), several times a step."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return isinstance(base, torch.optim.LBFGS) or required
