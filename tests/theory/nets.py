"""Random networks as the theory has them, and a slow Fisher matrix."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def gaussian_(model: nn.Module, weight_variance: float, bias_variance: float, seed: int) -> nn.Module:
    """Draw W ~ N(0, σw²/fan-in) and b ~ N(0, σb²)."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            with torch.no_grad():
                draw = torch.randn(m.weight.shape, generator=generator, dtype=torch.float64)
                m.weight.copy_(draw * (weight_variance / m.weight[0].numel()) ** 0.5)
                draw = torch.randn(m.bias.shape, generator=generator, dtype=torch.float64)
                m.bias.copy_(draw * bias_variance**0.5)
    return model


def batch_norm(module: nn.Module, gamma: float) -> nn.Module:
    """Constant γ, β = 0."""
    nn.init.constant_(module.weight, gamma)
    return module.requires_grad_(False)


def mlp(
    widths: list[int],
    activation: type[nn.Module],
    weight_variance: float,
    bias_variance: float,
    seed: int,
    gamma: float | None = None,
) -> nn.Sequential:
    """``widths`` from the inputs to the outputs; BatchNorm with that γ before each activation."""
    layers: list[nn.Module] = []
    for i, (m, n) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(m, n))
        if i + 2 < len(widths):
            if gamma is not None:
                layers.append(batch_norm(nn.BatchNorm1d(n), gamma))
            layers.append(activation())
    net = nn.Sequential(*layers)
    gaussian_(net, weight_variance, bias_variance, seed)
    return net


def inputs(samples: int, *shape: int, seed: int = 0) -> Tensor:
    """N(0, I)."""
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1000 + seed))


def dense_fisher(model: nn.Module, x: Tensor) -> Tensor:
    """JᵀJ/T, row by row."""
    params = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, params, retain_graph=True, materialize_grads=True)])
        for v in y.reshape(-1)
    ]
    j = torch.stack(rows)
    return j.T @ j / len(x)
