"""What theory says of a network's curvature and of gradient descent on it, as functions.

:func:`mean_field_fisher` predicts, :func:`fisher_lambda_max` measures, :func:`effective_condition_number` and
:func:`contraction_rate` are the convergence theory of preconditioned gradient descent.
"""

from bnp_optim.theory.activations import Activation
from bnp_optim.theory.convergence import (
    EffectiveCondition,
    contraction_rate,
    effective_condition_number,
    preconditioning_matrix,
)
from bnp_optim.theory.gaussian import GaussianMoments, gaussian_moments
from bnp_optim.theory.mean_field import MeanFieldFisher, mean_field_fisher
from bnp_optim.theory.measured import FisherKernel, fisher_lambda_max
from bnp_optim.theory.propagation import Layer
from bnp_optim.theory.random_matrices import product_spectrum_edge
from bnp_optim.theory.sequential import mean_field_fisher_from_model

__all__ = [
    "Activation",
    "EffectiveCondition",
    "FisherKernel",
    "GaussianMoments",
    "Layer",
    "MeanFieldFisher",
    "contraction_rate",
    "effective_condition_number",
    "fisher_lambda_max",
    "gaussian_moments",
    "mean_field_fisher",
    "mean_field_fisher_from_model",
    "preconditioning_matrix",
    "product_spectrum_edge",
]
