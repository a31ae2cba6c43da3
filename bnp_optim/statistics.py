"""Running mean and variance of every layer's input, in flat buffers over all layers of one device and dtype.

Per step and layer: the moments of the step's samples, committed once,

    δ = μ_A - μ,   μ ← μ + (1-r) δ,   σ² ← r σ² + (1-r)(σ_A² + r δ²),

the exact exponentially weighted variance of the mixture (variance="total"; "batch" drops ``r δ²``, as the
paper does, and has no variance at batch size 1). ``r`` is ρ, or with debias ``ρ(1-ρ^{t-1})/(1-ρ^t)``, so that
the first batch counts fully; it is kept as the mass ``w_t = 1 + ρ w_{t-1}``, for which ``r_t = 1 - 1/w_t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bnp_optim.layers import Rows
from bnp_optim.transform import Factors

__all__ = [
    "LayerStatistics",
    "Moments",
    "StatisticsBank",
    "StatisticsOptions",
    "merge_moments",
    "moments",
    "statistics_dtype",
]


class Moments(NamedTuple):
    """Samples of one layer, summed up. Counts are ints, or scalar tensors inside compiled graphs.

    Args:
        samples: ``N`` of the step scale.
        observations: Rows that the moments average over (samples × positions).
        mean: (channels,)
        m2: Σ (a - mean)², (channels,)
    """

    samples: int | Tensor
    observations: int | Tensor
    mean: Tensor
    m2: Tensor


def moments(values: Tensor, samples: int, dtype: torch.dtype) -> Moments:
    """The moments of ``values`` (observations, channels, *positions), by two passes.

    The deviations are taken from the batch's own mean, so |mean| ≫ std costs no digits of the variance.
    """
    values = values.to(dtype)
    dims = (0, *range(2, values.dim()))
    observations = values.numel() // values.shape[1]
    mean = values.mean(dims, keepdim=True)
    deviation = values - mean
    return Moments(samples, observations, mean.flatten(), (deviation * deviation).sum(dims))


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """In which precision a layer's statistics are kept: float32, or float64 where the layer is."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of the concatenation (Chan, Golub, LeVeque 1983)."""
    total = parts[0]
    for part in parts[1:]:
        n = total.observations + part.observations
        delta = part.mean - total.mean
        total = Moments(
            total.samples + part.samples,
            n,
            total.mean + delta * (part.observations / n),
            total.m2 + part.m2 + delta * delta * (total.observations * part.observations / n),
        )
    return total


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer's input looked like so far (a copy, in the layer's float32 or float64).

    Args:
        mean: ``μ``, (input channels,).
        variance: ``σ²``, without the floors that make it σ̃², (input channels,).
        count: Observations seen (samples, times positions for convolutions), an int64 scalar.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor


@dataclass(frozen=True)
class StatisticsOptions:
    """Options of :class:`bnp_optim.BNPreconditioner` that the statistics read; see there."""

    stat_decay: float
    var_rel_eps: float
    var_eps: float
    step_scale: str | None
    debias: bool
    variance: str


class StatisticsBank:
    """The statistics of several layers, side by side in flat buffers; everything is updated in place."""

    def __init__(
        self, rows: Sequence[Rows], options: StatisticsOptions, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows = tuple(rows)
        self.options = options
        sizes = [r.statistics for r in self.rows]
        layers, channels = len(sizes), sum(sizes)
        self._lengths = torch.tensor(sizes, device=device)
        self._layer_of = torch.repeat_interleave(torch.arange(layers, device=device), self._lengths)

        def full(size: int, value: float) -> Tensor:
            return torch.full((size,), value, device=device, dtype=dtype)

        self.mean = full(channels, 0.0)
        self.variance = full(channels, 0.0 if options.debias else 1.0)
        self.count = torch.zeros(layers, device=device, dtype=torch.int64)
        self.mass = full(layers, 0.0)
        self.q2 = full(layers, 1.0)
        self.inv_std = full(channels, 1.0)
        self.spread = full(layers, 1.0)
        # the step's own samples; counts change seldom, so the host remembers what it wrote
        self._batch_mean = full(channels, 0.0)
        self._batch_m2 = full(channels, 0.0)
        self._samples = full(layers, 0.0)
        self._observations = full(layers, 0.0)
        self._written: list[tuple[int | Tensor, int | Tensor]] = [(0, 0)] * layers
        self._nothing = full(max(sizes), 0.0)
        # Σ over channels to E over one row's inputs: K/groups
        self._taps_per_group = torch.tensor([r.taps / r.groups for r in self.rows], device=device, dtype=dtype)
        self._fan_in = torch.tensor([float(r.fan_in) for r in self.rows], device=device, dtype=dtype)
        self.means = torch.split(self.mean, sizes)
        self.variances = torch.split(self.variance, sizes)
        self._inv_stds = torch.split(self.inv_std, sizes)

    def gather(self, batch: Sequence[Moments | None]) -> Tensor:
        """Lay the step's samples side by side, one entry per layer; None leaves a layer as it is.

        Returns whether all of them are finite (a bool scalar tensor on the device).
        """
        sizes = [r.statistics for r in self.rows]
        means = [self._nothing[:n] if b is None else b.mean.to(self.mean) for b, n in zip(batch, sizes, strict=True)]
        m2s = [self._nothing[:n] if b is None else b.m2.to(self.mean) for b, n in zip(batch, sizes, strict=True)]
        torch.cat(means, out=self._batch_mean)
        torch.cat(m2s, out=self._batch_m2)
        for i, b in enumerate(batch):
            counts = (0, 0) if b is None else (b.samples, b.observations)
            for buffer, now, before in zip((self._samples, self._observations), counts, self._written[i], strict=True):
                if isinstance(now, Tensor):
                    buffer[i].copy_(now)
                elif isinstance(before, Tensor) or now != before:
                    buffer[i] = now
            self._written[i] = counts
        return torch.isfinite(self._batch_mean.sum() + self._batch_m2.sum())

    def commit(self, finite: Tensor) -> Tensor:
        """Take in what was gathered, or nothing of it unless ``finite``.

        Returns for each layer whether it was updated (a bool tensor on the device).
        """
        active = (self._observations > 0) & finite
        observations = self._observations.clamp(min=1)
        decay = self.options.stat_decay
        if self.options.debias:
            self.mass.copy_(torch.where(active, decay * self.mass + 1, self.mass))
            gain = torch.where(active, 1 / self.mass.clamp(min=1), 0.0)
        else:
            gain = active.to(self.mass.dtype) * (1 - decay)
        self.count += torch.where(active, self._observations, 0).to(torch.int64)

        per_channel = self._per_channel(active)
        gain_c = self._per_channel(gain)
        rest = 1 - gain_c
        delta = torch.where(per_channel, self._batch_mean - self.mean, 0)
        variance = torch.where(per_channel, self._batch_m2 / self._per_channel(observations), 0)
        self.mean.add_(gain_c * delta)
        mixture = variance + rest * delta.square() if self.options.variance == "total" else variance
        self.variance.mul_(rest).add_(gain_c * mixture)
        self.refresh()
        # E_batch[(a - μ)²] about the mean as just committed
        self._rescale(active, variance + (rest * delta).square())
        return active

    def refresh(self) -> None:
        """1/σ̃ from the variances: σ̃² = σ² + ε1·max(σ²) + ε2. A layer that has seen nothing keeps P = I."""
        seen = self.count > 0
        largest = self._per_channel(torch.segment_reduce(self.variance, "max", lengths=self._lengths, unsafe=True))
        floored = self.variance + self.options.var_rel_eps * largest + self.options.var_eps
        self.inv_std.copy_(torch.where(self._per_channel(seen), floored.rsqrt(), 1))
        if self.options.debias:  # otherwise the start, not the one observation, is what σ² rests on
            self.spread.copy_(self.count != 1)
        self.q2.masked_fill_(~seen, 1)

    def factors(self, layer: int) -> Factors:
        """P of one layer, taps expanded; the tensors are this step's."""
        rows = self.rows[layer]
        mean = self.means[layer].view(rows.groups, -1)
        inv_std = self._inv_stds[layer].view(rows.groups, -1)
        if rows.taps > 1:
            mean = mean.repeat_interleave(rows.taps, dim=1)
            inv_std = inv_std.repeat_interleave(rows.taps, dim=1)
        return Factors(mean, inv_std, self.q2[layer], self.spread[layer])

    def _rescale(self, active: Tensor, deviation: Tensor) -> None:
        """q² = max(·/N, 1) where the step brought samples ("spectral" is set from outside)."""
        scale = self.options.step_scale
        if scale == "trace":
            spread = deviation * self.inv_std.square()
            per_layer = torch.segment_reduce(spread, "sum", lengths=self._lengths, unsafe=True)
            size = 1 + self._taps_per_group * per_layer
        elif scale == "fan_in":
            size = self._fan_in
        else:
            return
        q2 = (size / self._samples.clamp(min=1)).clamp(min=1)
        self.q2.copy_(torch.where(active, q2, self.q2))

    def _per_channel(self, per_layer: Tensor) -> Tensor:
        return per_layer.index_select(0, self._layer_of)
