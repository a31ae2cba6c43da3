"""P, Pᵀ and P Pᵀ on the gradient of one layer: pure algebra in the paper's notation.

With û = [b | W] and one row per output, BNP changes variables by ``ŵ = P z``,

    P = (1/q) U D,   U = [[1, -μᵀ], [0, I]],   D = diag(1, 1/σ̃)

(Lange, Helfrich, Ye, JMLR 2022; constants reconstructed). A weight whose bias takes no part has the metric
``q²(μμᵀ + diag σ̃²)`` left, whose inverse square root is the rank-one form

    P = (1/q) diag(1/σ̃) (I - v vᵀ / (r(r+1))),   v = μ/σ̃,   r = √(1 + ‖v‖²).

All functions work in place on ``weight`` of shape (groups, rows, m) and ``bias`` of shape (groups, rows) or
None, which selects the form.

NOTE: ``G_w - G_b μᵀ`` is formed before anything is scaled. Expanding the product for the bias, ``G_b/q² -
(…)μ``, into separate terms loses every digit once |μ|/σ is large.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Factors", "from_z", "precondition", "to_z"]


@dataclass(frozen=True)
class Factors:
    """What P consists of, for one layer.

    Args:
        mean: ``μ``, (groups, m).
        inv_std: ``1/σ̃``, (groups, m).
        q2: ``q²``, scalar tensor.
        spread: 1, or 0 while the statistics rest on a single observation: the deviations from the mean are then
            exactly zero, and what a gradient shows of them is rounding, which ``1/σ̃`` would blow up. Scalar tensor.
    """

    mean: Tensor
    inv_std: Tensor
    q2: Tensor
    spread: Tensor


def precondition(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``g ← P Pᵀ g``: G̃_w = (G_w - G_b μᵀ) diag(1/σ̃²)/q², G̃_b = G_b/q² - G̃_w μ."""
    inv_var = f.inv_std.square() * (f.spread / f.q2)
    if bias is None:
        along = _split(weight, f)
        weight.mul_(inv_var.unsqueeze(1))
        # (PPᵀ)μ = D⁻²μ / (1 + ‖v‖²), the component that centring leaves
        back = f.mean * f.inv_std.square() / ((1 + _norm2(f)).unsqueeze(1) * f.q2)
        _add_outer(weight, along, back)
        return
    _add_outer(weight, bias, -f.mean)
    weight.mul_(inv_var.unsqueeze(1))
    bias.div_(f.q2).sub_((weight @ f.mean.unsqueeze(2)).squeeze(2))


def to_z(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``g ← Pᵀ g``, the gradient in the coordinates z."""
    q = f.q2.sqrt()
    scale = f.inv_std * (f.spread / q)
    if bias is None:
        along = _split(weight, f)
        weight.mul_(scale.unsqueeze(1))
        back = f.mean * f.inv_std / ((1 + _norm2(f)).sqrt().unsqueeze(1) * q)
        _add_outer(weight, along, back)
        return
    _add_outer(weight, bias, -f.mean)
    weight.mul_(scale.unsqueeze(1))
    bias.div_(q)


def from_z(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``Δz ← P Δz``, an update of z as an update of the parameters."""
    q = f.q2.sqrt()
    scale = f.inv_std * (f.spread / q)
    if bias is None:
        # Δz = (Δz - c vᵀ) + c vᵀ with v = μ/σ̃; S v = v/r and S acts as the identity on the rest
        v = f.mean * f.inv_std
        norm2 = _norm2(f)
        along = (weight @ v.unsqueeze(2)).squeeze(2) / _safe(norm2).unsqueeze(1)
        _add_outer(weight, along, -v)
        weight.mul_(scale.unsqueeze(1))
        _add_outer(weight, along, v * f.inv_std / ((1 + norm2).sqrt().unsqueeze(1) * q))
        return
    weight.mul_(scale.unsqueeze(1))
    bias.div_(q).sub_((weight @ f.mean.unsqueeze(2)).squeeze(2))


def _add_outer(weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    """In place, weight += rows ⊗ columns, block by block."""
    weight.baddbmm_(rows.unsqueeze(2), columns.unsqueeze(1))


def _split(weight: Tensor, f: Factors) -> Tensor:
    """Take ``c μᵀ`` out of the gradient rows, c the coefficient along μ in the metric D⁻²; returns c."""
    along = (weight @ (f.mean * f.inv_std.square()).unsqueeze(2)).squeeze(2) / _safe(_norm2(f)).unsqueeze(1)
    _add_outer(weight, along, -f.mean)
    return along


def _norm2(f: Factors) -> Tensor:
    """‖v‖² per group."""
    return (f.mean * f.inv_std).square().sum(1)


def _safe(norm2: Tensor) -> Tensor:
    """A divisor: zero means along nothing, and the numerator is zero too."""
    return norm2.masked_fill(norm2 == 0, 1)
