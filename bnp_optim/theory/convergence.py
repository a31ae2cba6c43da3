"""How fast gradient descent contracts, with and without P: the convergence theory of BNP.

On a loss that is convex around its minimizers but flat along them, gradient descent with step α contracts the rest with
the factor ``r = max(|1 - αλ_max|, |1 - αλ*_min|)``, λ*_min the smallest eigenvalue that is not zero. The best step is
``2/(λ_max + λ*_min)``, and then ``r = (κ* - 1)/(κ* + 1)`` with ``κ* = λ_max/λ*_min`` (S. Lange, K. Helfrich, Q. Ye,
JMLR 23(72), 2022; reconstructed). In the coordinates ``w = P z`` the matrix is PᵀHP.

κ* exists only where zero and non-zero eigenvalues are apart: exactly rank-deficient problems. The spectrum of a trained
network is continuous down to rounding, where κ* would measure the tolerance; there it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_optim.checks import check_number
from bnp_optim.curvature import SymmetricOperator

__all__ = ["EffectiveCondition", "contraction_rate", "effective_condition_number", "preconditioning_matrix"]

_LARGEST = 5000  # rows of a matrix that is formed and decomposed: 200 MB, a minute
_GAP = 1e3


@dataclass(frozen=True, kw_only=True)
class EffectiveCondition:
    """The spectrum's part that gradient descent feels.

    Args:
        lambda_max: The largest eigenvalue.
        lambda_min: ``λ*_min``, the smallest that counts as non-zero.
        rank: How many do.
        size: Of the matrix.
        tolerance: Eigenvalues up to ``tolerance · lambda_max`` count as zero.
        gap: λ*_min over the largest |eigenvalue| that counts as zero, or over rounding if there is none.
    """

    lambda_max: float
    lambda_min: float
    rank: int
    size: int
    tolerance: float
    gap: float

    @property
    def condition_number(self) -> float:
        """``κ* = λ_max/λ*_min``."""
        return self.lambda_max / self.lambda_min

    @property
    def best_step(self) -> float:
        """``2/(λ_max + λ*_min)``."""
        return 2 / (self.lambda_max + self.lambda_min)

    def rate(self, step: float | None = None) -> float:
        """``r = max(|1 - αλ_max|, |1 - αλ*_min|)`` for step α; None: the best, (κ* - 1)/(κ* + 1)."""
        if step is None:
            return (self.lambda_max - self.lambda_min) / (self.lambda_max + self.lambda_min)
        check_number("step", step, lambda a: a > 0 and math.isfinite(a), "positive and finite: a learning rate")
        return max(abs(1 - step * self.lambda_max), abs(1 - step * self.lambda_min))

    def __str__(self) -> str:
        return (
            f"κ* {self.condition_number:.6g}: λ_max {self.lambda_max:.6g}, λ*_min {self.lambda_min:.6g}, rank "
            f"{self.rank} of {self.size} (zero: up to {self.tolerance:.1g}·λ_max; gap {self.gap:.1g}); best step "
            f"{self.best_step:.6g}, rate 1 - {1 - self.rate():.6g}"
        )


def effective_condition_number(
    matrix: Tensor | SymmetricOperator,
    *,
    preconditioner: Tensor | None = None,
    tolerance: float | None = None,
    min_gap: float = _GAP,
) -> EffectiveCondition:
    """κ* of H, or of PᵀHP, from all eigenvalues.

    Args:
        matrix: H, symmetric and positive semidefinite, (n, n); or an operator of :mod:`bnp_optim.curvature`, which is
            formed from n products: ``PreconditionedOperator(HessianOperator(closure, params), optimizer)`` is PᵀHP.
        preconditioner: P as a matrix (n, n), such as :func:`preconditioning_matrix`.
        tolerance: Relative to λ_max: up to there an eigenvalue counts as zero. None: n times the matrix's machine
            precision, as ranks are told numerically.
        min_gap: The smallest non-zero eigenvalue must be so many times the largest that counts as zero (or rounding).

    Raises:
        TypeError: if ``matrix`` is neither tensor nor operator.
        ValueError: if the matrix is not square, symmetric and finite, is zero, has a negative eigenvalue, is too large
            (n > 5000), or has no gap there: κ* is not defined then.
    """
    h = _dense(matrix)
    eps = float(torch.finfo(h.dtype).eps)
    h = h.double()
    n = len(h)
    if preconditioner is not None:
        p = preconditioner.detach().double().cpu()
        if p.shape != h.shape:
            raise ValueError(f"preconditioner has shape {tuple(p.shape)}, it must be {tuple(h.shape)}, as the matrix")
        h = p.T @ h @ p
    values = torch.linalg.eigvalsh((h + h.T) / 2)
    largest = float(values[-1])
    if tolerance is None:
        tolerance = n * eps
    check_number("tolerance", tolerance, lambda t: 0 < t < 1, "in (0, 1), relative to the largest eigenvalue")
    if not largest > 0 or float(values[0]) < -tolerance * largest:
        raise ValueError(
            f"matrix has eigenvalues from {float(values[0]):.4g} to {largest:.4g}: κ* is defined for positive "
            "semidefinite ones; estimate_conditioning has condition numbers for others"
        )
    kept = values[values > tolerance * largest]
    zeros = values[: n - len(kept)].abs()
    below = max(float(zeros.max()) if len(zeros) else 0.0, eps * largest)
    gap = float(kept[0]) / below
    if gap < min_gap:
        raise ValueError(
            f"matrix has no gap between zero and non-zero eigenvalues: {float(kept[0]):.3g} counts as non-zero and "
            f"{below:.3g} as zero, with λ_max {largest:.3g} and tolerance {tolerance:.1g}. κ* would measure the "
            "tolerance: give one that lies in a gap, or use estimate_conditioning and its kappa_mean"
        )
    return EffectiveCondition(
        lambda_max=largest, lambda_min=float(kept[0]), rank=len(kept), size=n, tolerance=tolerance, gap=gap
    )


def contraction_rate(
    matrix: Tensor | SymmetricOperator | EffectiveCondition,
    step: float | None = None,
    *,
    preconditioner: Tensor | None = None,
    tolerance: float | None = None,
) -> float:
    """The factor by which a step of gradient descent shrinks the distance to the minimizers; above 1 it diverges.

    Args:
        matrix: H, as in :func:`effective_condition_number`, or its result.
        step: α. None: the best, ``2/(λ_max + λ*_min)``.
        preconditioner: As there.
        tolerance: As there.
    """
    if isinstance(matrix, EffectiveCondition):
        return matrix.rate(step)
    return effective_condition_number(matrix, preconditioner=preconditioner, tolerance=tolerance).rate(step)


def preconditioning_matrix(
    mean: Tensor | Iterable[float],
    variance: Tensor | Iterable[float],
    *,
    var_rel_eps: float = 1e-2,
    var_eps: float = 1e-4,
    q2: float = 1.0,
) -> Tensor:
    """``P = (1/q) U D`` as a matrix (n+1, n+1) on one unit's [b | w], float64.

    Args:
        mean: μ of the layer's input, (n,).
        variance: σ², (n,); σ̃² = σ² + ε1·max(σ²) + ε2.
        var_rel_eps: ε1; the defaults are the optimizer's.
        var_eps: ε2.
        q2: q². 1: without a step scale.

    Raises:
        ValueError: if the shapes differ, a variance is negative, or q2 or σ̃² is not positive.
    """
    mu, var = (
        torch.as_tensor(t if isinstance(t, Tensor) else list(t)).detach().double().cpu() for t in (mean, variance)
    )
    if mu.dim() != 1 or mu.shape != var.shape or not len(mu):
        raise ValueError(f"mean and variance have shapes {tuple(mu.shape)} and {tuple(var.shape)}: both must be (n,)")
    tilde = var + var_rel_eps * var.max() + var_eps
    if not bool((var >= 0).all() and (tilde > 0).all() and q2 > 0):
        raise ValueError(f"variance has minimum {float(var.min()):.4g} and q2 is {q2!r}: σ̃² and q² must be positive")
    p = torch.eye(len(mu) + 1, dtype=torch.float64)
    p[1:, 1:] = torch.diag(tilde.rsqrt())
    p[0, 1:] = -mu * tilde.rsqrt()
    return p / math.sqrt(q2)


def _dense(matrix: Tensor | SymmetricOperator) -> Tensor:
    """The matrix, in its own precision, on the CPU."""
    if isinstance(matrix, Tensor):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix) or matrix.is_complex():
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, it must be square and real")
        h = matrix.detach().cpu()
        h = h if h.is_floating_point() else h.double()
        if not bool(torch.isfinite(h).all()):
            raise ValueError("matrix is not finite: there is no curvature where training diverged")
        if float((h - h.T).abs().max()) > 1e3 * torch.finfo(h.dtype).eps * float(h.abs().max()):
            raise ValueError("matrix is not symmetric: pass PᵀHP, not PPᵀH, whose eigenvalues are the same")
        _check_size(len(h))
        return h
    if not (callable(matrix) and hasattr(matrix, "size") and hasattr(matrix, "dtype")):
        raise TypeError(
            f"matrix is a {type(matrix).__name__}, it must be a tensor or an operator of bnp_optim.curvature"
        )
    _check_size(matrix.size)
    identity = torch.eye(matrix.size, dtype=matrix.dtype, device=matrix.device)
    return torch.stack([matrix(row) for row in identity]).cpu()


def _check_size(n: int) -> None:
    if n > _LARGEST:
        raise ValueError(f"matrix has {n} rows, all of whose eigenvalues are needed: at most {_LARGEST}")
