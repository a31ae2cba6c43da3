"""``step_scale="spectral"``: q² = max(λ_max(Pᵀ ÂᵀÂ P)/rows, 1), by one warm-started power step per step.

``Â`` has a row [1, a] per observation (for convolutions per output position, with its padding). The direction is
carried in weight coordinates, u: the forward pass adds y = Âu, z = Âᵀy and ‖y‖², and the step, which knows the
newest P, closes the power step

    λ̂ = ‖Pᵀz‖² / (rows ‖y‖²),   v = Pᵀz/‖Pᵀz‖,   u ← P v.

In this form one step is exact at batch size 1, and z and ‖y‖² add up over micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnp_optim.layers import ModuleAdapter, Rows
from bnp_optim.transform import Factors, from_z, to_z

__all__ = ["Projection", "initial_direction", "power_step", "project"]


@dataclass
class Projection:
    """Sums over a step's observations, per group.

    Args:
        weight: Aᵀy, (groups, fan_in).
        bias: 1ᵀy, (groups,).
        norm2: ‖y‖², (groups,).
        rows: Rows of Â; a tensor (groups,) where groups have different inputs.
    """

    weight: Tensor
    bias: Tensor
    norm2: Tensor
    rows: int | Tensor

    def __add__(self, other: Projection) -> Projection:
        return Projection(
            self.weight + other.weight,
            self.bias + other.bias,
            self.norm2 + other.norm2,
            self.rows + other.rows,
        )


def initial_direction(rows: Rows, layer: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A fixed random direction (groups, 1 + fan_in), bias first; the global random numbers stay untouched."""
    generator = torch.Generator().manual_seed(layer)
    u = torch.randn(rows.groups, 1 + rows.fan_in, generator=generator, dtype=torch.float64)
    return (u / u.square().sum(1, keepdim=True).sqrt()).to(dtype).to(device)


def project(
    adapter: ModuleAdapter, module: nn.Module, values: Tensor | tuple[Tensor, ...], direction: Tensor
) -> Projection:
    """The sums for one forward pass of one module, whose input is ``values`` (see :class:`bnp_optim.Samples`)."""
    if isinstance(values, tuple):
        each = [project(adapter, module, v, u[None]) for v, u in zip(values, direction, strict=True)]
        weight, bias, norm2 = (torch.cat(x) for x in zip(*((p.weight, p.bias, p.norm2) for p in each), strict=True))
        return Projection(weight, bias, norm2, norm2.new_tensor([p.rows for p in each]))
    values = values.to(direction.dtype)
    y = adapter.respond(module, values, direction[:, 1:]) + direction[:, :1]
    y2 = y.transpose(0, 1).flatten(1)
    z = adapter.correlate(module, values, y)
    return Projection(z, y2.sum(1), y2.square().sum(1), y2.shape[1])


def power_step(total: Projection, factors: Factors, *, affine: bool, direction: Tensor, active: Tensor) -> Tensor:
    """Close the power step; updates ``direction`` in place and returns q², a scalar tensor.

    Args:
        total: The step's sums.
        direction: u, (groups, 1 + fan_in).
        factors: The newest μ, 1/σ̃; its q² is ignored (P is taken at q = 1).
        affine: Whether the bias takes part in P.
        active: Whether the step's samples count (a bool scalar tensor); if not, ``direction`` stays.
    """
    mean, inv_std = (v.view(direction.shape[0], -1) for v in (factors.mean, factors.inv_std))
    p = Factors(mean, inv_std, torch.ones_like(factors.q2), factors.spread)
    weight = total.weight.unsqueeze(1).clone()
    bias = total.bias.unsqueeze(1).clone() if affine else None
    to_z(weight, bias, p)
    norm2 = weight.square().sum((1, 2)) + (bias.square().sum(1) if bias is not None else 0)
    usable = torch.isfinite(norm2) & (norm2 > 0) & (total.norm2 > 0)
    top = torch.where(usable, norm2 / (total.rows * total.norm2), 0).max()

    inverse = norm2.clamp(min=torch.finfo(norm2.dtype).tiny).rsqrt()[:, None]
    weight.mul_(inverse.unsqueeze(2))
    if bias is not None:
        bias.mul_(inverse)
    from_z(weight, bias, p)
    new = torch.cat([torch.zeros_like(direction[:, :1]) if bias is None else bias, weight.squeeze(1)], dim=1)
    direction.copy_(torch.where((usable & active)[:, None], new, direction))
    return top.clamp(min=1)
