"""A layer's samples, summed up: number, mean and variance of every input channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "behind_taps", "merge_moments", "moments", "side_by_side", "statistics_dtype", "thinned"]

# Rows that torch's kernel adds up one after the other: rounding grows with their number, so longer columns are folded
_RUN = 256
# Below so many samples the columns' own moments are most of the work
_FEW = 16


class Moments(NamedTuple):
    """Samples of one layer, summed up. Counts are ints, or scalar tensors inside compiled graphs.

    Args:
        samples: ``N`` of the step scale.
        observations: Rows that the moments average over (samples × positions).
        mean: μ_A, (channels,); for a single observation (1, channels).
        variance: σ_A², the mean of (a - μ_A)², (channels,); None for a single observation, which has none.
    """

    samples: int | Tensor
    observations: int | Tensor
    mean: Tensor
    variance: Tensor | None


def moments(values: Tensor, samples: int, dtype: torch.dtype, *, view: bool = False) -> Moments:
    """The moments of ``values`` (observations, channels, *positions), without gradient history.

    A single observation is copied, or with ``view`` kept as it is.

    Deviations are taken from the batch's own means, so |mean| ≫ std costs no digits of the variance.
    """
    if values.dtype is not dtype:
        values = values.to(dtype)
    observations = values.numel() // values.shape[1]
    if torch.compiler.is_compiling():
        return Moments(samples, observations, *_two_passes(values))
    if observations == 1:
        values = values if values.dim() == 2 else values.reshape(1, -1)
        return Moments(samples, 1, values if view else values.clone(), None)
    if not values.is_cpu:  # one pass over the activation, whatever its memory format
        variance, mean = torch.var_mean(values, (0, *range(2, values.dim())), correction=0)
        return Moments(samples, observations, mean, variance)
    return Moments(samples, observations, *_on_cpu(values))


def side_by_side(groups: Sequence[Moments]) -> Moments:
    """The moments of groups of channels that were observed apart, as those of one layer.

    Where groups saw different numbers, as the queries and keys of attention do, ``samples`` is the smallest (the
    bound on the step then holds for each) and ``observations`` the largest.
    """
    samples, observations = min(g.samples for g in groups), max(g.observations for g in groups)
    mean = torch.cat([g.mean.flatten() for g in groups])
    if all(g.variance is None for g in groups):
        return Moments(samples, 1, mean.unsqueeze(0), None)
    zero = torch.zeros_like(groups[0].mean.flatten())
    return Moments(samples, observations, mean, torch.cat([zero if g.variance is None else g.variance for g in groups]))


def behind_taps(m: Moments, occupancy: Tensor) -> Moments:
    """The moments of what every tap of a kernel sees: an input at a share of the output positions, or else a zero.

    With ``o`` the occupancy: mean o·μ, variance o(σ² + μ²) - o²μ², channel by channel, tap by tap.
    """
    o = occupancy.to(m.mean)
    mean = m.mean.flatten().unsqueeze(1)
    squares = mean * mean * (o * (1 - o))
    variance = squares if m.variance is None else squares + m.variance.unsqueeze(1) * o
    # several observations: even where the input was a single one, the taps see it and zeros
    observations = max(m.observations, 2)
    return Moments(m.samples, observations, (mean * o).flatten(), variance.flatten())


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of the concatenation (Chan, Golub, LeVeque 1983)."""
    total = parts[0]
    if len(parts) > 1:
        total = total._replace(mean=total.mean.flatten())
    for part in parts[1:]:
        n = total.observations + part.observations
        share = part.observations / n
        delta = part.mean.flatten() - total.mean
        spread = delta * delta * (share * (1 - share))
        if total.variance is not None:
            spread = spread + total.variance * (1 - share)
        if part.variance is not None:
            spread = spread + part.variance * share
        total = Moments(total.samples + part.samples, n, total.mean + delta * share, spread)
    return total


def thinned(values: Tensor, limit: int | None, offset: int) -> Tensor:
    """Every k-th row of positions (of observations, where there are no positions), k so that about ``limit`` stay.

    Args:
        values: (observations, channels, *positions).
        limit: How many observations (times positions) are wanted; None: all.
        offset: Which of the k possible choices, modulo k.
    """
    if limit is None:
        return values
    stride = min(-(-(values.numel() // values.shape[1]) // limit), values.shape[2] if values.dim() > 2 else limit)
    if stride <= 1:
        return values
    return values[:, :, offset % stride :: stride] if values.dim() > 2 else values[offset % stride :: stride]


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """In which precision a layer's statistics are kept: float32, or float64 where the layer is."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _two_passes(values: Tensor) -> tuple[Tensor, Tensor]:
    dims = (0, *range(2, values.dim()))
    mean = values.mean(dims, keepdim=True)
    deviation = values - mean
    return mean.flatten(), (deviation * deviation).mean(dims)


def _on_cpu(values: Tensor) -> tuple[Tensor, Tensor]:
    """Memory read in its order, and seldom twice.

    Measured on one core: 81 µs for 256 × 1024, where two passes take 320 and ``torch.var_mean`` 1,000; 1.1 ms for
    128 × 16 × 32 × 32 against 4.2 and 16.
    """
    channels = values.shape[1]
    if values.dim() > 2:
        if not values.is_contiguous() and values.movedim(1, -1).is_contiguous():  # channels_last
            values = values.movedim(1, -1).reshape(-1, channels)
        elif values.shape[0] < _FEW:
            return _two_passes(values)
    observations = values.shape[0]
    rows = values.reshape(observations, -1)
    if observations <= 2 * _RUN:
        return _down_columns(rows, 1, channels)
    fold = observations // _RUN
    cut = observations - observations % fold
    head = _down_columns(rows[:cut].view(cut // fold, -1), fold, channels)
    if cut == observations:
        return head
    tail = _down_columns(rows[cut:], 1, channels)
    whole = merge_moments([Moments(0, cut, *head), Moments(0, observations - cut, *tail)])
    assert whole.variance is not None
    return whole.mean, whole.variance


def _down_columns(rows: Tensor, fold: int, channels: int) -> tuple[Tensor, Tensor]:
    """Moments of each column of ``rows`` (rows, fold × channels × positions), merged to one per channel.

    Batch normalization's own kernel; on two dimensions it is vectorized along the columns.
    """
    mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
    if mean.shape[0] == channels:
        return mean, variance
    mean, variance = mean.view(fold, channels, -1), variance.view(fold, channels, -1)
    center = mean.mean((0, 2), keepdim=True)
    deviation = mean - center
    return center.flatten(), torch.addcmul(variance, deviation, deviation).mean((0, 2))
