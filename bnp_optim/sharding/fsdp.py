"""FSDP2 (``fully_shard``): which parameter of a module is the sharded one, and where its gradients wait.

During forward and backward a module holds *unsharded* parameters: plain tensors, in whose ``.grad`` backward leaves
its result, until it is reduced into the sharded parameter's. Outside of these, and in the optimizer, are the sharded
ones. FSDP keeps what belongs together in one object per parameter; torch has no public name for it, so everything that
reads it is in this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Managed", "data_parallel_meshes", "is_fsdp", "managed_parameters", "reshard"]


class Managed:
    """One parameter under FSDP's management."""

    def __init__(self, fsdp_param: Any) -> None:
        self._param = fsdp_param

    @property
    def sharded(self) -> Tensor:
        """The parameter that the optimizer has."""
        parameter: Tensor = self._param.sharded_param
        return parameter

    def is_one_of(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is this parameter, sharded or not."""
        now = self._param
        return tensor is not None and (tensor is now.sharded_param or tensor is getattr(now, "_unsharded_param", None))

    @property
    def unsharded(self) -> Tensor | None:
        """What the module holds during forward and backward; None before the first of them."""
        return getattr(self._param, "_unsharded_param", None)

    @property
    def has_gradient(self) -> bool:
        """Whether any gradient is there, reduced or waiting."""
        if self.sharded.grad is not None or getattr(self._param, "unsharded_accumulated_grad", None) is not None:
            return True
        return self.unsharded is not None and self.unsharded.grad is not None

    @property
    def data_parallel_dims(self) -> tuple[int, ...]:
        """The dimensions of the sharded parameter's mesh that are FSDP's; the others are tensor parallel's."""
        mesh = self._param.mesh_info.mesh
        whole: Any = getattr(self.sharded, "device_mesh", mesh)
        names, mine = whole.mesh_dim_names, mesh.mesh_dim_names
        if whole.ndim == mesh.ndim or not names or not mine or not set(mine) <= set(names):
            return tuple(range(mesh.ndim))
        return tuple(names.index(name) for name in mine)


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def managed_parameters(model: nn.Module) -> list[Managed]:
    """All parameters that FSDP2 manages in ``model``."""
    return [Managed(p) for group in _param_groups(model) for p in group.fsdp_params]


def data_parallel_meshes(model: nn.Module) -> list[Any]:
    """FSDP's device meshes, each once: over its ranks the batch is split."""
    found: list[Any] = []
    for group in _param_groups(model):
        if all(group.mesh_info.mesh != known for known in found):
            found.append(group.mesh_info.mesh)
    return found


def reshard(model: nn.Module) -> None:
    """Have the modules hold their sharded parameters (a forward without backward may have left the others)."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def _param_groups(model: nn.Module) -> Iterator[Any]:
    if sys.modules.get("torch.distributed.fsdp") is None:
        return
    for module in model.modules():
        if is_fsdp(module):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # before torch 2.12
                groups = filter(None, [getattr(state, "_fsdp_param_group", None)])
            yield from groups
