"""What the diagnostics share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnp_optim.curvature.batches import Batch, loss_of

__all__ = ["kurtosis", "loss_and_gradient", "new_axes", "num_samples_of", "shares_of"]


def num_samples_of(batches: Sequence[Batch]) -> int | None:
    """Samples in all of them; None if unknown."""
    sizes = [batch.num_samples for batch in batches]
    return None if None in sizes else sum(size or 0 for size in sizes)


def shares_of(batches: Sequence[Batch]) -> list[float]:
    """Each batch's weight in a mean over samples."""
    total = num_samples_of(batches)
    return [1 / len(batches) if total is None else (batch.num_samples or 0) / total for batch in batches]


def loss_and_gradient(
    batches: Sequence[Batch], params: Sequence[Tensor], restore: Callable[[], None]
) -> tuple[float, list[Tensor]]:
    """The mean loss and its gradient, in float32 at least and zero where there is none; ``restore`` before each batch.

    Raises:
        TypeError: if a closure returns neither a loss nor (outputs, loss as a function of outputs).
        ValueError: if a loss is no finite scalar with gradient history.
    """
    loss = 0.0
    gradient = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    for batch, share in zip(batches, shares_of(batches), strict=True):
        restore()
        value = loss_of(batch)
        loss += share * float(value.detach())
        for total, g in zip(gradient, torch.autograd.grad(value, params, allow_unused=True), strict=True):
            if g is not None:
                total.add_(g.detach(), alpha=share)
    return loss, gradient


def kurtosis(tensors: Sequence[Tensor]) -> float:
    """Plain kurtosis m₄/m₂² of all entries together: 3 for a Gaussian; NaN if they are all the same."""
    if not tensors:
        return math.nan
    x = torch.cat([t.detach().reshape(-1).to(tensors[0].device) for t in tensors])
    x = x - x.mean()
    size = x.abs().amax()
    if not bool(torch.isfinite(size)) or not float(size) > 0:
        return math.nan
    squares = (x / size).square()  # of entries up to 1: fourth powers of small gradients would vanish
    return float(squares.square().mean() / squares.mean().square())


def new_axes() -> Any:
    """Axes of a new matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots()[1]
