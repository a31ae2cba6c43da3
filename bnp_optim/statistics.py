"""Running mean and variance of every layer's input, side by side in a few flat buffers.

Per step and layer: the moments of the step's samples, committed once,

    δ = μ_A - μ,   μ ← μ + (1-r) δ,   σ² ← r σ² + (1-r)(σ_A² + r δ²),

the exact exponentially weighted variance of the mixture (variance="total"; "batch" drops ``r δ²``, as the
paper does, and has no variance at batch size 1). The ledger says what ``r`` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_optim.layers import Rows
from bnp_optim.ledger import DeviceLedger, HostLedger, Ledger
from bnp_optim.moments import Moments
from bnp_optim.transform import Factors

__all__ = ["LayerStatistics", "StatisticsBank", "StatisticsOptions", "shelves"]

# Entries of a bank that may be padding, whatever the layers' widths
_SLACK = 2**14


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
    max_observations: int | None = None


def shelves(widths: Sequence[int]) -> list[list[int]]:
    """Split layers (by their numbers of channels) among banks so that padding stays below what they hold.

    Small networks fit into one bank, whose steps then cost the same for any number of layers.
    """
    banks: list[list[int]] = []
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        for bank in banks:
            padded = widths[bank[0]] * (len(bank) + 1)
            if padded <= 2 * (sum(widths[j] for j in bank) + widths[i]) or padded <= _SLACK:
                bank.append(i)
                break
        else:
            banks.append([i])
    return [sorted(bank) for bank in banks]


class StatisticsBank:
    """The statistics of several layers as the rows of (layers, width) buffers; everything is updated in place.

    Args:
        rows: The layers' geometries.
        squared: Whether P Pᵀ is wanted (its scale has 1/σ̃²) or P and Pᵀ (1/σ̃).
        on_host: Whether numbers that depend on the data may be read by the host.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        options: StatisticsOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        squared: bool,
        on_host: bool,
    ) -> None:
        self.rows = tuple(rows)
        self.options = options
        self.squared = squared
        sizes = [r.statistics for r in self.rows]
        layers, width = len(sizes), max(sizes)

        def full(*size: int, value: float = 0.0) -> Tensor:
            return torch.full(size, value, device=device, dtype=dtype)

        kind = HostLedger if on_host else DeviceLedger
        self.ledger: Ledger = kind(layers, options.stat_decay, options.debias, dtype=dtype, device=device)
        self._columns = full(3, layers, width)  # what a transform reads, together so that taps are expanded at once
        self.mean, self.inv_std, self._scale = self._columns
        self.inv_std.fill_(1)
        self.variance = full(layers, width)
        if not options.debias:
            for row, n in zip(self.variance, sizes, strict=True):
                row[:n] = 1
        self.q2 = full(layers, 1, value=1.0)
        self._inv = full(layers, 1, value=1.0)  # 1/q² or 1/q
        self._spread = full(layers, 1, value=1.0)
        self._batch = full(2, layers, width)  # the step's own means and variances
        self._blank = full(width)
        self._padding = [self._blank[n:] if n < width else None for n in sizes]
        self._varied = False
        self._known_single: Tensor | None = None
        # Σ over channels to E over one row's inputs: K/groups
        self._taps = torch.tensor([[r.taps / r.groups] for r in self.rows], device=device, dtype=dtype)
        self._fan_in = torch.tensor([[float(r.fan_in)] for r in self.rows], device=device, dtype=dtype)
        self._floor = torch.tensor(options.var_eps, device=device, dtype=dtype)
        self.means = [row[:n] for row, n in zip(self.mean, sizes, strict=True)]
        self.variances = [row[:n] for row, n in zip(self.variance, sizes, strict=True)]
        self._expand(device)
        self._pour()

    def _expand(self, device: torch.device) -> None:
        """Lay out the views that the factors are; a layer with taps has each channel repeated, in a buffer."""
        width = self.mean.shape[1]
        index = [
            torch.arange(r.statistics, device=device).repeat_interleave(r.taps) + i * width
            for i, r in enumerate(self.rows)
            if r.taps > 1
        ]
        self._index = torch.cat(index) if index else None
        self._taken = self._columns.new_zeros(3, 0 if self._index is None else self._index.numel())
        self._factors = []
        at = 0
        for i, r in enumerate(self.rows):
            columns = self._columns[:, i, : r.statistics]
            if r.taps > 1:
                columns = self._taken[:, at : at + r.statistics * r.taps]
                at += r.statistics * r.taps
            shape = (r.fan_in,) if r.groups == 1 else (r.groups, r.fan_in)
            mean, inv_std, scale = (c.view(shape) for c in columns)
            factors = Factors(mean, inv_std, self.q2[i, 0], self._spread[i, 0])
            if self.squared:
                factors.scale2, factors.inv_q2 = scale, self._inv[i, 0]
            else:
                factors.scale, factors.inv_q = scale, self._inv[i, 0]
            self._factors.append(factors)

    def gather(self, batch: Sequence[Moments | None]) -> Tensor:
        """Lay the step's samples side by side, one entry per layer; None leaves a layer as it is.

        Returns their sum (a scalar tensor), which is finite if all of them are.
        """
        self._entries = batch
        self._varied = any(b is not None and b.variance is not None for b in batch)
        pieces: list[Tensor] = []
        for b, padding in zip(batch, self._padding, strict=True):
            pieces.append(self._blank if b is None else b.mean)
            if b is not None and padding is not None:
                pieces.append(padding)
        if self._varied:
            for b, padding in zip(batch, self._padding, strict=True):
                missing = b is None or b.variance is None
                pieces.append(self._blank if missing else b.variance)  # type: ignore[union-attr, arg-type]
                if not missing and padding is not None:
                    pieces.append(padding)
        values = self._batch if self._varied else self._batch[0]
        torch.cat(pieces, out=values.view(-1))
        return values.sum()

    def commit(self, total: Tensor) -> bool:
        """Take in what was gathered, or nothing of it unless ``total`` is finite; False: certainly nothing.

        :meth:`refresh` is due afterwards.
        """
        ledger = self.ledger
        if not ledger.admit(self._entries, total):
            return False
        ledger.spoil(total, self._batch)
        mean, variance = self._batch[0], self._batch[1] if self._varied else None
        gain = ledger.gain
        rest = 1 - gain
        delta = (mean - self.mean).square_()
        self.mean.lerp_(mean, gain)
        shift = delta.mul_(rest)  # r δ²
        if variance is None:
            mixture = shift if self.options.variance == "total" else torch.zeros_like(shift)
        else:
            mixture = variance + shift if self.options.variance == "total" else variance
        self.variance.lerp_(mixture, gain)
        self._invert()
        # E_batch[(a - μ)²] about the mean as just committed
        shift = shift * rest
        self._rescale(shift if variance is None else shift.add_(variance))
        return True

    def refresh(self) -> None:
        """Bring what the transforms read up to date, after a commit or another q²."""
        single = self.ledger.single
        if self.options.debias and single is not self._known_single:
            # without debias the start, not the one observation, is what σ² rests on
            self._spread.copy_(~single)
            self._known_single = single
        self._pour()

    def _invert(self) -> None:
        """1/σ̃ from the variances: σ̃² = σ² + ε1·max(σ²) + ε2. A layer that has seen nothing keeps P = I."""
        floor = torch.add(self._floor, self.variance.amax(1, keepdim=True), alpha=self.options.var_rel_eps)
        torch.rsqrt(self.variance + floor, out=self.inv_std)
        if (unseen := self.ledger.unseen) is not None:
            self.inv_std.masked_fill_(unseen, 1)

    def _pour(self) -> None:
        """Fill the factors of all layers."""
        if self.squared:
            torch.reciprocal(self.q2, out=self._inv)
            torch.mul(self.inv_std, self.inv_std, out=self._scale).mul_(self._spread * self._inv)
        else:
            torch.rsqrt(self.q2, out=self._inv)
            torch.mul(self.inv_std, self._spread * self._inv, out=self._scale)
        if self._index is not None:
            torch.index_select(self._columns.view(3, -1), 1, self._index, out=self._taken)

    def factors(self, layer: int) -> Factors:
        """P of one layer, taps expanded; the same tensors at every step."""
        return self._factors[layer]

    def set_q2(self, layer: int, q2: Tensor) -> None:
        """The "spectral" step scale, which comes from outside; it holds for layers of the last commit only."""
        touched = self.ledger.touched
        self.q2[layer] = q2 if touched is None else torch.where(touched[layer], q2, self.q2[layer])

    def _rescale(self, deviation: Tensor) -> None:
        """q² = max(·/N, 1) where the step brought samples ("spectral" is set from outside)."""
        scale = self.options.step_scale
        if scale == "trace":
            spread = deviation.mul_(self.inv_std).mul_(self.inv_std).sum(1, keepdim=True)
            size = torch.addcmul(torch.ones_like(spread), self._taps, spread)
        elif scale == "fan_in":
            size = self._fan_in
        else:
            return
        q2 = (size / self.ledger.samples).clamp_(min=1)
        touched = self.ledger.touched
        self.q2.copy_(q2 if touched is None else torch.where(touched, q2, self.q2))

    def statistics(self, i: int) -> LayerStatistics:
        """Copies of what layer ``i`` has."""
        return LayerStatistics(self.means[i].clone(), self.variances[i].clone(), self.ledger.count(i))

    def snapshot(self, i: int) -> dict[str, Tensor]:
        """Everything that the future of layer ``i`` depends on, as fresh tensors."""
        return {
            "mean": self.means[i].clone(),
            "variance": self.variances[i].clone(),
            "count": self.ledger.count(i),
            "mass": self.ledger.mass(i),
            "q2": self.q2[i, 0].clone(),
        }

    def restore(self, i: int, snapshot: dict[str, Tensor]) -> None:
        """Put a snapshot back (of matching shapes)."""
        self.variance[i].zero_()  # the padding too: it must not outlast what it was the start of
        self.means[i].copy_(snapshot["mean"])
        self.variances[i].copy_(snapshot["variance"])
        self.q2[i] = snapshot["q2"]
        self.ledger.restore(i, snapshot["count"], snapshot["mass"])
        self._invert()
        self.refresh()
