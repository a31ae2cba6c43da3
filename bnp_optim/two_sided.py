"""The two-sided form: run the base optimizer in the coordinates z, where w = P z.

The base is fed Pᵀg; the update Δz that it makes is mapped back, w ← w + P Δz. Weight decay stays the
regularization of w: decoupled decay multiplies w itself, L2 decay enters as Pᵀ(g + λw), and the base's own is off
for that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bnp_optim.application import Task, add_on_rows, apply_to_all, gradient_task
from bnp_optim.bases import BaseTraits, leaves_of, traits_of
from bnp_optim.places import LiveLayer
from bnp_optim.sharding.blocks import ColumnFactors, local
from bnp_optim.sharding.columns import over_columns
from bnp_optim.transform import Factors, from_z, to_z

__all__ = ["ZCoordinates"]


class ZCoordinates:
    """Runs a base in z. Keeps one buffer per parameter, which holds Δz during a step.

    Args:
        base: The base optimizer.
        apply: Runs a transform on all layers.
        max_norm: Clip the norm of Pᵀg at this; None: do not.
    """

    def __init__(
        self,
        base: Optimizer,
        apply: Callable[[Callable[..., None], Sequence[Task]], None],
        max_norm: float | None = None,
    ) -> None:
        self._leaves = [(leaf, traits_of(leaf)) for leaf in leaves_of(base)]
        self._additive = all(traits.additive for _, traits in self._leaves)
        self._apply = apply
        self._max_norm = max_norm
        self._buffers: dict[int, Tensor] = {}

    def step(
        self, base_step: Callable[[], Any], layers: Sequence[tuple[LiveLayer, Factors]], *, sharded: bool = False
    ) -> None:
        """One step of the base with the parameters of ``layers`` seen as z.

        Args:
            base_step: The base's bare step.
            layers: Those with a gradient, and their P.
            sharded: Whether some of them are.
        """
        decay_of: dict[int, tuple[float, Any]] = {}
        for leaf, traits in self._leaves:
            for group in leaf.param_groups:
                decay_of |= dict.fromkeys(map(id, group["params"]), _decay(traits, group))
        parameters = [p for x, _ in layers for p in (x.weight, x.bias) if p is not None]
        decays = [decay_of[id(p)] for p in parameters]
        for p, (l2, _) in zip(parameters, decays, strict=True):
            if p.grad is not None and l2:
                p.grad.add_(p, alpha=l2)
        apply = over_columns(self._apply) if sharded else self._apply
        apply(to_z, [gradient_task(x, f) for x, f in layers])
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)

        held = [local(p) for p in parameters] if sharded else parameters
        self._buffers = {id(p): self._buffer(id(p), h) for p, h in zip(parameters, held, strict=True)}
        with ExitStack() as stack:
            for leaf, traits in self._leaves:
                stack.enter_context(_decay_off(leaf, traits, set(self._buffers)))
            (self._from_zero if self._additive else self._from_here)(base_step, parameters, held)
        for h, (_, shrink) in zip(held, decays, strict=True):
            if shrink is not None:
                h.mul_(shrink)
        rest = []
        for x, f in layers:
            adapter, geometry, weight, bias = x.layer.adapter, x.layer.geometry, x.weight, x.bias
            dz = self._buffers[id(weight)]
            dz_bias = None if bias is None else self._buffers[id(bias)]
            if x.layer.block is not None:
                weight, bias = local(weight), None if bias is None else local(bias)
            together = sharded and isinstance(f, ColumnFactors)
            if together or not add_on_rows(adapter, geometry, weight, bias, dz, dz_bias, f):
                rest.append((weight, bias, (adapter, geometry, dz, dz_bias, f)))
        (over_columns(apply_to_all) if sharded else apply_to_all)(from_z, [task for _, _, task in rest])
        for weight, bias, (_, _, dz, dz_bias, _) in rest:
            weight.add_(dz)
            if bias is not None and dz_bias is not None:
                bias.add_(dz_bias)

    def _buffer(self, key: int, parameter: Tensor) -> Tensor:
        """As large as the parameter, and kept: making it anew would cost more than filling it."""
        known = self._buffers.get(key)
        if known is not None and (known.shape, known.dtype, known.device, known.stride()) == (
            parameter.shape,
            parameter.dtype,
            parameter.device,
            parameter.stride(),
        ):
            return known
        return torch.empty_like(parameter, requires_grad=False)

    def _from_zero(self, base_step: Callable[[], Any], parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Leave Δz in the buffers: to full precision, since there the base starts from zero."""
        weights = [h.data for h in held]
        try:
            for p, h in zip(parameters, held, strict=True):
                _exchange(p, h, self._buffers[id(p)].zero_())
            base_step()
        finally:
            for p, h, w in zip(parameters, held, weights, strict=True):
                _exchange(p, h, w if h is p else h)

    def _from_here(self, base_step: Callable[[], Any], parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Leave Δz in the buffers, for a base that must see w: as the difference."""
        pairs = [(h, self._buffers[id(p)]) for p, h in zip(parameters, held, strict=True)]
        for h, w in pairs:
            w.copy_(h)
        try:
            base_step()
        except BaseException:
            for h, w in pairs:
                h.copy_(w)
            raise
        for h, w in pairs:
            moved = h - w
            h.copy_(w)
            w.copy_(moved)


def _exchange(parameter: Tensor, held: Tensor, value: Tensor) -> None:
    """Let ``parameter``, or what this rank holds of it, be ``value``."""
    if held is parameter:
        parameter.data = value
    else:
        parameter._local_tensor = value  # type: ignore[attr-defined]  # `.data` would leave it as it is


def _decay(traits: BaseTraits, group: dict[str, Any]) -> tuple[float, Any]:
    """(λ to add to the gradient, factor to multiply w with or None) for the parameters of ``group``."""
    weight_decay = group.get("weight_decay", 0)
    if traits.decoupled is None or not weight_decay:
        return 0.0, None
    if traits.decoupled(group):
        return 0.0, 1 - group["lr"] * weight_decay
    return (-weight_decay if group.get("maximize", False) else weight_decay), None


@contextmanager
def _decay_off(base: Optimizer, traits: BaseTraits, ours: set[int]) -> Iterator[None]:
    """Groups in which the base decays only parameters that are not ours, for one call."""
    groups = base.param_groups
    if traits.decoupled is None or not any(group.get("weight_decay", 0) for group in groups):
        yield
        return
    split = []
    for group in groups:
        mine = [p for p in group["params"] if id(p) in ours]
        if not mine or not group.get("weight_decay", 0):
            split.append(group)
            continue
        split.append({**group, "params": mine, "weight_decay": 0.0})
        rest = [p for p in group["params"] if id(p) not in ours]
        if rest:
            split.append({**group, "params": rest})
    base.param_groups = split
    try:
        yield
    finally:
        base.param_groups = groups
