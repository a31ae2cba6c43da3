"""What an adapter says of a module, compared with the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnp_optim.layers.base import Part, Rows, Samples
from bnp_optim.layers.registry import Match

__all__ = ["checked_parts", "contradiction"]


def checked_parts(name: str, module: nn.Module, match: Match) -> tuple[Sequence[Part], str | None]:
    """The parts of ``module``, and where they do not fit it the reason why it has none.

    Raises:
        ValueError: if they do not fit a module of the very class that the adapter was registered for; a subclass,
            which may use its weight in another way, passes through.
    """
    try:
        parts = match.adapter.parts(module)
        wrong = next(filter(None, (_misfit(module, match, part) for part in parts)), None)
    except Exception as error:
        if match.exact:
            raise
        return (), f"no rule for {type(module).__name__} ({type(error).__name__}: {error})"
    if wrong is None:
        return parts, None
    if match.exact:
        raise ValueError(f"{type(match.adapter).__name__} does not fit the {type(module).__name__} {name!r}: {wrong}")
    return (), f"no rule for {type(module).__name__}: {wrong}"


def _misfit(module: nn.Module, match: Match, part: Part) -> str | None:
    weight = part.find(module, part.weight)
    if weight is None:
        return None
    rows, shape = part.rows, tuple(weight.shape)
    if is_traceable_wrapper_subclass(weight):  # sharded: its whole shape counts, and views of it may not exist
        weight = torch.empty(shape, device="meta")
    if not isinstance(rows, Rows):
        return f"rows() returned {rows!r}, it must return bnp_optim.Rows(groups=…, channels=…, taps=…)"
    inputs = rows.groups * rows.fan_in
    if inputs < 1 or weight.numel() % inputs:
        return (
            f"rows() returned {rows}, {rows.groups} × {rows.fan_in} weights of rows, but {part.weight} has shape "
            f"{shape}: groups × channels × taps must divide its {weight.numel()} entries"
        )
    try:
        matrix = match.adapter.matrix(rows, weight)
    except RuntimeError:
        matrix = match.adapter.matrix(rows, weight.contiguous())
    each = weight.numel() // inputs
    wanted = (each, rows.fan_in) if rows.groups == 1 else (rows.groups, each, rows.fan_in)
    found = tuple(matrix.shape)
    if len(found) == 4:  # inputs in two dimensions
        found = (*found[:2], found[2] * found[3])
    if found not in (wanted, (rows.groups, each, rows.fan_in)):
        return (
            f"matrix() returned shape {tuple(matrix.shape)}, but {part.weight} has shape {shape} and rows() says "
            f"{rows}: return a view of shape {wanted}"
        )
    return None


def contradiction(samples: Samples, rows: Rows) -> str | None:
    """What is wrong with the shape of ``samples`` for a weight of this geometry, or None."""
    values, _, occupancy = samples
    parts = values if isinstance(values, tuple) else (values,)
    taps = 1 if occupancy is None else occupancy.numel()
    channels = rows.statistics // taps
    for v in parts:
        if not isinstance(v, Tensor) or v.dim() < 2:
            break
        channels -= v.shape[1]
    else:
        if channels == 0:
            return None
    found = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in parts]
    return (
        f"samples() returned values of shape {', '.join(map(str, found))}, but rows() says {rows}: dimension 0 must "
        f"hold the observations, dimension 1 the {rows.statistics // taps} channels"
    )
