"""Inputs of sharded layers: tensor parallel hands modules ``DTensor``s, of which the samples here are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnp_optim.layers import ModuleAdapter, Part, Rows, Samples
from bnp_optim.moments import Moments
from bnp_optim.places import Place
from bnp_optim.sharding.blocks import is_dtensor
from bnp_optim.sharding.columns import sum_over

__all__ = ["LocalInputs", "widened"]


class LocalInputs(ModuleAdapter):
    """``adapter``, for a module whose weight is sharded: it reads what this rank has of the inputs.

    Args:
        adapter: The module's.
        split: Whether the ranks of the weight's mesh have different features of the input.
    """

    def __init__(self, adapter: ModuleAdapter, split: bool) -> None:
        self._adapter = adapter
        self._split = split

    def parts(self, module: nn.Module) -> Sequence[Part]:
        """See :class:`ModuleAdapter`."""
        return self._adapter.parts(module)

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        """See :class:`ModuleAdapter`."""
        kept = self._adapter.keep(module, args, kwargs, output)
        if kept is None:
            return None
        kept = tuple(self._local(x) if is_dtensor(x) else x for x in kept)
        if self._adapter.uses_weights:
            with torch.no_grad():
                return (self._adapter.read(module, kept),)
        return kept

    def _local(self, x: Any) -> Tensor:
        for placement in x.placements:
            if placement.is_replicate() or (self._split and placement.is_shard(x.dim() - 1)):
                continue
            raise ValueError(
                f"its input is a DTensor with placement {placement} over the mesh of its weight, so that ranks which "
                "share the weight see different samples: let data parallel ranks have a mesh dimension of their own"
            )
        with torch.no_grad():
            held: Tensor = x.to_local()
        return held

    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        """See :class:`ModuleAdapter`."""
        return kept[0] if self._adapter.uses_weights else self._adapter.read(module, kept)

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        """See :class:`ModuleAdapter`."""
        return self._adapter.matrix(rows, weight)

    def respond(self, module: nn.Module, values: Tensor, direction: Tensor) -> Tensor:
        """See :class:`ModuleAdapter`."""
        return self._adapter.respond(module, values, direction)

    def correlate(self, module: nn.Module, values: Tensor, response: Tensor) -> Tensor:
        """See :class:`ModuleAdapter`."""
        return self._adapter.correlate(module, values, response)


def widened(
    shelves: Sequence[Sequence[Place]], batches: Sequence[Sequence[Moments | None]]
) -> list[list[Moments | None]]:
    """``batches`` with the moments of all channels where ranks have seen a part; one reduction for all layers.

    A layer has samples on all ranks that hold a part of its inputs, or on none.
    """
    result = [list(batch) for batch in batches]
    split = [
        (i, k, place.layer.block, place.bank.now.mean)
        for i, shelf in enumerate(shelves)
        for k, place in enumerate(shelf)
        if place.layer.block is not None and place.layer.block.input_groups
    ]
    if all(result[i][k] is None for i, k, _, _ in split):
        return result
    parts = []
    for i, k, block, home in split:
        m = result[i][k]
        part = home.new_zeros(2, block.whole.statistics)
        if m is not None:
            part[0, block.inputs.slice] = m.mean.flatten()
            if m.variance is not None:
                part[1, block.inputs.slice] = m.variance
        parts.append(part.flatten())
    for (i, k, _, _), total in zip(split, sum_over([x[2].input_groups for x in split], parts), strict=True):
        mean, variance = total.view(2, -1)
        m = result[i][k]
        if m is not None and m.variance is None:
            result[i][k] = m._replace(mean=mean[None])
        elif m is not None:
            result[i][k] = m._replace(mean=mean, variance=variance)
    return result
