"""Running statistics that are right from the first batch on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnp_optim.checks import check_number
from bnp_optim.moments import moments

__all__ = ["advanced", "batch_statistics", "check_momentum", "newest_share"]


def check_momentum(momentum: Any) -> None:
    """Refuse what is neither None nor a number in (0, 1]."""
    if momentum is not None:
        check_number(
            "momentum", momentum, lambda m: 0 < m <= 1, "in (0, 1], such as 0.1, or None for the plain average"
        )


def newest_share(momentum: float | None, batches: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of the newest of ``batches`` batches: m/(1 - (1-m)^t), so that the first counts fully; 1/t for None.

    Without a host synchronization.
    """
    t = batches.to(dtype)
    if momentum is None:
        return t.reciprocal()
    rate = math.log1p(-momentum) if momentum < 1 else -math.inf
    return -momentum / torch.expm1(rate * t)


def batch_statistics(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of ``values`` (batch, channels, *positions), without history."""
    found = moments(values.detach(), len(values), dtype)
    mean = found.mean.flatten()
    return mean, torch.zeros_like(mean) if found.variance is None else found.variance


def advanced(
    mean: Tensor, variance: Tensor, batch_mean: Tensor, batch_variance: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and total variance with a batch of weight ``share`` mixed in (docs/method.md, "Statistics").

    The variance counts the distance of the batch's mean from the running one, so that single samples have one.
    """
    delta = batch_mean - mean
    return mean + share * delta, (1 - share) * variance + share * (batch_variance + (1 - share) * delta.square())
