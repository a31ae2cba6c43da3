"""The coordinates an optimizer descends in: ``v ↦ Sᵀ H S v`` for ``w = S z``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from bnp_optim.application import Task, apply_to_all
from bnp_optim.curvature.operators import CurvatureOperator
from bnp_optim.curvature.vectors import flatten, trained, unflatten
from bnp_optim.preconditioner import BNPreconditioner
from bnp_optim.transform import Factors, from_z, to_z

__all__ = [
    "AdamCoordinates",
    "BNPCoordinates",
    "Coordinates",
    "PreconditionedOperator",
    "Preconditioner",
    "as_coordinates",
    "coordinates_of",
]


class Coordinates(Protocol):
    """A linear change of variables ``w = S z`` on tensors shaped like the parameters."""

    @property
    def description(self) -> str:
        """For reports."""

    def from_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``S z``, as fresh tensors."""

    def to_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``Sᵀ g``, as fresh tensors."""


class BNPCoordinates:
    """BNP's ``P`` and ``Pᵀ``, by the optimizer's own code, with its statistics as they are now.

    Identity for parameters of no layer, of a layer that is frozen, has no statistics yet, or whose weight is not
    among ``params``. A bias that takes no part (frozen, another optimizer's, not among ``params``) is left as it is,
    and its weight gets the rank-one P: that is the matrix for biases that stay where they are.

    Args:
        params: The parameters, in the operator's order.
        preconditioner: The optimizer. Later steps of it do not change these coordinates.
    """

    def __init__(self, params: Iterable[Tensor], preconditioner: BNPreconditioner) -> None:
        self.preconditioner = preconditioner
        self._params = trained(params)
        index = {id(p): i for i, p in enumerate(self._params)}
        owned = {id(p) for group in preconditioner.param_groups for p in group["params"]}
        tracker = preconditioner._tracker
        self._layers: list[tuple[Any, int, int | None, Factors]] = []
        for layer in tracker.layers:
            weight, bias = layer.weight, layer.bias
            if weight is None or layer not in tracker.ready or id(weight) not in index or id(weight) not in owned:
                continue
            takes_part = bias is not None and id(bias) in owned
            self._layers.append(
                (layer, index[id(weight)], index.get(id(bias)) if takes_part else None, _copied(tracker.factors(layer)))
            )
        covered = {i for _, weight_at, bias_at, _ in self._layers for i in (weight_at, bias_at) if i is not None}
        self.num_preconditioned = sum(self._params[i].numel() for i in covered)

    @property
    def description(self) -> str:
        """How much of the parameters P acts on."""
        return f"BNP's P on {self.num_preconditioned} of {sum(p.numel() for p in self._params)} parameters"

    def from_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``P z``."""
        return self._apply(from_z, tensors)

    def to_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``Pᵀ g``."""
        return self._apply(to_z, tensors)

    def _apply(self, transform: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        fresh = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        tasks: list[Task] = [
            (layer.adapter, layer.rows, fresh[weight], None if bias is None else fresh[bias], factors)
            for layer, weight, bias, factors in self._layers
        ]
        with torch.no_grad():
            apply_to_all(transform, tasks)
        return fresh


def _copied(f: Factors) -> Factors:
    """The bank reuses its tensors at each step."""
    return Factors(f.mean.clone(), f.inv_std.clone(), f.q2.clone(), f.spread.clone())


class AdamCoordinates:
    """``D^(-1/2)`` of Adam's second moments, ``D = √v̂ + ε``: Adam without momentum is gradient descent there.

    The matrix ``D^(-1/2) H D^(-1/2)`` has the eigenvalues of ``D⁻¹H`` that decide whether Adam's steps are stable
    (J. Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022). Parameters without state, whose
    gradient never came, are left as they are.

    Args:
        params: The parameters, in the operator's order.
        optimizer: A ``torch.optim.Adam`` or ``AdamW`` after at least one step, wrapped or not. A wrapped one in the
            two-sided form keeps its moments in z: apply these coordinates *after* BNP's (:func:`coordinates_of` does).

    Raises:
        TypeError: if the optimizer is another one.
        ValueError: if it has made no step yet.
    """

    def __init__(self, params: Iterable[Tensor], optimizer: Optimizer) -> None:
        base = optimizer.base_optimizer if isinstance(optimizer, BNPreconditioner) else optimizer
        if not isinstance(base, (Adam, AdamW)):
            raise TypeError(f"optimizer is a {type(base).__name__}, it must be a torch.optim.Adam or AdamW")
        groups = {id(p): group for group in base.param_groups for p in group["params"]}
        self._scales: list[Tensor | None] = []
        for p in trained(params):
            state, group = base.state.get(p), groups.get(id(p))
            self._scales.append(_adam_scale(state, group) if state and group else None)
        if all(scale is None for scale in self._scales):
            raise ValueError("optimizer has no state for any of params: let it make a step first")

    @property
    def description(self) -> str:
        """For reports."""
        return "Adam's diagonal"

    def from_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``D^(-1/2) z``."""
        return [t.clone() if s is None else t * s.to(t.dtype) for t, s in zip(tensors, self._scales, strict=True)]

    to_z = from_z


def _adam_scale(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    second: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    wide = torch.promote_types(second.dtype, torch.float32)
    return torch.rsqrt((second.to(wide) / correction).sqrt() + float(group["eps"]))


Preconditioner: TypeAlias = "BNPreconditioner | Coordinates | Sequence[Coordinates] | None"


def as_coordinates(preconditioner: Preconditioner, params: Sequence[Tensor]) -> list[Coordinates]:
    """The changes of variables in the order ``w = S₁ S₂ … z``.

    Raises:
        TypeError: if ``preconditioner`` is none of the kinds.
    """
    if preconditioner is None:
        return []
    if isinstance(preconditioner, BNPreconditioner):
        return [BNPCoordinates(params, preconditioner)]
    many: list[Any] = list(preconditioner) if isinstance(preconditioner, (list, tuple)) else [preconditioner]
    for x in many:
        if not (hasattr(x, "from_z") and hasattr(x, "to_z")):
            raise TypeError(
                f"preconditioner is {x!r}, it must be a BNPreconditioner, or coordinates such as AdamCoordinates; "
                "coordinates_of(optimizer, params) makes them for a torch optimizer"
            )
    return many


def coordinates_of(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Coordinates]:
    """The coordinates in which ``optimizer`` is gradient descent, with or without momentum.

    None for SGD, Adam's diagonal for Adam and AdamW, and BNP's P before them where they are wrapped.

    Args:
        optimizer: SGD, Adam or AdamW of torch.optim, wrapped in a BNPreconditioner or not.
        params: The parameters, in the operator's order.

    Raises:
        TypeError: if it is another optimizer.
        ValueError: if Adam has made no step yet, or runs inside BNP's gradient form, whose matrix is not symmetric in
            any coordinates.
    """
    params = trained(params)
    found: list[Coordinates] = []
    base = optimizer
    if isinstance(optimizer, BNPreconditioner):
        found.append(BNPCoordinates(params, optimizer))
        base = optimizer.base_optimizer
    if isinstance(base, torch.optim.SGD):
        return found
    if isinstance(optimizer, BNPreconditioner) and optimizer._form == "gradient":
        raise ValueError(
            "optimizer runs Adam on P Pᵀg (mode='gradient'), which is no gradient descent in any coordinates: use "
            "mode='two_sided'"
        )
    return [*found, AdamCoordinates(params, base)]


class PreconditionedOperator:
    """``v ↦ Sᵀ H S v``: the curvature in the coordinates ``w = S z``.

    A BNPreconditioner among them does not measure during a product.

    Args:
        operator: H, or another matrix.
        preconditioner: A BNPreconditioner, coordinates, or several of them in the order ``w = S₁ S₂ … z``.
    """

    def __init__(self, operator: CurvatureOperator, preconditioner: Preconditioner) -> None:
        self.operator = operator
        self.coordinates = as_coordinates(preconditioner, operator.params)

    @property
    def size(self) -> int:
        """Number of parameters ``n``."""
        return self.operator.size

    @property
    def dtype(self) -> torch.dtype:
        """Of flat vectors."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Of flat vectors."""
        return self.operator.device

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a flat vector (n,)."""
        tensors = unflatten(vector.detach(), self.operator.params)
        for s in reversed(self.coordinates):
            tensors = s.from_z(tensors)
        with ExitStack() as stack:
            for s in self.coordinates:
                if isinstance(s, BNPCoordinates):
                    stack.enter_context(s.preconditioner.pause_statistics())
            tensors = self.operator.product(tensors)
        for s in self.coordinates:
            tensors = s.to_z(tensors)
        return flatten(tensors, vector)
