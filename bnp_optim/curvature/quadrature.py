"""Stochastic Lanczos quadrature: how the eigenvalues of a matrix are distributed, from products alone.

A random sign vector weighs all eigenvectors alike on average, so the Ritz values of a Lanczos run from it, with the
squared first components as weights, are a Gauss quadrature of the spectral density (S. Ubaru, J. Chen, Y. Saad, SIAM J.
Matrix Anal. Appl. 38(4), 2017; Z. Yao et al., PyHessian, 2020).

Of the few largest eigenvalues that loss surfaces have, a single vector sees now too much, now too little, which is most
of the error. So the first run finds them, they count exactly, and the other vectors sample the rest (as Hutch++ does
for traces: R. Meyer et al., SOSA 2021). On digits that brought the error of the mean from up to 47 % down to 5 %. The
result is good for averages, for upper quantiles of |λ|, and for pictures, and unreliable for small eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnp_optim.curvature.lanczos import LanczosResult, lanczos, rademacher
from bnp_optim.curvature.operators import SymmetricOperator

__all__ = ["SpectralDensity", "spectral_density"]


# Residual, of |Ritz value|, below which it counts as an eigenvalue; the error this leaves is of second order
_CONVERGED = 1e-2


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The eigenvalue distribution of a symmetric matrix as weighted points.

    Args:
        size: The matrix's dimension ``n``.
        explorer: The first Lanczos run, on the whole matrix: its extreme Ritz values are the eigenvalues to report.
        outliers: Eigenvalues that were found one by one, (m,) float64. Each is a share 1/n.
        probes: One Lanczos run per random vector, orthogonal to the outliers' eigenvectors: the other n - m.
    """

    size: int
    explorer: LanczosResult
    outliers: Tensor
    probes: tuple[LanczosResult, ...]

    @property
    def values(self) -> Tensor:
        """The points, ascending, (points,) float64."""
        return _points(self, self.probes)[0]

    @property
    def weights(self) -> Tensor:
        """The share of eigenvalues that each point of ``values`` stands for, summing to 1, (points,) float64."""
        return _points(self, self.probes)[1]

    def mean(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The mean of ``function`` over all eigenvalues, tr f(A)/n, and its standard error over the probes.

        The error is NaN with a single probe.
        """
        rest = [float((p.weights * function(p.ritz_values)).sum()) for p in self.probes]
        known = float(function(self.outliers).sum()) / self.size
        share = 1 - len(self.outliers) / self.size
        return known + share * sum(rest) / len(rest), share * _standard_error(rest)

    def quantile(self, share: float) -> tuple[float, float]:
        """The |λ| below which ``share`` of the eigenvalues lie, and its standard error (jackknife over the probes).

        Raises:
            ValueError: if ``share`` is not in (0, 1).
        """
        if not 0 < share < 1:
            raise ValueError(f"share is {share!r}, it must be in (0, 1), such as 0.9")
        value = _quantile(*_points(self, self.probes), share)
        n = len(self.probes)
        if n == 1:
            return value, math.nan
        without = [_quantile(*_points(self, (*self.probes[:i], *self.probes[i + 1 :])), share) for i in range(n)]
        centre = sum(without) / n
        return value, math.sqrt((n - 1) / n * sum((x - centre) ** 2 for x in without))

    def curve(self, *, points: int = 400, width: float = 0.08) -> tuple[Tensor, Tensor]:
        """A smooth density for plots, over s = asinh(λ/(1e-3·|λ|max)), which shows all magnitudes and both signs.

        Args:
            points: Of the curve.
            width: Standard deviation of the Gaussian that each point is spread with, in s.

        Returns:
            λ and the share of eigenvalues per unit of s, both (points,) float64.
        """
        values = self.values
        unit = max(1e-3 * float(values.abs().max()), 1e-300)
        s = torch.asinh(values / unit)
        grid = torch.linspace(float(s.min()) - 4 * width, float(s.max()) + 4 * width, points, dtype=torch.float64)
        bells = torch.exp(-0.5 * ((grid[:, None] - s) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return unit * torch.sinh(grid), bells @ self.weights


def spectral_density(
    operator: SymmetricOperator,
    *,
    num_probes: int = 5,
    num_steps: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SpectralDensity:
    """Estimate the eigenvalue distribution of ``operator``.

    Args:
        operator: A symmetric matrix.
        num_probes: Random vectors; the first finds the outliers, the others sample the rest (a single one does both).
            5: the mean's standard error was then a few percent on nets of 3466 parameters.
        num_steps: Products per probe, at most n. 50: quantiles down to 1 % of λ_max were within some 20 %.
        seed: Of the vectors; the global random numbers are not touched.
        progress: Called after each product with (done, at most).

    Raises:
        ValueError: if ``num_probes`` or ``num_steps`` is below 1.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes!r}, it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    n = operator.size
    most = min(num_steps, n)

    def run(i: int, outside: Tensor | None) -> LanczosResult:
        start = _start(operator, generator, outside)
        told = None if progress is None else lambda done, _: progress(i * most + done, num_probes * most)
        return lanczos(operator, start, num_steps=num_steps, orthogonal_to=outside, keep_basis=i == 0, progress=told)

    first = run(0, None)
    explorer = replace(first, basis=None)
    none = torch.zeros(0, dtype=torch.float64)
    found = first.residuals <= _CONVERGED * first.ritz_values.abs()
    if num_probes == 1 or int(found.sum()) >= n:
        return SpectralDensity(n, explorer, none, (explorer,))
    outside = first.ritz_vectors(found)
    del first  # and with it the basis
    probes = tuple(run(i, outside) for i in range(1, num_probes))
    return SpectralDensity(n, explorer, explorer.ritz_values[found], probes)


def _start(operator: SymmetricOperator, generator: torch.Generator, outside: Tensor | None) -> Tensor:
    """Random signs; drawn again where nothing of them is outside, as happens in a few dimensions."""
    while True:
        v = rademacher(operator.size, generator, operator.dtype, operator.device)
        inside = 0.0 if outside is None else float((outside @ v).square().sum())
        if inside < (1 - 1e-4) * operator.size or outside is None:
            return v


def _points(density: SpectralDensity, probes: Sequence[LanczosResult]) -> tuple[Tensor, Tensor]:
    """Points, ascending, and the share of eigenvalues each stands for."""
    m, n = len(density.outliers), density.size
    values, order = torch.cat([density.outliers, *(p.ritz_values for p in probes)]).sort()
    rest = (1 - m / n) / len(probes)
    weights = torch.cat([torch.full((m,), 1 / n, dtype=torch.float64), *(rest * p.weights for p in probes)])
    return values, weights[order]


def _standard_error(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return math.nan
    mean = sum(values) / n
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)


def _quantile(values: Tensor, weights: Tensor, share: float) -> float:
    """Each point's weight is spread around it: half of it lies below. In between, |λ| is interpolated."""
    size, order = values.abs().sort()
    ordered = weights[order]
    below = (ordered.cumsum(0) - ordered / 2).tolist()
    points = size.tolist()
    if share <= below[0]:
        return float(points[0])
    for i in range(1, len(points)):
        if share <= below[i]:
            left, right = below[i - 1], below[i]
            t = (share - left) / (right - left) if right > left else 1.0
            return float(points[i - 1] + t * (points[i] - points[i - 1]))
    return float(points[-1])
