"""What sharded models do not allow, refused before anything changes; the same on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from bnp_optim.discovery import Layer
from bnp_optim.sharding.blocks import is_dtensor
from bnp_optim.sharding.fsdp import managed_parameters

__all__ = ["check_copies", "check_not_sharded_since", "check_whole_inputs"]


def check_copies(model: nn.Module) -> None:
    """Refuse to copy or pickle what FSDP cannot, which says so less clearly."""
    if managed_parameters(model):
        raise TypeError(
            "a model under fully_shard cannot be copied or pickled, and so neither can its optimizer: use state dicts "
            "(torch.distributed.checkpoint.state_dict.get_state_dict)"
        )


def check_not_sharded_since(model: nn.Module, layer: Layer, owned: Collection[int]) -> None:
    """Refuse to train on parameters that the model has lost to ``fully_shard`` or ``parallelize_module``."""
    for use in layer.uses if layer.block is None else ():
        now = use.part.find(use.module, use.part.weight)
        managed = next((m for m in managed_parameters(model) if m.is_one_of(now)), None)
        now = now if managed is None else managed.sharded
        if is_dtensor(now) and id(now) not in owned:
            raise RuntimeError(
                f"the weight of {layer.name!r} was sharded (fully_shard, parallelize_module) after the optimizer was "
                "built, which holds parameters that the model no longer has: shard the model first, then build the "
                "optimizer from its parameters and wrap it"
            )


def check_whole_inputs(layers: Iterable[Layer]) -> None:
    """Refuse the power step where no rank has an input."""
    for layer in layers:
        if layer.block is not None and layer.block.input_groups:
            raise ValueError(
                f"step_scale is 'spectral', which needs whole inputs, but those of {layer.name!r} are split among "
                "ranks (row-wise tensor parallel): use step_scale='trace', or skip the layer"
            )
