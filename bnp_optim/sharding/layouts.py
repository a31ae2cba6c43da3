"""From the placements of a ``DTensor`` to the block of rows and inputs that this rank holds.

NOTE: what ranks conclude must not depend on their own share, or one would wait for a collective that another skips.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnp_optim.layers import ModuleAdapter, Rows
from bnp_optim.sharding.blocks import Block, Interval, is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = ["block_of"]


def block_of(
    adapter: ModuleAdapter, rows: Rows, weight: Tensor, bias: Tensor | None, data_parallel: Collection[int] = ()
) -> Block | str:
    """What this rank holds of a weight (and its bias) of geometry ``rows``, or why that cannot be preconditioned.

    Args:
        adapter: Of the layer's module.
        rows: The whole weight's geometry.
        weight: The weight, which is a ``DTensor`` if ``bias`` is none.
        bias: The bias, or None.
        data_parallel: The dimensions of the weight's mesh over which FSDP splits it: there every rank sees all inputs.
    """
    for tensor in (weight, bias):
        inner = None if tensor is None else local(tensor)
        if inner is not None and is_traceable_wrapper_subclass(inner):
            return f"its shard is a {type(inner).__name__}, which is not supported"
    cuts = _cuts(weight)
    if isinstance(cuts, str):
        return cuts
    try:
        ways = _ways(adapter, rows, weight.shape)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"no rule for a shard of it ({type(error).__name__}: {error})"
    held = Interval(0, ways.rows)
    columns = seen = Interval(0, rows.fan_in)
    row_dims: list[int] = []
    column_dims: list[int] = []
    split_inputs: list[int] = []
    alike = True
    for dim in dict.fromkeys(cut.dim for cut in cuts):
        along_rows, along_columns = ways.along(dim)
        mine = [cut for cut in cuts if cut.dim == dim]
        shown = [cut for cut in mine if cut.mesh_dim not in data_parallel]
        here, there = (_interval(weight.shape[dim], some) for some in (mine, shown))
        if not along_columns.any() and not row_dims and _is_sorted(along_rows):
            held = _where(along_rows, here)
            row_dims = [cut.mesh_dim for cut in mine]
            alike = weight.shape[dim] == ways.rows
        elif not along_rows.any() and not column_dims and _is_sorted(along_columns, rows.taps):
            columns, seen = _where(along_columns, here), _where(along_columns, there)
            column_dims = [cut.mesh_dim for cut in mine]
            split_inputs = [cut.mesh_dim for cut in shown]
        else:
            return f"sharded along dimension {dim}, which leaves no block of rows and inputs"
    if column_dims and rows.groups > 1:
        return "sharded along its inputs, of which it has several groups"
    bias_rows, bias_dims = None, []
    if bias is not None:
        bias_cuts = _cuts(bias)
        if isinstance(bias_cuts, str):
            return f"{bias_cuts} (its bias)"
        bias_rows = _interval(ways.rows, bias_cuts)
        bias_dims = [cut.mesh_dim for cut in bias_cuts]
        if row_dims and not (alike and bias_dims == row_dims):
            return "its bias is sharded otherwise than its rows"
        if rows.groups > 1 and bias_dims != row_dims:
            return "its bias is sharded, but not its rows"
    channels = columns.size // rows.taps
    several = rows.groups > 1 and held.size > 1
    block = Block(
        geometry=Rows(held.size if several else 1, channels, rows.taps),
        rows=held,
        columns=columns,
        whole=rows,
        whole_rows=ways.rows,
        column_groups=_groups(weight, column_dims),
        bias=bias_rows,
        bias_groups=_groups(bias, [] if row_dims else bias_dims),
        inputs=Interval(seen.start // rows.taps, seen.stop // rows.taps),
        input_groups=_groups(weight, split_inputs),
    )
    return _misfit(adapter, block, local(weight)) or block


class _Cut(NamedTuple):
    """Dimension ``dim`` split over ``size`` ranks of mesh dimension ``mesh_dim``, of which this is number ``rank``."""

    dim: int
    mesh_dim: int
    size: int
    rank: int


def _cuts(tensor: Tensor) -> list[_Cut] | str:
    """How a tensor is split, in the order in which it was, or why that is of no use."""
    if not is_dtensor(tensor):
        return []
    sharded: DTensor = tensor  # type: ignore[assignment]
    mesh = sharded.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return "not on this rank: it is outside of its device mesh"
    cuts, strided = [], False
    for mesh_dim, placement in enumerate(sharded.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            cuts.append(_Cut(dim % tensor.dim(), mesh_dim, mesh.size(mesh_dim), coordinate[mesh_dim]))
            strided = strided or hasattr(placement, "split_factor")
        elif not placement.is_replicate():
            return f"its weight is {placement}, a sum that is still to be taken"
    # FSDP over tensor parallel splits what tensor parallel has left, though its mesh dimension comes first
    return cuts[::-1] if strided else cuts


def _interval(size: int, cuts: Collection[_Cut]) -> Interval:
    """What is left of ``size`` after ``cuts``, each into chunks of one size but for the last ones."""
    start, stop = 0, size
    for cut in cuts:
        chunk = -(-(stop - start) // cut.size)
        start, stop = min(start + cut.rank * chunk, stop), min(start + (cut.rank + 1) * chunk, stop)
    return Interval(start, stop) if start < stop else Interval(0, 0)


def _is_sorted(index: Tensor, each: int = 1) -> bool:
    """Whether ``index`` never falls, and rises only after multiples of ``each``: any cut then leaves intervals."""
    return bool((index.diff() >= 0).all()) and bool((index.view(-1, each) == index.view(-1, each)[:, :1]).all())


def _where(index: Tensor, here: Interval) -> Interval:
    """At which places a rising ``index`` is in ``here``."""
    found = Interval(*torch.searchsorted(index, torch.tensor(here)).tolist())
    return found if found.size else Interval(0, 0)


class _Ways:
    """Where in a weight its rows and its inputs lie: read off the strides of the view that the adapter makes."""

    def __init__(self, shape: torch.Size, matrix: Tensor) -> None:
        matrix = matrix.unsqueeze(0) if matrix.dim() == 2 else matrix
        self._shape = shape
        self._row_offsets = _offsets(matrix, (0, 1))
        self._column_offsets = _offsets(matrix, range(2, matrix.dim()))
        self.rows = self._row_offsets.numel()

    def along(self, dim: int) -> tuple[Tensor, Tensor]:
        """The index in dimension ``dim`` of the weight of every row, and of every input."""
        stride = torch.Size(self._shape[dim + 1 :]).numel()
        rows, columns = (x // stride % self._shape[dim] for x in (self._row_offsets, self._column_offsets))
        return rows, columns


def _offsets(matrix: Tensor, dims: Collection[int]) -> Tensor:
    offsets = torch.zeros(1, dtype=torch.int64)
    for dim in dims:
        steps = torch.arange(matrix.shape[dim]) * matrix.stride(dim)
        offsets = (offsets.unsqueeze(1) + steps).flatten()
    return offsets


def _ways(adapter: ModuleAdapter, rows: Rows, shape: torch.Size) -> _Ways:
    return _Ways(shape, adapter.matrix(rows, torch.empty(shape, device="meta")))


def _groups(tensor: Tensor | None, mesh_dims: Collection[int]) -> tuple[ProcessGroup, ...]:
    return tuple(tensor.device_mesh.get_group(d) for d in mesh_dims) if tensor is not None and mesh_dims else ()  # type: ignore[attr-defined]


def _misfit(adapter: ModuleAdapter, block: Block, held: Tensor) -> str | None:
    """Why the adapter cannot see the local weight as the block, or None."""
    wanted = block.rows.size * block.columns.size
    if held.numel() != wanted:
        return f"its shard has {held.numel()} entries where {block.rows.size} × {block.columns.size} were expected"
    if not wanted:
        return None
    try:
        matrix = adapter.matrix(block.geometry, torch.empty(held.shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        return f"no rule for a shard of it ({type(error).__name__}: {error})"
    g = block.geometry
    rows = block.rows.size // g.groups
    found = (1, *matrix.shape) if matrix.dim() == 2 else (*matrix.shape[:2], matrix.shape[2:].numel())
    if tuple(found) != (g.groups, rows, g.fan_in):
        return f"no rule for a shard of it (its matrix has shape {tuple(matrix.shape)})"
    return None
