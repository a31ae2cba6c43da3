"""Normalization as preconditioning for PyTorch."""

from bnp_optim.fold import fold_normalization
from bnp_optim.layers import LayerAdapter, ModuleAdapter, Part, Rows, Samples, register_layer
from bnp_optim.preconditioner import BNPreconditioner
from bnp_optim.statistics import LayerStatistics

__all__ = [
    "BNPreconditioner",
    "LayerAdapter",
    "LayerStatistics",
    "ModuleAdapter",
    "Part",
    "Rows",
    "Samples",
    "fold_normalization",
    "register_layer",
]
__version__ = "0.1.0"
