"""Weights that are sharded (``DTensor``): which rows and inputs of a layer this rank holds, and who has the rest.

A weight is cut along one of its dimensions per dimension of the device mesh. Seen as rows × inputs, a cut goes either
between rows (FSDP2 and column-wise tensor parallel on a ``Linear``), and then P acts on what is here alone; or
between inputs (row-wise tensor parallel, FSDP2 on transformers' ``Conv1D``), and then each row's product with μ is a
sum over ranks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnp_optim.layers import Rows
from bnp_optim.transform import Factors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Block", "ColumnFactors", "Interval", "is_dtensor", "local", "local_grad"]


class Interval(NamedTuple):
    """Indices ``start ≤ i < stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """For indexing."""
        return slice(self.start, self.stop)


@dataclass(eq=False)
class ColumnFactors(Factors):
    """P of a layer of whose inputs this rank holds a part: ``mean`` and the rest are cut to it.

    Args:
        whole: P of all inputs.
        block: What this rank holds.
    """

    whole: Factors
    block: Block


@dataclass(frozen=True, eq=False)
class Block:
    """What this rank holds of one layer's weight and bias.

    Args:
        geometry: Of the local weight. Where the whole has several groups, each local row is a group of its own.
        rows: Which rows of the layer these are, counted through its groups.
        columns: Which of a row's inputs.
        whole: The layer's geometry.
        whole_rows: How many rows that has.
        column_groups: The process groups over which the inputs are split, one after the other.
        bias: Which rows the local bias belongs to; None without one.
        bias_groups: The process groups over which the bias is split, if it is not split as the weight's rows are.
        inputs: Which of the channels a forward call shows: all but in tensor parallel, where inputs are split too.
        input_groups: The process groups over which they are split.
    """

    geometry: Rows
    rows: Interval
    columns: Interval
    whole: Rows
    whole_rows: int
    column_groups: tuple[ProcessGroup, ...]
    bias: Interval | None
    bias_groups: tuple[ProcessGroup, ...]
    inputs: Interval
    input_groups: tuple[ProcessGroup, ...]

    @property
    def talks(self) -> bool:
        """Whether the transforms need what other ranks hold."""
        return bool(self.column_groups or self.bias_groups)

    @property
    def seen(self) -> Rows:
        """The geometry of what a forward call shows."""
        return Rows(1, self.inputs.size, self.whole.taps) if self.input_groups else self.whole

    def factors(self, f: Factors) -> Factors:
        """Of the layer's P, what belongs to this block."""
        if self.talks:
            cut = self.columns.slice
            return _like(f, ColumnFactors(f.mean[cut], f.inv_std[cut], f.q2, f.spread, f, self), cut)
        if self.whole.groups == 1:
            return f
        each = (self.whole_rows // self.whole.groups) or 1
        at = torch.arange(self.rows.start, self.rows.stop, device=f.mean.device) // each
        if self.rows.size < 2:  # one group, or a rank without rows
            at = at[0] if self.rows.size else at.new_zeros(())
        return _like(f, Factors(f.mean[at], f.inv_std[at], f.q2, f.spread), at)


def _like(f: Factors, cut: Factors, at: Any) -> Factors:
    """What a bank has prepared is cut, not derived again."""
    for name in ("scale2", "scale"):
        if name in f.__dict__:
            cut.__dict__[name] = f.__dict__[name][at]
    for name in ("inv_q2", "inv_q"):
        if name in f.__dict__:
            cut.__dict__[name] = f.__dict__[name]
    return cut


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is sharded or replicated by ``torch.distributed.tensor``."""
    if not is_traceable_wrapper_subclass(tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, in place; call without gradients."""
    if not is_dtensor(tensor):
        return tensor
    held: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return held


def local_grad(parameter: Tensor) -> Tensor | None:
    """What this rank holds of the gradient, if it can be changed in place; split as the parameter is."""
    grad: Any = parameter.grad
    if grad is None or not is_dtensor(grad):
        return None if grad is None or grad.layout != torch.strided else grad
    whole: Any = parameter
    if is_dtensor(parameter) and grad.placements != whole.placements:  # a sum that nobody has taken yet
        parameter.grad = grad = grad.redistribute(whole.device_mesh, whole.placements)
    held = local(grad)
    return held if held.layout == torch.strided else None
