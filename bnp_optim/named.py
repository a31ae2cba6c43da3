"""BNPSGD, BNPAdam, BNPAdamW: base and wrapper in one class, for clients that build optimizers from parameters alone.

The signatures are written out, for IDEs and for tools that read them (jsonargparse, and so LightningCLI).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim.discovery import SkipRule
from bnp_optim.ownership import find_model
from bnp_optim.preconditioner import BNPreconditioner, Mode, StepScale, Variance

__all__ = ["BNPSGD", "BNPAdam", "BNPAdamW", "NamedOptimizer", "Params", "apart", "found"]

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
_WRAPPER = [p.name for p in inspect.signature(BNPreconditioner).parameters.values() if p.kind is p.KEYWORD_ONLY]


def apart(params: Any, model: nn.Module | None) -> tuple[Any, nn.Module | None]:
    """Parameters and model, where ``params`` may be the model itself."""
    if isinstance(params, nn.Module):
        return params.parameters(), params if model is None else model
    return params, model


def found(optimizer: Optimizer, *rules: Any) -> nn.Module:
    """The model of the optimizer's parameters, in which the names among ``rules`` make sense."""
    names = [rule for some in rules if isinstance(some, Collection) for rule in some if isinstance(rule, str)]
    return find_model([p for group in optimizer.param_groups for p in group["params"]], names)


class NamedOptimizer(BNPreconditioner):
    """What BNPSGD and its like have in common: they build the base, and find the model."""

    @classmethod
    def paper(cls, params: Params, **options: Any) -> BNPreconditioner:  # type: ignore[override]
        """The paper's letter, as :meth:`BNPreconditioner.paper`; ``options`` are those of the class."""
        letter: dict[str, Any] = {"mode": "gradient", "step_scale": "fan_in", "debias": False, "variance": "batch"}
        return cls(params, **(letter | options))  # type: ignore[arg-type]

    def _build(self, given: dict[str, Any], base: type[Optimizer] | Callable[..., Optimizer]) -> None:
        """Build the base, then the wrapper; ``given`` are the arguments of ``__init__``, all of them."""
        params, model = apart(given["params"], given["model"])
        own = inspect.signature(type(self).__init__).parameters
        known = inspect.signature(base).parameters
        options = {
            key: given[key]
            for key in own
            if key not in ("self", "params", "model", *_WRAPPER)
            # an option that this torch does not have yet is left out, unless it was asked for
            and (key in known or given[key] is not own[key].default)
        }
        optimizer = base(params, **options)  # consumes a generator; its groups say what was in it
        if model is None:
            model = found(optimizer, given["skip"])
        BNPreconditioner.__init__(self, optimizer, model, **{key: given[key] for key in _WRAPPER})


class BNPSGD(NamedOptimizer):
    """``torch.optim.SGD`` inside a :class:`BNPreconditioner`.

        optimizer = BNPSGD(model, lr=0.1)
        optimizer = BNPSGD(model.parameters(), lr=0.1, model=model)  # parameters, names or groups
        optimizer = BNPSGD(model.parameters(), lr=0.1)  # looks for the modules that own them

    Args up to ``fused`` are SGD's with SGD's defaults, those after ``model`` are BNPreconditioner's. ``lr`` is 1e-3 by
    default as in torch, so that the class can be swapped for SGD; 0.1 (without momentum) is where to start.

    Args:
        params: The model itself, or what ``torch.optim.SGD`` takes.
        model: Where the layers are. None: the smallest live module that contains the owners of all ``params``, found
            by a look at all live objects. If ``skip`` has names, the smallest in which they name modules.

    Raises:
        ValueError: if ``model`` is None and a parameter belongs to modules without a common parent.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        model: nn.Module | None = None,
        stat_decay: float = 0.99,
        var_rel_eps: float = 1e-2,
        var_eps: float = 1e-4,
        mode: Mode = "auto",
        step_scale: StepScale | None = "auto",
        debias: bool = True,
        variance: Variance = "total",
        max_norm: float | None = None,
        follow_inputs: bool = False,
        stat_interval: int = 1,
        max_observations: int | None = None,
        compiled: bool = False,
        skip: Collection[SkipRule] = (),
        process_group: Any = None,
    ) -> None:
        self._build(locals(), torch.optim.SGD)


class BNPAdam(NamedOptimizer):
    """``torch.optim.Adam`` inside a :class:`BNPreconditioner`; arguments as for :class:`BNPSGD`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        model: nn.Module | None = None,
        stat_decay: float = 0.99,
        var_rel_eps: float = 1e-2,
        var_eps: float = 1e-4,
        mode: Mode = "auto",
        step_scale: StepScale | None = "auto",
        debias: bool = True,
        variance: Variance = "total",
        max_norm: float | None = None,
        follow_inputs: bool = False,
        stat_interval: int = 1,
        max_observations: int | None = None,
        compiled: bool = False,
        skip: Collection[SkipRule] = (),
        process_group: Any = None,
    ) -> None:
        self._build(locals(), torch.optim.Adam)


class BNPAdamW(NamedOptimizer):
    """``torch.optim.AdamW`` inside a :class:`BNPreconditioner`; arguments as for :class:`BNPSGD`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        model: nn.Module | None = None,
        stat_decay: float = 0.99,
        var_rel_eps: float = 1e-2,
        var_eps: float = 1e-4,
        mode: Mode = "auto",
        step_scale: StepScale | None = "auto",
        debias: bool = True,
        variance: Variance = "total",
        max_norm: float | None = None,
        follow_inputs: bool = False,
        stat_interval: int = 1,
        max_observations: int | None = None,
        compiled: bool = False,
        skip: Collection[SkipRule] = (),
        process_group: Any = None,
    ) -> None:
        self._build(locals(), torch.optim.AdamW)
