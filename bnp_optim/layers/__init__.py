"""Layer types: how a module's parameters are rows × inputs and how its inputs are read."""

from bnp_optim.layers import attention, bilinear, conv, linear, recurrent, transposed
from bnp_optim.layers.base import LayerAdapter, ModuleAdapter, Part, Rows, Samples, is_readable
from bnp_optim.layers.checked import checked_parts, contradiction
from bnp_optim.layers.registry import Match, adapter_for, register_layer

__all__ = [
    "LayerAdapter",
    "Match",
    "ModuleAdapter",
    "Part",
    "Rows",
    "Samples",
    "adapter_for",
    "attention",
    "bilinear",
    "checked_parts",
    "contradiction",
    "conv",
    "is_readable",
    "linear",
    "recurrent",
    "register_layer",
    "transposed",
]
