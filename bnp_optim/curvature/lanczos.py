"""The Lanczos iteration with full re-orthogonalization.

Every vector is made orthogonal to all earlier ones by two passes of Gram-Schmidt ("twice is enough": L. Giraud et al.,
Numerische Mathematik 101, 2005), so that no eigenvalue appears twice through rounding; float32 vectors then agree with
float64 to 2e-7. The price is memory for the basis, steps × n numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LanczosResult", "gaussian", "lanczos", "rademacher"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """What ``k`` Lanczos steps know of a symmetric matrix. All tensors are float64 on the CPU.

    Args:
        ritz_values: Approximate eigenvalues, ascending, (k,).
        residuals: ``‖A y - θ y‖`` of each: an eigenvalue of A is at most so far away, (k,).
        weights: Squared first components of the tridiagonal matrix's eigenvectors, summing to 1: with ``ritz_values``
            the Gauss quadrature of the start vector's spectral measure, (k,).
        exhausted: Whether the steps have found an invariant subspace (breakdown, or k = n): the Ritz values are
            eigenvalues then.
        ritz_vectors: Unit vectors of the smallest and the largest Ritz value in the vectors' dtype, (2, n); None
            unless asked for.
    """

    ritz_values: Tensor
    residuals: Tensor
    weights: Tensor
    exhausted: bool
    ritz_vectors: Tensor | None = None

    @property
    def steps(self) -> int:
        """``k``, which is also the number of products."""
        return len(self.ritz_values)

    def error(self, i: int) -> float:
        """How far ``ritz_values[i]`` is from an eigenvalue, by estimate.

        The residual r is a bound. With a gap g to the rest of the spectrum r²/g is one too; g is taken from the other
        Ritz values, which is why this is only an estimate.
        """
        residual = float(self.residuals[i])
        others = torch.cat([self.ritz_values[:i], self.ritz_values[i + 1 :]])
        gap = float((others - self.ritz_values[i]).abs().min()) if len(others) else 0.0
        return min(residual, residual**2 / gap) if gap > 0 else residual


def gaussian(n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A standard normal vector (n,): drawn on the CPU, so that it is the same on every device."""
    return torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype)


def rademacher(n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of independent signs (n,): drawn on the CPU, so that it is the same on every device."""
    return torch.randint(0, 2, (n,), generator=generator).mul_(2).sub_(1).to(device, dtype)


def lanczos(
    product: Product,
    start: Tensor,
    *,
    num_steps: int,
    tolerance: float | None = None,
    ritz_vectors: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LanczosResult:
    """Run up to ``num_steps`` steps from ``start``.

    Args:
        product: ``v ↦ A v`` on vectors like ``start``, A symmetric; its result is not changed.
        start: Any vector (n,) but zero. Eigenvalues whose eigenvectors are orthogonal to it are not found.
        num_steps: Products at most; no more than n are made.
        tolerance: Stop as soon as the estimated error of the largest Ritz value is below this share of the largest
            absolute one. None: make all steps.
        ritz_vectors: Compute the vectors of the extreme Ritz values.
        progress: Called after each product with (done, at most).

    Raises:
        ValueError: if ``num_steps`` is below 1, ``start`` is zero or no vector, or a product is not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}, it must be at least 1")
    if start.dim() != 1 or not float(start.norm()) > 0:
        raise ValueError(f"start has shape {tuple(start.shape)} and norm {float(start.norm())}: give a non-zero vector")
    most = min(num_steps, len(start))
    basis = torch.empty(most, len(start), dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for k in range(most):
        known = basis[: k + 1]
        w = product(basis[k])
        alpha = float(torch.dot(w, basis[k]))
        if not math.isfinite(alpha):
            raise ValueError(f"product {k + 1} of the operator is not finite: training has diverged, or it overflows")
        scale = float(w.norm())
        w = w - known.T @ (known @ w)
        w = w - known.T @ (known @ w)
        beta = float(w.norm())
        diagonal.append(alpha)
        # what is left is rounding: the subspace is invariant
        noise = 10 * torch.finfo(start.dtype).eps * max(scale, *map(abs, diagonal), *beside)
        exhausted = k + 1 == len(start) or beta <= noise
        if progress is not None:
            progress(k + 1, most)
        if exhausted or k + 1 == most:
            beside.append(0.0 if exhausted else beta)
            break
        beside.append(beta)
        if tolerance is not None and k > 0:
            found = _ritz(diagonal, beside, exhausted=False)
            if found.error(k) <= tolerance * float(found.ritz_values.abs().max()):
                break
        basis[k + 1] = w / beta
    return _ritz(diagonal, beside, exhausted=exhausted, basis=basis if ritz_vectors else None)


def _ritz(diagonal: list[float], beside: list[float], *, exhausted: bool, basis: Tensor | None = None) -> LanczosResult:
    """Eigenvalues of the tridiagonal matrix; the last of ``beside`` is what the next step would couple to."""
    k = len(diagonal)
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: k - 1], dtype=torch.float64)
    t += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(t)
    extremes = None
    if basis is not None:
        extremes = vectors[:, [0, -1]].T.to(basis.device, basis.dtype) @ basis[:k]
    return LanczosResult(values, (beside[k - 1] * vectors[-1]).abs(), vectors[0].square(), exhausted, extremes)
