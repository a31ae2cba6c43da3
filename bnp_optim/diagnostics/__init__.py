"""What goes wrong without normalization, measured on a net of one's own: activations, gradients, and steps too far.

After J. Bjorck, C. Gomes, B. Selman, K. Weinberger, Understanding Batch Normalization, NeurIPS 2018.
"""

from bnp_optim.diagnostics.activations import ActivationHealth, LayerHealth, activation_health
from bnp_optim.diagnostics.divergence import STEP_SIZES, StepDivergence, checked_step_sizes, step_divergence

__all__ = [
    "STEP_SIZES",
    "ActivationHealth",
    "LayerHealth",
    "StepDivergence",
    "activation_health",
    "checked_step_sizes",
    "step_divergence",
]
