"""Normalization as preconditioning for PyTorch."""

from bnp_optim.combined import CombinedOptimizer
from bnp_optim.fold import fold_normalization
from bnp_optim.layers import LayerAdapter, ModuleAdapter, Part, Rows, Samples, register_layer
from bnp_optim.muon import BNPMuon
from bnp_optim.named import BNPSGD, BNPAdam, BNPAdamW
from bnp_optim.preconditioner import BNPreconditioner
from bnp_optim.statistics import LayerStatistics

__all__ = [
    "BNPSGD",
    "BNPAdam",
    "BNPAdamW",
    "BNPMuon",
    "BNPreconditioner",
    "CombinedOptimizer",
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
