"""The two-sided form: run the base optimizer in the coordinates z, where w = P z.

The base is fed Pᵀg; the update Δz that it makes is mapped back, w ← w + P Δz. Weight decay stays the
regularization of w: decoupled decay multiplies w itself, L2 decay enters as Pᵀ(g + λw), and the base's own is off
for that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bnp_optim.application import apply_on_rows
from bnp_optim.bases import BaseTraits
from bnp_optim.tracking import LiveLayer
from bnp_optim.transform import Factors, from_z, to_z

__all__ = ["step_in_z"]


def step_in_z(
    base: Optimizer,
    base_step: Callable[[], Any],
    traits: BaseTraits,
    live: Sequence[LiveLayer],
    factors: Sequence[Factors],
) -> None:
    """One step of ``base`` with the parameters of ``live`` seen as z."""
    group_of = {id(p): group for group in base.param_groups for p in group["params"]}
    parameters = [p for x in live for p in (x.weight, x.bias) if p is not None]
    decays = [_decay(traits, group_of[id(p)]) for p in parameters]
    for p, (l2, _) in zip(parameters, decays, strict=True):
        if p.grad is not None and l2:
            p.grad.add_(p, alpha=l2)
    for x, f in zip(live, factors, strict=True):
        apply_on_rows(to_z, x.layer.adapter, x.layer.rows, x.weight_grad, x.bias_grad, f)

    origin = [p.detach().clone() for p in parameters]
    if traits.additive and parameters:
        torch._foreach_zero_(parameters)  # then the base leaves Δz itself there, to full precision
    try:
        with _decay_off(base, traits, {id(p) for p in parameters}):
            base_step()
    except BaseException:
        for p, w in zip(parameters, origin, strict=True):
            p.copy_(w)
        raise
    if not traits.additive and parameters:
        torch._foreach_sub_(parameters, origin)
    for x, f in zip(live, factors, strict=True):
        apply_on_rows(from_z, x.layer.adapter, x.layer.rows, x.weight, x.bias, f)
    for p, w, (_, shrink) in zip(parameters, origin, decays, strict=True):
        p.add_(w if shrink is None else w.mul_(shrink))


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
