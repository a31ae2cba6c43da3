"""What the checks of theory share: their form, random networks, and how a panel looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from bnp_optim import BNPreconditioner

__all__ = ["COLORS", "Check", "gaussian_", "inputs", "measured_optimizer", "mlp", "tidy"]

# Okabe-Ito: safe for color-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One figure of predicted against measured.

    Args:
        name: Of its files, and of ``--only``.
        points: Keyword arguments of ``measure``, plain values: what is measured, in order.
        measure: Returns plain numbers for a point.
        draw: Draws the rows, each a point with its numbers, and returns the figure.
        summary: Lines to print of the rows.
    """

    name: str
    points: Sequence[dict[str, Any]]
    measure: Callable[..., dict[str, Any]]
    draw: Callable[[Sequence[Row]], Figure]
    summary: Callable[[Sequence[Row]], Sequence[str]]


def gaussian_(model: nn.Module, weight_variance: float, bias_variance: float, seed: int) -> None:
    """Draw W ~ N(0, σw²/fan-in) and b ~ N(0, σb²)."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            with torch.no_grad():
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator))
                m.weight.mul_((weight_variance / m.weight[0].numel()) ** 0.5)
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * bias_variance**0.5)


def mlp(
    widths: Sequence[int], activation: type[nn.Module], variances: tuple[float, float], seed: int, gamma: float = 0.0
) -> nn.Sequential:
    """With BatchNorm of that constant γ before each activation, unless it is 0."""
    layers: list[nn.Module] = []
    for i, (m, n) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(m, n))
        if i + 2 < len(widths):
            if gamma:
                norm = nn.BatchNorm1d(n)
                nn.init.constant_(norm.weight, gamma)
                layers.append(norm.requires_grad_(False))
            layers.append(activation())
    net = nn.Sequential(*layers)
    gaussian_(net, *variances, seed)
    return net


def inputs(samples: int, *shape: int, seed: int) -> Tensor:
    """N(0, I)."""
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1000 + seed))


def measured_optimizer(model: nn.Module, x: Tensor) -> BNPreconditioner:
    """BNP's P for exactly this batch, without a step scale; the hooks are gone and the weights where they were."""
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0), model, step_scale=None)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.remove_hooks()
    return optimizer


def tidy(ax: Axes, title: str, x: str, y: str) -> None:
    """Titles, labels, a light frame and a legend."""
    ax.set_title(title, fontsize=10, fontweight="bold")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
