"""The Lanczos iteration with full re-orthogonalization.

Every vector is made orthogonal to all earlier ones by two passes of Gram-Schmidt ("twice is enough": L. Giraud et al.,
Numerische Mathematik 101, 2005), so that no eigenvalue appears twice through rounding; float32 vectors then agree with
float64 to 2e-7. The price is memory for the basis, steps × n numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LanczosResult", "gaussian", "lanczos", "rademacher"]

Product = Callable[[Tensor], Tensor]
_BLOCK = 8


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
        asymmetry: How much a product ``u·Av`` differed from ``v·Au`` at most, relative to the largest seen. Rounding,
            unless the products are not those of one symmetric matrix.
        components: The tridiagonal matrix's eigenvectors as columns, (k, k).
        basis: The Lanczos vectors as rows, (k, n), in their own dtype; None unless asked for.
    """

    ritz_values: Tensor
    residuals: Tensor
    weights: Tensor
    exhausted: bool
    asymmetry: float
    components: Tensor
    basis: Tensor | None = None

    @property
    def steps(self) -> int:
        """``k``, which is also the number of products."""
        return len(self.ritz_values)

    def ritz_vectors(self, chosen: Tensor) -> Tensor:
        """Approximate eigenvectors, as orthonormal rows.

        Args:
            chosen: Which, as a mask or indices into ``ritz_values``.

        Raises:
            ValueError: if the run did not keep its basis.
        """
        if self.basis is None:
            raise ValueError("the basis was not kept: run lanczos(..., keep_basis=True)")
        return self.components.T[chosen].to(self.basis.device, self.basis.dtype) @ self.basis

    def error(self, i: int) -> float:
        """How far ``ritz_values[i]`` is from an eigenvalue, by estimate.

        The residual r is a bound. With a gap g to the rest of the spectrum r²/g is one too; g is taken from the other
        Ritz values, which is why this is only an estimate.
        """
        residual = float(self.residuals[i])
        others = torch.cat([self.ritz_values[:i], self.ritz_values[i + 1 :]])
        gap = float((others - self.ritz_values[i]).abs().min()) if len(others) else 0.0
        return min(residual, residual**2 / gap) if gap > 0 else residual

    def has_converged(self, tolerance: float) -> bool:
        """Whether the largest Ritz value is exact to ``tolerance`` of the largest absolute one, by estimate.

        NOTE: at initialization wide nets have close leading eigenvalues, and the estimated error was then 4 times too
        small: hence the factor.
        """
        return 4 * self.error(self.steps - 1) <= tolerance * float(self.ritz_values.abs().max())


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
    orthogonal_to: Tensor | None = None,
    keep_basis: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LanczosResult:
    """Run up to ``num_steps`` steps from ``start``.

    Args:
        product: ``v ↦ A v`` on vectors like ``start``, A symmetric; its result is not changed.
        start: Any vector (n,) but zero. Eigenvalues whose eigenvectors are orthogonal to it are not found.
        num_steps: Products at most; no more than n are made.
        tolerance: Stop as soon as the largest Ritz value has converged to it. None: make all steps.
        orthogonal_to: Orthonormal rows (m, n): the run is that of A restricted to what is orthogonal to them.
        keep_basis: Keep what eigenvectors are made of.
        progress: Called after each product with (done, at most).

    Raises:
        ValueError: if ``num_steps`` is below 1, ``start`` is zero or no vector (or lies in the span of
            ``orthogonal_to``), or a product is not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}, it must be at least 1")
    fixed = start.new_zeros(0, start.numel()) if orthogonal_to is None else orthogonal_to
    if start.dim() == 1:
        start = _without(fixed, start)
    if start.dim() != 1 or not float(start.norm()) > 0:
        raise ValueError(f"start has shape {tuple(start.shape)} and norm {float(start.norm())}: give a non-zero vector")
    room = len(start) - len(fixed)
    most = min(num_steps, room)
    basis = _Basis(start / start.norm(), most)
    diagonal: list[float] = []
    beside: list[float] = []
    exhausted = False
    gap, before = 0.0, basis.last
    for k in range(most):
        v = basis.last
        w = product(v)
        alpha = float(torch.dot(w, v))
        if not math.isfinite(alpha):
            raise ValueError(f"product {k + 1} of the operator is not finite: training has diverged, or it overflows")
        if k:
            gap = max(gap, abs(float(torch.dot(w, before)) - beside[-1]))
        before = v
        noise = 10 * torch.finfo(start.dtype).eps * max(float(w.norm()), abs(alpha), *map(abs, diagonal), *beside)
        w = basis.without(_without(fixed, w))
        beta = float(w.norm())
        exhausted = k + 1 == room or beta <= noise  # what is left is rounding
        diagonal.append(alpha)
        beside.append(0.0 if exhausted else beta)
        if progress is not None:
            progress(k + 1, most)
        if exhausted or k + 1 == most:
            break
        if tolerance is not None and k > 0 and _ritz(diagonal, beside, exhausted=False).has_converged(tolerance):
            break
        basis.append(w / beta)
    found = _ritz(diagonal, beside, exhausted=exhausted, basis=basis.rows() if keep_basis else None)
    return replace(found, asymmetry=gap / max(*map(abs, diagonal), *beside, 1e-300))


class _Basis:
    """Orthonormal rows, in blocks that are allocated as they are needed."""

    def __init__(self, first: Tensor, most: int) -> None:
        self._most = most
        self._count = 0
        self._blocks: list[Tensor] = []
        self.append(first)

    @property
    def last(self) -> Tensor:
        return self._blocks[-1][(self._count - 1) % _BLOCK]

    def append(self, v: Tensor) -> None:
        if self._count % _BLOCK == 0:
            self._blocks.append(v.new_empty(min(_BLOCK, self._most - self._count), len(v)))
        self._count += 1
        self.last.copy_(v)

    def without(self, w: Tensor) -> Tensor:
        """``w`` without its components along the rows, by two passes."""
        for _ in range(2):
            for i, block in enumerate(self._blocks):
                rows = block[: self._count - i * _BLOCK]
                w = w - rows.T @ (rows @ w)
        return w

    def rows(self) -> Tensor:
        """All of them, (k, n)."""
        return torch.cat([block[: self._count - i * _BLOCK] for i, block in enumerate(self._blocks)])


def _without(rows: Tensor, w: Tensor) -> Tensor:
    """``w`` without its components along orthonormal rows, by two passes."""
    if len(rows):
        w = w - rows.T @ (rows @ w)
        w = w - rows.T @ (rows @ w)
    return w


def _ritz(diagonal: list[float], beside: list[float], *, exhausted: bool, basis: Tensor | None = None) -> LanczosResult:
    """Eigenvalues of the tridiagonal matrix; the last of ``beside`` is what the next step would couple to."""
    k = len(diagonal)
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: k - 1], dtype=torch.float64)
    t += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(t)
    residuals = (beside[k - 1] * vectors[-1]).abs()
    return LanczosResult(values, residuals, vectors[0].square(), exhausted, 0.0, vectors, basis)
