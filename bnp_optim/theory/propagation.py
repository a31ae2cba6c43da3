"""The mean-field recursions of a random network, forward and backward, over any sequence of its pieces.

Notation of R. Karakida, S. Akaho, S. Amari (AISTATS 2019, arXiv 1806.01316), with BatchNorm after M. Wei, J. Stokes,
D. Schwab (arXiv 1903.02606). With u = W h + b, W ~ N(0, σw²/fan-in), b ~ N(0, σb²), for one sample (1) and for two
different ones (2):

    forward    q = σw² q̂ + σb²,      q̂1 = E φ(u)²,  q̂2 = E φ(u)φ(u')
    backward   q̃ ← σw² q̃ E φ'(u)φ'(u'),  q̃ = 1 at the outputs (sums over units, not means)

A weight of layer l has the gradient δ^l h^(l-1), so the layer adds fan-in · q̃^l q̂^(l-1) to the kernel
``K(s, t) = ∇f(s)·∇f(t)`` of one output. Biases' own gradients, 1/fan-in of that, are left out, as in the papers.

Convolutions (*derived here*): with circular padding and inputs that are independent between positions, the covariance
of two positions obeys the recursion of its displacement alone (every kernel tap shifts both), and all displacements but
zero obey that of two different samples. So only three sums over pairs of positions travel backward: q̃1 (same sample,
same position), q̃x (same sample, different positions), q̃2 (different samples, all pairs), and

    K(t, t) = fan-in · (q̃1 q̂1 + q̃x q̂2),   K(s, t) = fan-in · q̃2 q̂2.

They start at (1, 0, 1); averaging over k positions takes (q̃1, q̃x) to (q̃1/k, q̃x + (1 - 1/k) q̃1) and q̂1 to
q̂1/k + (1 - 1/k) q̂2. Strides, dilation and flattening leave all of it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bnp_optim.theory.activations import Activation
from bnp_optim.theory.gaussian import GaussianMoments, gaussian_moments

__all__ = ["Average", "Layer", "Norm", "Piece", "Weights", "propagate"]


@dataclass(frozen=True)
class Weights:
    """A dense layer or a convolution; variances times the fan-in, σw², and σb²."""

    fan_in: float
    weight_variance: float
    bias_variance: float
    parameters: int
    trained: bool = True
    name: str = ""


@dataclass(frozen=True)
class Norm:
    """BatchNorm right after a layer of weights: γ² (mean square), with statistics of the batch or held constant."""

    scale2: float
    frozen: bool
    eps: float = 0.0
    positions: int = 1


@dataclass(frozen=True)
class Average:
    """The mean over so many positions."""

    positions: int


Piece = Weights | Norm | Average | Activation


@dataclass(frozen=True)
class Layer:
    """What the recursions say of one layer of weights.

    Args:
        name: Its name, or its number from 1.
        fan_in: Inputs of one unit.
        q1: Variance of its pre-activation u.
        q2: Covariance of u between two samples.
        q1_hat: ``q̂1`` of its input h.
        q2_hat: ``q̂2`` of its input h.
        q1_tilde: ``q̃1`` of the gradient δ at u.
        q2_tilde: ``q̃2`` of δ between two samples.
        diagonal: What it adds to K(t, t).
        off_diagonal: What it adds to K(s, t) with statistics that do not couple the samples.
        centered: What it adds to K(t, t) where BatchNorm after it takes the batch's mean out of its gradient; else 0.
        along: What of ``centered`` is left along the mean over the samples.
    """

    name: str
    fan_in: float
    q1: float
    q2: float
    q1_hat: float
    q2_hat: float
    q1_tilde: float
    q2_tilde: float
    diagonal: float
    off_diagonal: float
    centered: float = 0.0
    along: float = 0.0


def propagate(pieces: Sequence[Piece], q1: float, q2: float) -> list[Layer]:
    """Run both recursions over ``pieces``, from second moments q̂1, q̂2 of the input.

    BatchNorm (Wei et al. for ReLU; any φ by the same steps): the normalized u has variance γ² and, between samples,
    covariance 0, since what two samples share in a unit is its mean. Backward through it with constant
    statistics divides by v = q1 - q2, the variance *around* that mean. Through the batch's statistics δ loses its mean
    over the batch and its component along u, so all layers before it lose their part of K(s, t), and q̂2's part of
    K(t, t). Along the mean over the samples a share of the rest stays: what of φ'(u) is neither constant nor linear in
    u, or, with flattened positions, all but about 1/positions (*derived here*).
    """
    states = [(q1, q2)]
    moments: list[GaussianMoments | None] = []
    for piece in pieces:
        q1, q2 = states[-1]
        moments.append(gaussian_moments(piece, q1, q2) if isinstance(piece, Activation) else None)
        states.append(_forward(piece, moments[-1], q1, q2))

    layers: list[Layer] = []
    t1, tx, t2 = 1.0, 0.0, 1.0
    coupled, share = False, 0.0
    before: tuple[float, float] = (1.0, 1.0)
    bend: GaussianMoments | None = None
    for piece, (h1, h2), (u1, u2), m in reversed(list(zip(pieces, states, states[1:], moments, strict=False))):
        if isinstance(piece, Weights):
            if piece.trained:
                own, shared = piece.fan_in * (t1 * h1 + tx * h2), piece.fan_in * t2 * h2
                apart = piece.fan_in * t1 * (h1 - h2)
                parts = (0.0, 0.0, apart, share * apart) if coupled else (own, shared, 0.0, 0.0)
                layers.append(Layer(piece.name, piece.fan_in, u1, u2, h1, h2, t1, t2, *parts))
            t1, tx, t2 = (piece.weight_variance * t for t in (t1, tx, t2))
        elif isinstance(piece, Norm):
            if not (piece.frozen or coupled):
                # Σ_p of all pairs of samples, over positions · Σ_p of the same sample
                lost = 1.0 if bend is None else (bend.slope_cross + bend.tilt**2) / bend.slope
                share = max(0.0, 1 - lost * before[1] / (before[0] * piece.positions))
            factor = piece.scale2 / (h1 - h2 + piece.eps)
            t1, tx, t2 = (factor * t for t in (t1, tx, t2))
            coupled = coupled or not piece.frozen
        elif isinstance(piece, Average):
            k = piece.positions
            t1, tx = t1 / k, tx + (1 - 1 / k) * t1
        else:
            assert m is not None
            before, bend = (t1, t2), m
            t1, tx, t2 = m.slope * t1, m.slope_cross * tx, m.slope_cross * t2
    return layers[::-1]


def _forward(piece: Piece, m: GaussianMoments | None, q1: float, q2: float) -> tuple[float, float]:
    if isinstance(piece, Weights):
        w, b = piece.weight_variance, piece.bias_variance
        return w * q1 + b, w * q2 + b
    if isinstance(piece, Norm):
        v = q1 - q2
        if not v > 0:
            raise ValueError(
                f"BatchNorm meets pre-activations without variance between samples (q1 {q1:.4g}, q2 {q2:.4g}): the "
                "inputs must differ"
            )
        return piece.scale2 * v / (v + piece.eps), 0.0
    if isinstance(piece, Average):
        return q1 / piece.positions + (1 - 1 / piece.positions) * q2, q2
    assert m is not None
    return m.value, m.cross
