"""The transforms on the layers' own tensors, whatever their layout and dtype; one by one, or compiled as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnp_optim.layers import ModuleAdapter, Rows
from bnp_optim.places import LiveLayer
from bnp_optim.transform import Factors, add_from_z

__all__ = ["CompiledTransforms", "Task", "Transform", "add_on_rows", "apply_on_rows", "apply_to_all", "gradient_task"]

Transform = Callable[[Tensor, Tensor | None, Factors], None]
Task = tuple[ModuleAdapter, Rows, Tensor, Tensor | None, Factors]


def gradient_task(live: LiveLayer, factors: Factors) -> Task:
    """A layer's gradients as what :func:`apply_to_all` takes."""
    return live.layer.adapter, live.layer.geometry, live.weight_grad, live.bias_grad, factors


def apply_to_all(transform: Transform, tasks: Sequence[Task]) -> None:
    """Run ``transform`` on each layer's (adapter, rows, weight, bias, factors)."""
    for adapter, rows, weight, bias, factors in tasks:
        apply_on_rows(transform, adapter, rows, weight, bias, factors)


class CompiledTransforms:
    """:func:`apply_to_all` as one graph of ``torch.compile``, where tensors need no rearrangement."""

    def __init__(self) -> None:
        self._compiled: dict[Transform, Any] = {}

    def __call__(self, transform: Transform, tasks: Sequence[Task]) -> None:
        """Like :func:`apply_to_all`."""
        graph: list[tuple[Tensor, Tensor | None, Factors]] = []
        rest = []
        for task in tasks:
            arranged = _arranged(*task)
            if arranged is None:
                rest.append(task)
            else:
                graph.append((*arranged, task[4]))
        if graph:
            if transform not in self._compiled:
                self._compiled[transform] = torch.compile(_on_each(transform), fullgraph=True, dynamic=False)
            self._compiled[transform](*zip(*graph, strict=True))
        apply_to_all(transform, rest)


def _on_each(transform: Transform) -> Callable[..., None]:
    def run(weights: Sequence[Tensor], biases: Sequence[Tensor | None], factors: Sequence[Factors]) -> None:
        for weight, bias, f in zip(weights, biases, factors, strict=True):
            transform(weight, bias, f)

    return run


def _arranged(
    adapter: ModuleAdapter, rows: Rows, weight: Tensor, bias: Tensor | None, factors: Factors
) -> tuple[Tensor, Tensor | None] | None:
    """Views as the transforms want them, or None if there are none."""
    dtype = factors.mean.dtype
    if weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        return None
    try:
        matrix = adapter.matrix(rows, weight)
        if matrix.dim() == 4:
            matrix = matrix.view(*matrix.shape[:2], rows.fan_in)
    except RuntimeError:
        return None
    if factors.mean.dim() == 1:
        return (matrix[0] if matrix.dim() == 3 else matrix), bias
    return matrix, None if bias is None else bias.view(rows.groups, -1)


def apply_on_rows(
    transform: Transform, adapter: ModuleAdapter, rows: Rows, weight: Tensor, bias: Tensor | None, factors: Factors
) -> None:
    """Run ``transform`` in place on tensors shaped like a layer's weight and bias.

    Half-precision values, and layouts without a matrix view, go through a copy in the statistics' dtype.
    """
    arranged = _arranged(adapter, rows, weight, bias, factors)
    if arranged is not None:
        transform(*arranged, factors)
        return
    dtype = factors.mean.dtype
    try:
        matrix, original = adapter.matrix(rows, weight), weight
    except RuntimeError:
        original = weight.contiguous()
        matrix = adapter.matrix(rows, original)
    one_group = factors.mean.dim() == 1
    work = matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)
    work_bias = None if bias is None else bias.to(dtype, memory_format=torch.contiguous_format, copy=True)
    transform(
        work.view(-1, rows.fan_in) if one_group else work.view(rows.groups, -1, rows.fan_in),
        work_bias if work_bias is None or one_group else work_bias.view(rows.groups, -1),
        factors,
    )
    matrix.copy_(work)
    if original is not weight:
        weight.copy_(original)
    if bias is not None and work_bias is not None:
        bias.copy_(work_bias)


def add_on_rows(
    adapter: ModuleAdapter,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    dz: Tensor,
    dz_bias: Tensor | None,
    factors: Factors,
) -> bool:
    """``w ← w + P Δz`` in one pass, where the tensors are as the transforms want them; returns whether they are."""
    now = _arranged(adapter, rows, weight, bias, factors)
    change = _arranged(adapter, rows, dz, dz_bias, factors)
    if now is None or change is None or now[1] is None or change[1] is None:
        return False
    add_from_z(now[0], now[1], change[0], change[1], factors)
    return True
