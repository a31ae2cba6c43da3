"""P, Pᵀ and P Pᵀ where ranks hold some of the inputs of every row: the row products with μ are sums over them.

The same formulas as in :mod:`bnp_optim.transform`. All layers' sums travel together, in one reduction per transform
and process group; biases that are split otherwise than the rows are put together in one more before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnp_optim.application import Task, Transform
from bnp_optim.layers import ModuleAdapter, Rows
from bnp_optim.sharding.blocks import ColumnFactors, Interval
from bnp_optim.transform import from_z, norm2, precondition, safe, to_z

__all__ = ["over_columns", "sum_over"]

Apply = Callable[[Transform, Sequence[Task]], None]


def over_columns(apply: Apply) -> Apply:
    """``apply``, but the layers whose ranks need one another are transformed together."""

    def run(transform: Transform, tasks: Sequence[Task]) -> None:
        apply(transform, [task for task in tasks if not isinstance(task[4], ColumnFactors)])
        slabs = [_Slab(*task) for task in tasks if isinstance(task[4], ColumnFactors)]
        if slabs:
            _TOGETHER[transform](slabs)
            for slab in slabs:
                slab.write_back()

    return run


class _Slab:
    """One layer's weight as (rows, columns of this rank), and its bias: of the rows that this rank keeps."""

    def __init__(self, adapter: ModuleAdapter, rows: Rows, weight: Tensor, bias: Tensor | None, factors: Any) -> None:
        self.f: ColumnFactors = factors
        self.block = block = self.f.block
        self.dtype = dtype = self.f.mean.dtype
        self._weight, self._bias = weight, bias
        self._original = weight
        if not weight.numel():  # a rank without inputs; the others count on it all the same
            matrix = weight.new_zeros(block.rows.size, 0)
        else:
            try:
                matrix = adapter.matrix(rows, weight)
            except RuntimeError:
                self._original = weight.contiguous()
                matrix = adapter.matrix(rows, self._original)
        self._matrix = matrix
        self.work = matrix
        if matrix.dim() != 2 or matrix.dtype is not dtype:
            work = matrix.to(dtype, memory_format=torch.contiguous_format, copy=True)
            self.work = work.view(block.rows.size, block.columns.size)
        self.bias = None if bias is None else bias.to(dtype)

    @property
    def kept(self) -> slice:
        """Where among this rank's rows those of its bias are."""
        mine, start = self.block.bias or Interval(0, 0), self.block.rows.start
        return slice(mine.start - start, mine.stop - start)

    def write_back(self) -> None:
        """Put the results where the numbers came from."""
        if not self._weight.numel():
            pass
        elif self.work is not self._matrix:
            self._matrix.copy_(self.work.view(self._matrix.shape))
        if self._original is not self._weight:
            self._weight.copy_(self._original)
        if self._bias is not None and self.bias is not None and self.bias is not self._bias:
            self._bias.copy_(self.bias)


def _precondition(slabs: Sequence[_Slab]) -> None:
    biases = _whole_biases(slabs)
    products = []
    for slab, bias in zip(slabs, biases, strict=True):
        f, work = slab.f, slab.work
        if bias is None:
            products.append(work @ (f.mean * f.inv_std.square()))
            continue
        work.addcmul_(bias.unsqueeze(-1), f.mean, value=-1)
        work.mul_(f.scale2)
        products.append(work @ f.mean)
    for slab, bias, product in zip(slabs, biases, _row_sums(slabs, products), strict=True):
        f, whole, work = slab.f, slab.f.whole, slab.work
        if bias is None:
            along = (product / safe(norm2(whole))).unsqueeze(-1)
            work.addcmul_(along, -f.mean)
            work.mul_(f.scale2)
            work.addcmul_(along, f.mean * f.inv_std.square() / ((1 + norm2(whole)) * f.q2))
        else:
            slab.bias = bias[slab.kept] * f.inv_q2 - product[slab.kept]


def _to_z(slabs: Sequence[_Slab]) -> None:
    biases = _whole_biases(slabs)
    alone = [slab for slab, bias in zip(slabs, biases, strict=True) if bias is None]
    for slab, bias in zip(slabs, biases, strict=True):
        if bias is not None and slab.bias is not None:
            slab.work.addcmul_(bias.unsqueeze(-1), slab.f.mean, value=-1)
            slab.work.mul_(slab.f.scale)
            slab.bias.mul_(slab.f.inv_q)
    products = [slab.work @ (slab.f.mean * slab.f.inv_std.square()) for slab in alone]
    for slab, product in zip(alone, _row_sums(alone, products), strict=True):
        f, length2 = slab.f, norm2(slab.f.whole)
        along = (product / safe(length2)).unsqueeze(-1)
        slab.work.addcmul_(along, -f.mean)
        slab.work.mul_(f.scale)
        slab.work.addcmul_(along, f.mean * f.inv_std / ((1 + length2).sqrt() * f.q2.sqrt()))


def _from_z(slabs: Sequence[_Slab]) -> None:
    products = []
    for slab in slabs:
        if slab.bias is None:
            products.append(slab.work @ (slab.f.mean * slab.f.inv_std))
        else:
            slab.work.mul_(slab.f.scale)
            products.append(slab.work @ slab.f.mean)
    for slab, product in zip(slabs, _row_sums(slabs, products), strict=True):
        f = slab.f
        if slab.bias is None:
            v, length2 = f.mean * f.inv_std, norm2(f.whole)
            along = (product / safe(length2)).unsqueeze(-1)
            slab.work.addcmul_(along, -v)
            slab.work.mul_(f.scale)
            slab.work.addcmul_(along, v * f.inv_std / ((1 + length2).sqrt() * f.q2.sqrt()))
        else:
            slab.bias.mul_(f.inv_q).sub_(product[slab.kept])


_TOGETHER: dict[Transform, Callable[[Sequence[_Slab]], None]] = {
    precondition: _precondition,
    to_z: _to_z,
    from_z: _from_z,
}


def _whole_biases(slabs: Sequence[_Slab]) -> list[Tensor | None]:
    """The biases of all rows of each slab; those that are split are put together."""
    biases = [slab.bias for slab in slabs]
    split = [i for i, slab in enumerate(slabs) if slab.block.bias_groups and slab.bias is not None]
    parts = []
    for i in split:
        slab, bias = slabs[i], biases[i]
        part = slab.work.new_zeros(slab.block.rows.size)
        if bias is not None:
            part[slab.kept] = bias
        parts.append(part)
    for i, whole in zip(split, sum_over([slabs[i].block.bias_groups for i in split], parts), strict=True):
        biases[i] = whole
    return biases


def _row_sums(slabs: Sequence[_Slab], products: Sequence[Tensor]) -> list[Tensor]:
    """Each slab's products, summed over the ranks that hold the other columns."""
    return sum_over([slab.block.column_groups for slab in slabs], products)


def sum_over(groups: Sequence[tuple[Any, ...]], parts: Sequence[Tensor]) -> list[Tensor]:
    """Each vector summed over its process groups, one after the other; one reduction serves all that share them."""
    result = list(parts)
    shared: dict[Any, list[int]] = {}
    for i, (key, part) in enumerate(zip(groups, parts, strict=True)):
        if key:
            shared.setdefault((key, part.dtype, part.device), []).append(i)
    for (key, _, _), members in shared.items():
        flat = torch.cat([parts[i] for i in members])
        for group in key:
            torch.distributed.all_reduce(flat, group=group)
        for i, total in zip(members, torch.split(flat, [parts[i].numel() for i in members]), strict=True):
            result[i] = total
    return result
