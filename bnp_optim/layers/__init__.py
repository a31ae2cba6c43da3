"""Layer types: how a module's parameters are rows × inputs and how its input is read."""

from bnp_optim.layers import conv, linear
from bnp_optim.layers.base import LayerAdapter, Rows, Samples, adapter_for, is_plain, register_layer

__all__ = ["LayerAdapter", "Rows", "Samples", "adapter_for", "conv", "is_plain", "linear", "register_layer"]
