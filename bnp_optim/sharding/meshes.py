"""Which ranks see different samples, read off the device meshes of a sharded model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnp_optim.sharding.blocks import is_dtensor
from bnp_optim.sharding.fsdp import data_parallel_meshes

__all__ = ["NOT_SHARDED", "sharing_group"]

NOT_SHARDED = object()
_REMEDY = "pass the ranks that share samples, such as process_group=mesh['dp'].get_group()"


def sharing_group(model: nn.Module) -> Any:
    """The process group whose ranks have a part of each batch; None if each has all of it.

    FSDP splits the batch over its mesh, replicas included; the ranks of tensor parallel see the same samples. Returns
    ``NOT_SHARDED`` for a model without shards.

    Raises:
        ValueError: if the meshes do not tell.
    """
    by_fsdp = data_parallel_meshes(model)
    if len(by_fsdp) > 1:
        raise ValueError(
            f"process_group is None, and the model's modules have different FSDP meshes, {by_fsdp}: {_REMEDY}"
        )
    world = torch.distributed.get_world_size()
    if by_fsdp:
        mesh = by_fsdp[0]
        if mesh.size() == world:
            return torch.distributed.group.WORLD
        return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
    meshes: list[Any] = []
    for p in model.parameters():
        if is_dtensor(p) and all(p.device_mesh != m for m in meshes):  # type: ignore[attr-defined]
            meshes.append(p.device_mesh)  # type: ignore[attr-defined]
    if not meshes:
        return NOT_SHARDED
    if all(mesh.ndim == 1 and mesh.size() == world for mesh in meshes):
        return None
    raise ValueError(
        f"process_group is None, and the model is sharded over {meshes[0]} of {world} ranks in all, which does not say "
        f"which of them have different samples: {_REMEDY}, or a group of its own rank alone where all have the same"
    )
