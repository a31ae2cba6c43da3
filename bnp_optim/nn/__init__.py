"""Normalization by the population, centered outputs, and the regularization that batch noise would have been."""

from bnp_optim.nn.centering import OutputCentering
from bnp_optim.nn.gamma_decay import GammaMeter, gamma_decay_coefficient
from bnp_optim.nn.penalty import GammaDecayPenalty
from bnp_optim.nn.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d, convert_batchnorm

__all__ = [
    "GammaDecayPenalty",
    "GammaMeter",
    "OutputCentering",
    "PopulationNorm1d",
    "PopulationNorm2d",
    "PopulationNorm3d",
    "convert_batchnorm",
    "gamma_decay_coefficient",
]
