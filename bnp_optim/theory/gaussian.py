"""Gaussian integrals of activations: E φ(u)², E φ(a)φ(b) and the same of φ'.

a and b have variance q1 and covariance q2. Closed forms for piecewise linear activations and the error function
(C. Williams, Neural Computation 10(5), 1998; Y. Cho, L. Saul, NeurIPS 2009); for all others the two-dimensional
integral is one over the common part of a and b of the square of another, since given it they are independent:

    E φ(a)φ(b) = E_z g(√q2 z)²,   g(x) = E_y φ(x + √(q1-q2) y).

Both are composite Gauss-Legendre sums whose panels end at the kinks and widen away from them, so they keep their
accuracy at any q1 and q2: at least 1e-10 relative against the closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bnp_optim.theory.activations import Activation

__all__ = ["GaussianMoments", "gaussian_moments"]

_REACH = 12.0  # standard deviations: e^(-72) is left out
_TOLERANCE = 1e-8  # what two numbers of nodes may differ by
_NODES = (12, 16)  # per panel, of the check and of the result


@dataclass(frozen=True)
class GaussianMoments:
    """E φ(a)² (``value``), E φ(a)φ(b) (``cross``), E φ'(a)², E φ'(a)φ'(b), and E φ'(a)a/√q1 (``tilt``)."""

    value: float
    cross: float
    slope: float
    slope_cross: float
    tilt: float


def gaussian_moments(activation: Activation, q1: float, q2: float) -> GaussianMoments:
    """The four moments for variance q1 and covariance q2.

    Raises:
        ValueError: if q1 is not positive, |q2| > q1, or the quadrature does not reach 1e-8 (a kink that was not named).
    """
    if not (q1 > 0 and math.isfinite(q1)):
        raise ValueError(f"q1 is {q1!r}, it must be positive and finite: a variance")
    if not abs(q2) <= q1 * (1 + 1e-12):
        raise ValueError(f"q2 is {q2!r}, it must be within ±q1 = {q1!r}: a covariance")
    q2 = max(-q1, min(q1, q2))
    if activation.slope is not None:
        return _piecewise_linear(activation.slope, q1, q2)
    if activation.is_erf:
        return _erf(q1, q2)
    coarse, fine = (_quadrature(activation, q1, q2, nodes) for nodes in _NODES)
    for name in ("value", "cross", "slope", "slope_cross"):
        rough, exact = getattr(coarse, name), getattr(fine, name)
        scale = fine.slope if name.startswith("slope") else fine.value
        if not abs(rough - exact) <= _TOLERANCE * scale:
            raise ValueError(
                f"activation {activation} cannot be integrated: two sums differ by {abs(rough - exact) / scale:.1g}. "
                "Name the points where it, or its slope, jumps: Activation(function, kinks=(0.0,))"
            )
    return fine


def _piecewise_linear(s: float, q1: float, q2: float) -> GaussianMoments:
    """φ(u) = s·u + (1-s)·max(u, 0); the mixed term is E a·max(b, 0) = q2/2."""
    c = q2 / q1
    arc = math.asin(c)
    both = (1 - s) ** 2

    def value(c: float, q: float, arc: float) -> float:
        relu = q1 / (2 * math.pi) * (math.sqrt(max(0.0, 1 - c * c)) + c * (math.pi / 2 + arc))
        return s * q + both * relu  # s² q2 + 2s(1-s) q2/2 = s q2

    step = s + both * (math.pi / 2 + arc) / (2 * math.pi)
    tilt = (1 - s) / math.sqrt(2 * math.pi)
    return GaussianMoments(value(1.0, q1, math.pi / 2), value(c, q2, arc), s + both / 2, step, tilt)


def _erf(q1: float, q2: float) -> GaussianMoments:
    def slope(q: float) -> float:
        # (1+2q1)² - (2q)², factored: no cancellation
        return 4 / math.pi / math.sqrt((1 + 2 * (q1 - q)) * (1 + 2 * (q1 + q)))

    def value(q: float) -> float:
        return 2 / math.pi * math.asin(2 * q / (1 + 2 * q1))

    return GaussianMoments(value(q1), value(q2), slope(q1), slope(q2), 0.0)


@lru_cache(maxsize=8)
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], from the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    beside = k / torch.sqrt(4 * k * k - 1)
    x, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return x, 2 * vectors[0].square()


def _panels(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Points and weights of the standard normal measure over panels between sorted ``edges`` (…, m): (…, points)."""
    x, w = _legendre(nodes)
    left, width = edges[..., :-1, None], edges.diff(dim=-1)[..., None]
    z = left + width * (x + 1) / 2
    weights = width / 2 * w * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return z.flatten(-2), weights.flatten(-2)


def _landmarks(activation: Activation, reach: float) -> Tensor:
    """Values of u to end panels at: unit steps near 0 and the kinks, where activations bend, then ever wider ones."""
    steps = [0.5 * i for i in range(17)]
    while steps[-1] < reach:
        steps.append(1.5 * steps[-1])
    return _around((0.0, *activation.kinks), steps)


def _around(points: Iterable[float], steps: Sequence[float]) -> Tensor:
    """All points ± steps, ascending, each once."""
    found = {p + side * step for p in points for step in steps for side in (1, -1)}
    return torch.tensor(sorted(found), dtype=torch.float64)


def _edges(landmarks: Tensor) -> Tensor:
    """Panels over the whole reach that also end at the landmarks (…, m), in units of standard deviations."""
    even = torch.arange(-_REACH, _REACH + 1, 1.5, dtype=torch.float64)
    even = even.expand(*landmarks.shape[:-1], -1)
    return torch.cat([even, landmarks.clamp(-_REACH, _REACH)], dim=-1).sort(dim=-1).values


def _quadrature(activation: Activation, q1: float, q2: float, nodes: int) -> GaussianMoments:
    reach = _REACH * math.sqrt(q1)
    landmarks = _landmarks(activation, reach)
    z, w = _panels(_edges(landmarks / math.sqrt(q1)), nodes)
    y, dy = activation.values(math.sqrt(q1) * z)
    value, slope, tilt = (float((w * f).sum()) for f in (y * y, dy * dy, z * dy))
    common, apart = math.sqrt(abs(q2)), math.sqrt(max(0.0, q1 - abs(q2)))
    if common == 0:
        cross, slope_cross = float((w * y).sum()) ** 2, float((w * dy).sum()) ** 2
        return GaussianMoments(value, cross, slope, slope_cross, tilt)
    if apart == 0 and q2 > 0:
        return GaussianMoments(value, value, slope, slope, tilt)
    # g is φ smoothed over √(q1-q2): it bends as sharply as that near the kinks
    fine = [apart * 1.5**i for i in range(-1, 80) if apart * 1.5**i < reach]
    outer = torch.cat([landmarks, _around(activation.kinks, fine)]) / common
    z, w = _panels(_edges(torch.cat([outer, -outer]) if q2 < 0 else outer), nodes)
    g, dg = _smoothed(activation, common * z, apart, landmarks, nodes)
    if q2 > 0:
        other, dother = g, dg
    else:
        other, dother = _smoothed(activation, -common * z, apart, landmarks, nodes)
    return GaussianMoments(value, float((w * g * other).sum()), slope, float((w * dg * dother).sum()), tilt)


def _smoothed(activation: Activation, x: Tensor, std: float, landmarks: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """E φ(x + std·y) and E φ'(x + std·y), each of the shape of ``x``."""
    if std == 0:
        return activation.values(x)
    parts = []
    for chunk in torch.split(x, 256):
        y, w = _panels(_edges((landmarks - chunk[:, None]) / std), nodes)
        value, slope = activation.values(chunk[:, None] + std * y)
        parts.append(torch.stack([(w * value).sum(-1), (w * slope).sum(-1)]))
    both = torch.cat(parts, dim=-1)
    return both[0], both[1]
