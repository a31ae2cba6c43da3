"""P, Pᵀ and P Pᵀ on the gradient of one layer: pure algebra in the paper's notation.

With û = [b | W] and one row per output, BNP changes variables by ``ŵ = P z``,

    P = (1/q) U D,   U = [[1, -μᵀ], [0, I]],   D = diag(1, 1/σ̃)

(Lange, Helfrich, Ye, JMLR 2022; constants reconstructed). A weight whose bias takes no part has the metric
``q²(μμᵀ + diag σ̃²)`` left, whose inverse square root is the rank-one form

    P = (1/q) diag(1/σ̃) (I - v vᵀ / (r(r+1))),   v = μ/σ̃,   r = √(1 + ‖v‖²).

All functions work in place on ``weight`` of shape (groups, rows, m) and ``bias`` of shape (groups, rows) or None,
which selects the form; with factors of shape (m,) also on (rows, m) and (rows,).

NOTE: ``G_w - G_b μᵀ`` is formed before anything is scaled. Expanding the product for the bias, ``G_b/q² -
(…)μ``, into separate terms loses every digit once |μ|/σ is large. So three passes over the weight remain: the shear,
the scaling, the product with μ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

__all__ = ["Factors", "add_from_z", "from_z", "norm2", "precondition", "safe", "to_z"]


@dataclass(eq=False)
class Factors:
    """What P consists of, for one layer.

    What the affine forms need is derived on first use; a bank that has it for all its layers at once assigns it,
    1/q² and 1/q as plain numbers where the host knows them.

    Args:
        mean: ``μ``, (groups, m) or (m,).
        inv_std: ``1/σ̃``, like ``mean``.
        q2: ``q²``, scalar tensor.
        spread: 1, or 0 while the statistics rest on a single observation: the deviations from the mean are then
            exactly zero, and what a gradient shows of them is rounding, which ``1/σ̃`` would blow up. Scalar tensor.
    """

    mean: Tensor
    inv_std: Tensor
    q2: Tensor
    spread: Tensor

    @cached_property
    def inv_q2(self) -> Tensor | float:
        """1/q²."""
        return self.q2.reciprocal()

    @cached_property
    def inv_q(self) -> Tensor | float:
        """1/q."""
        return self.q2.rsqrt()

    @cached_property
    def scale2(self) -> Tensor:
        """1/(q²σ̃²), or 0: what P Pᵀ multiplies the columns with."""
        return self.inv_std.square() * (self.spread * self.inv_q2)

    @cached_property
    def scale(self) -> Tensor:
        """1/(q σ̃), or 0: what P and Pᵀ multiply the columns with."""
        return self.inv_std * (self.spread * self.inv_q)


def precondition(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``g ← P Pᵀ g``: G̃_w = (G_w - G_b μᵀ) diag(1/σ̃²)/q², G̃_b = G_b/q² - G̃_w μ."""
    if bias is None:
        along = _split(weight, f)
        weight.mul_(_columns(f.scale2))
        # (PPᵀ)μ = D⁻²μ / (1 + ‖v‖²), the component that centring leaves
        _add_outer(weight, along, f.mean * f.inv_std.square() / ((1 + norm2(f)).unsqueeze(-1) * f.q2))
        return
    weight.addcmul_(bias.unsqueeze(-1), _columns(f.mean), value=-1)
    weight.mul_(_columns(f.scale2))
    _shear_back(weight, bias, f.mean, f.inv_q2)


def to_z(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``g ← Pᵀ g``, the gradient in the coordinates z."""
    if bias is None:
        along = _split(weight, f)
        weight.mul_(_columns(f.scale))
        _add_outer(weight, along, f.mean * f.inv_std / ((1 + norm2(f)).sqrt().unsqueeze(-1) * f.q2.sqrt()))
        return
    weight.addcmul_(bias.unsqueeze(-1), _columns(f.mean), value=-1)
    weight.mul_(_columns(f.scale))
    bias.mul_(f.inv_q)


def from_z(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``Δz ← P Δz``, an update of z as an update of the parameters."""
    if bias is None:
        # Δz = (Δz - c vᵀ) + c vᵀ with v = μ/σ̃; S v = v/r and S acts as the identity on the rest
        v = f.mean * f.inv_std
        length2 = norm2(f)
        along = _times(weight, v) / safe(length2).unsqueeze(-1)
        _add_outer(weight, along, -v)
        weight.mul_(_columns(f.scale))
        _add_outer(weight, along, v * f.inv_std / ((1 + length2).sqrt().unsqueeze(-1) * f.q2.sqrt()))
        return
    weight.mul_(_columns(f.scale))
    _shear_back(weight, bias, f.mean, f.inv_q)


def add_from_z(weight: Tensor, bias: Tensor, dz: Tensor, dz_bias: Tensor, f: Factors) -> None:
    """``w ← w + P Δz`` for a weight with its bias: :func:`from_z` and the addition in fewer passes; uses Δz_b up."""
    weight.addcmul_(dz, _columns(f.scale))
    _shear_back(dz, dz_bias, f.scale * f.mean, f.inv_q)
    bias.add_(dz_bias)


def _columns(v: Tensor) -> Tensor:
    """``v`` as it broadcasts over the rows of a weight."""
    return v if v.dim() == 1 else v.unsqueeze(-2)


def _times(weight: Tensor, v: Tensor) -> Tensor:
    return weight @ v if v.dim() == 1 else (weight @ v.unsqueeze(-1)).squeeze(-1)


def _shear_back(weight: Tensor, bias: Tensor, mean: Tensor, factor: Tensor | float) -> None:
    """In place, bias ← factor · bias - weight μ."""
    if weight.dim() == 2 and isinstance(factor, float):
        bias.addmv_(weight, mean, beta=factor, alpha=-1)
    else:
        bias.mul_(factor).sub_(_times(weight, mean))


def _add_outer(weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    """In place, weight += rows ⊗ columns, block by block."""
    weight.addcmul_(rows.unsqueeze(-1), _columns(columns))


def _split(weight: Tensor, f: Factors) -> Tensor:
    """Take ``c μᵀ`` out of the gradient rows, c the coefficient along μ in the metric D⁻²; returns c."""
    along = _times(weight, f.mean * f.inv_std.square()) / safe(norm2(f)).unsqueeze(-1)
    _add_outer(weight, along, -f.mean)
    return along


def norm2(f: Factors) -> Tensor:
    """‖v‖² per group."""
    return (f.mean * f.inv_std).square().sum(-1)


def safe(length2: Tensor) -> Tensor:
    """A divisor: zero means along nothing, and the numerator is zero too."""
    return length2.masked_fill(length2 == 0, 1)
