"""The transforms on a layer's own tensors, whatever their layout and dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bnp_optim.layers import LayerAdapter, Rows
from bnp_optim.transform import Factors

__all__ = ["apply_on_rows"]

Transform = Callable[[Tensor, Tensor | None, Factors], None]


def apply_on_rows(
    transform: Transform, adapter: LayerAdapter, rows: Rows, weight: Tensor, bias: Tensor | None, factors: Factors
) -> None:
    """Run ``transform`` in place on tensors shaped like a layer's weight and bias.

    Half-precision values, and layouts without a matrix view, go through a copy in the statistics' dtype.
    """
    dtype = factors.mean.dtype
    work = weight if weight.dtype == dtype else weight.to(dtype)
    try:
        matrix = adapter.matrix(rows, work)
    except RuntimeError:
        work = work.contiguous()
        matrix = adapter.matrix(rows, work)
    work_bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    if factors.mean.dim() == 1:
        transform(matrix[0] if matrix.dim() == 3 else matrix, work_bias, factors)
    else:
        transform(matrix, None if work_bias is None else work_bias.view(rows.groups, -1), factors)
    if work is not weight:
        weight.copy_(work)
    if bias is not None and work_bias is not None and work_bias is not bias:
        bias.copy_(work_bias)
