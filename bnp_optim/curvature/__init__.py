"""The curvature of the loss and its conditioning, with and without preconditioning.

Start at :func:`estimate_conditioning` (the whole loss) and :func:`layer_conditioning` (each layer's input and output
gradient).
"""

from bnp_optim.curvature.batches import Batch, closures_from_loader
from bnp_optim.curvature.conditioning import estimate_conditioning
from bnp_optim.curvature.coordinates import (
    AdamCoordinates,
    BNPCoordinates,
    Coordinates,
    PreconditionedOperator,
    coordinates_of,
)
from bnp_optim.curvature.lanczos import LanczosResult, lanczos
from bnp_optim.curvature.layerwise import LayerConditioning, layer_conditioning
from bnp_optim.curvature.learning_rate import max_learning_rate
from bnp_optim.curvature.operators import (
    CurvatureOperator,
    GaussNewtonOperator,
    HessianOperator,
    SymmetricOperator,
    blocks,
)
from bnp_optim.curvature.quadrature import SpectralDensity, spectral_density
from bnp_optim.curvature.report import ConditioningReport

__all__ = [
    "AdamCoordinates",
    "BNPCoordinates",
    "Batch",
    "ConditioningReport",
    "Coordinates",
    "CurvatureOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "LanczosResult",
    "LayerConditioning",
    "PreconditionedOperator",
    "SpectralDensity",
    "SymmetricOperator",
    "blocks",
    "closures_from_loader",
    "coordinates_of",
    "estimate_conditioning",
    "lanczos",
    "layer_conditioning",
    "max_learning_rate",
    "spectral_density",
]
