"""The transforms on a layer's own tensors, whatever their layout and dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bnp_optim.layers import LayerAdapter, Rows
from bnp_optim.transform import Factors, add_from_z

__all__ = ["add_on_rows", "apply_on_rows"]

Transform = Callable[[Tensor, Tensor | None, Factors], None]


def apply_on_rows(
    transform: Transform, adapter: LayerAdapter, rows: Rows, weight: Tensor, bias: Tensor | None, factors: Factors
) -> None:
    """Run ``transform`` in place on tensors shaped like a layer's weight and bias.

    Half-precision values, and layouts without a matrix view, go through a copy in the statistics' dtype.
    """
    mean = factors.mean
    dtype = mean.dtype
    work = weight if weight.dtype == dtype else weight.to(dtype)
    try:
        matrix = adapter.matrix(rows, work)
    except RuntimeError:
        work = work.contiguous()
        matrix = adapter.matrix(rows, work)
    work_bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    if mean.dim() == 1:
        transform(matrix[0] if matrix.dim() == 3 else matrix, work_bias, factors)
    else:
        transform(matrix, None if work_bias is None else work_bias.view(rows.groups, -1), factors)
    if work is not weight:
        weight.copy_(work)
    if bias is not None and work_bias is not None and work_bias is not bias:
        bias.copy_(work_bias)


def add_on_rows(
    adapter: LayerAdapter,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    dz: Tensor,
    dz_bias: Tensor | None,
    factors: Factors,
) -> bool:
    """``w ← w + P Δz`` in one pass, where the tensors are as the transforms want them; returns whether they are."""
    dtype = factors.mean.dtype
    if bias is None or dz_bias is None or weight.dtype is not dtype or bias.dtype is not dtype:
        return False
    try:
        matrix, change = adapter.matrix(rows, weight), adapter.matrix(rows, dz)
    except RuntimeError:
        return False
    if factors.mean.dim() == 1 and matrix.dim() == 3:
        matrix, change = matrix[0], change[0]
    elif factors.mean.dim() == 2:
        bias, dz_bias = bias.view(rows.groups, -1), dz_bias.view(rows.groups, -1)
    add_from_z(matrix, bias, change, dz_bias, factors)
    return True
