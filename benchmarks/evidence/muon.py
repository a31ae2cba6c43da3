"""Muon in the precision that the CPU is fast at, for matrices and convolutions.

torch.optim.Muon takes matrices only, and orthogonalizes in bfloat16 even where the CPU has no such instructions and
is slow at it; this is the same update (Nesterov momentum 0.95, five Newton–Schulz steps with K. Jordan's
coefficients, the factor √max(1, rows/columns)) in float32 there, convolutions as (outputs, inputs × taps) matrices,
without weight decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_A, _B, _C = 3.4445, -4.7750, 2.0315
_DTYPE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class CPUMuon(Optimizer):
    """Args:
    matrices: Weights of two or more dimensions.
    lr: The rate.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group["lr"])

    def _step(self, p: Tensor, grad: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        state["momentum"].lerp_(grad, 0.05)
        direction = grad.lerp(state["momentum"], 0.95).flatten(1)
        update = orthogonalize(direction.to(_DTYPE) if p.dtype is torch.float32 else direction).to(p.dtype)
        p.add_(update.view_as(p), alpha=-lr * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of ``matrix`` = U Σ Vᵀ: singular values between .7 and 1.2."""
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.t()
        x = torch.addmm(x, torch.addmm(a, a, a, beta=_B, alpha=_C), x, beta=_A)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x
