"""The running statistics of several layers, side by side in a few flat buffers, and what the transforms read.

Per step and layer: the moments of the step's samples, committed once,

    δ = μ_A - μ,   μ ← μ + (1-r) δ,   σ² ← r σ² + (1-r)(σ_A² + r δ²),

the exact exponentially weighted variance of the mixture (variance="total"; "batch" drops ``r δ²``, as the
paper does, and has no variance at batch size 1). The ledger says what ``r`` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnp_optim.layers import Rows
from bnp_optim.ledger import DeviceLedger, HostLedger, Ledger
from bnp_optim.moments import Moments
from bnp_optim.statistics import LayerStatistics, StatisticsOptions
from bnp_optim.transform import Factors

__all__ = ["StatisticsBank"]


class _Values(NamedTuple):
    """What a bank holds, as views of one flat buffer; (layers, width) but for the last three, (layers,).

    Args:
        scale: Of a weight's columns: spread/(q²σ̃²) or spread/(q σ̃).
        inv: 1/q² or 1/q.
        spread: See :class:`bnp_optim.transform.Factors`.
    """

    variance: Tensor
    mean: Tensor
    inv_std: Tensor
    scale: Tensor
    q2: Tensor
    inv: Tensor
    spread: Tensor


class StatisticsBank:
    """The statistics of several layers as the rows of (layers, width) buffers.

    A step's new values are computed beside the present ones, and taken over in one operation, or not at all.

    Args:
        rows: The layers' geometries.
        squared: Whether P Pᵀ is wanted (its scale has 1/σ̃²) or P and Pᵀ (1/σ̃).
        on_host: Whether the host may read what depends on the data.
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
        self._squared = squared
        self.on_host = on_host
        sizes = [r.statistics for r in self.rows]
        layers, width = len(sizes), max(sizes)
        kind = HostLedger if on_host else DeviceLedger
        self.ledger: Ledger = kind(layers, options.stat_decay, options.debias, dtype=dtype, device=device)

        def full(*size: int) -> Tensor:
            return torch.zeros(size, device=device, dtype=dtype)

        area = layers * width
        self._flat, self._flat_next = full(4 * area + 3 * layers), full(4 * area + 3 * layers)
        self.now, self._next = (
            _Values(*flat[: 4 * area].view(4, layers, width), *flat[4 * area :].view(3, layers))
            for flat in (self._flat, self._flat_next)
        )
        self._moving, self._moving_next = (x[: 2 * area] for x in (self._flat, self._flat_next))  # σ² and μ
        self._columns = self._flat[area : 4 * area].view(3, area)  # what the transforms read: μ, 1/σ̃, scale
        for value in self.now[2:]:
            value.fill_(1)
        if not options.debias:
            for row, n in zip(self.now.variance, sizes, strict=True):
                row[:n] = 1
        self._flat_next.copy_(self._flat)

        self._batch = full(2 * area)  # σ² and μ that the step moves towards: at first, its samples'
        self._batch_variance, self._batch_mean = self._batch.view(2, layers, width)
        self._means = self._batch[area:].unsqueeze(0)
        self._blank = full(1, width)
        self._padding = [self._blank[:, n:] if n < width else None for n in sizes]
        # Σ over channels to E over one row's inputs: K/groups
        self._taps = torch.tensor([r.taps / r.groups for r in self.rows], device=device, dtype=dtype)
        self._fan_in = torch.tensor([float(r.fan_in) for r in self.rows], device=device, dtype=dtype)
        self._samples: Tensor | None = None  # what the next two were made from
        self._inv_samples = self._taps_by_samples = self._taps
        self._singled = False  # whether _next.spread may have a 0
        self._units: Tensor | None = None  # (layers, width); see bnp_optim.units
        self._has_units = [False] * layers
        self._real = [(self.now.mean[i, :n], self.now.variance[i, :n]) for i, n in enumerate(sizes)]
        self._expressed = [(self.now.mean[i, :n], self.now.inv_std[i, :n]) for i, n in enumerate(sizes)]
        self._lay_out(device)

    def _lay_out(self, device: torch.device) -> None:
        """Make the factors, whose tensors are views; a layer with taps has each channel repeated, in a buffer."""
        width = self.now.mean.shape[1]
        index = [
            torch.arange(r.statistics, device=device).repeat_interleave(r.taps) + i * width
            for i, r in enumerate(self.rows)
            if r.taps > 1
        ]
        self._index = torch.cat(index) if index else None
        self._spelled_out = self._columns.new_zeros(3, 0 if self._index is None else self._index.numel())
        self._factors = []
        at = 0
        for i, r in enumerate(self.rows):
            columns = self._columns[:, i * width : i * width + r.statistics]
            if r.taps > 1:
                columns = self._spelled_out[:, at : at + r.statistics * r.taps]
                at += r.statistics * r.taps
            shape = (r.fan_in,) if r.groups == 1 else (r.groups, r.fan_in)
            mean, inv_std, scale = (c.view(shape) for c in columns)
            factors = Factors(mean, inv_std, self.now.q2[i], self.now.spread[i])
            if self._squared:
                factors.scale2, factors.inv_q2 = scale, self.now.inv[i]
            else:
                factors.scale, factors.inv_q = scale, self.now.inv[i]
            self._factors.append(factors)
        self._tell()

    def propose(self, batch: Sequence[Moments | None], counts: Tensor | None = None) -> None:
        """Compute what this step's samples lead to, one entry per layer; None leaves a layer as it is.

        ``counts``: see :meth:`bnp_optim.ledger.Ledger.weigh`. :meth:`conclude` is due next.
        """
        new, options = self._next, self.options
        gain, rest = self.ledger.weigh(batch, counts)
        variance = self._gather(batch)
        delta = self._batch_mean - self.now.mean
        # E_batch[(a - μ)²] about the new mean, which is r δ away
        by_trace = options.step_scale in ("trace", "common")
        deviation = _plus_square(variance, delta, rest * rest) if by_trace else None
        if options.variance == "total":
            _plus_square(variance, delta, rest, out=self._batch_variance)
        elif variance is not self._batch_variance:
            self._batch_variance.zero_()
        _lerp(self._moving, self._batch.view(2, *delta.shape), gain, self._moving_next)
        self._invert(new)

        touched, samples = self.ledger.touched, self.ledger.samples
        if deviation is not None:
            if samples is not self._samples:
                self._samples, self._inv_samples, self._taps_by_samples = samples, 1 / samples, self._taps / samples
            trace = torch.linalg.vecdot(deviation, new.inv_std * new.inv_std)
            torch.addcmul(self._inv_samples, self._taps_by_samples, trace, out=new.q2)
            new.q2.clamp_(min=1)
        elif options.step_scale == "fan_in":
            torch.clamp(self._fan_in / samples, min=1, out=new.q2)
        if touched is not None or options.step_scale == "spectral":  # the latter comes from outside, and later
            new.q2.copy_(self.now.q2 if touched is None else torch.where(touched, new.q2, self.now.q2))
        single = self.ledger.single if options.debias else None
        if single is not None or self._singled:
            # without debias the start, not the one observation, is what σ² rests on
            self._singled = single is not None
            new.spread.fill_(1) if single is None else new.spread.copy_(~single)

    @property
    def proposed_q2(self) -> Tensor:
        """q² of every layer as proposed, (layers,): to be changed in place before :meth:`conclude`."""
        return self._next.q2

    def conclude(self) -> Any:
        """Derive what the transforms read from what was proposed.

        Returns whether all of it is finite: a bool, or where the host must not read, a bool tensor.
        """
        new = self._next
        self._pour(new)
        if self.on_host and self.options.step_scale in ("trace", "common"):  # q² has all that is in μ and σ²
            return all(x > 0 for x in new.inv.tolist())
        finite = torch.isfinite(self._moving_next.sum() + new.inv.sum())
        return bool(finite) if self.on_host else finite

    def settle(self, finite: Any) -> None:
        """Take over what was proposed, if ``finite``."""
        if self.on_host:
            if not finite:
                return
            self._flat.copy_(self._flat_next)
        else:
            torch.where(finite, self._flat_next, self._flat, out=self._flat)
        self.ledger.enter(finite)
        self._tell()

    def _gather(self, batch: Sequence[Moments | None]) -> Tensor:
        """Lay the step's samples side by side; returns their variances."""
        means: list[Tensor] = []
        variances: list[Tensor] = []
        varied: bool = False  # whether there is more than single observations
        for b, padding in zip(batch, self._padding, strict=True):
            if b is None:
                means.append(self._blank)
                variances.append(self._blank)
                continue
            means.append(b.mean if b.mean.dim() == 2 else b.mean.unsqueeze(0))
            if b.variance is not None:
                varied = True
                variances.append(b.variance.unsqueeze(0))
            else:
                variances.append(self._blank)
            if padding is not None:
                means.append(padding)
                if b.variance is not None:
                    variances.append(padding)
        if not varied:
            torch.cat(means, dim=1, out=self._means)
            return self._blank
        torch.cat([*variances, *means], dim=1, out=self._batch.unsqueeze(0))
        variance: Tensor = self._batch_variance
        return variance

    def _invert(self, values: _Values) -> None:
        """1/σ̃ from the variances: σ̃² = σ² + ε1·max(σ²) + ε2, the maximum in the units of a fold, if there was one."""
        if self._units is None:
            floor = values.variance.amax(1, keepdim=True)
        else:
            floor = (values.variance / self._units).amax(1, keepdim=True) * self._units
        floored = torch.add(values.variance, floor, alpha=self.options.var_rel_eps).add_(self.options.var_eps)
        torch.rsqrt(floored, out=values.inv_std)

    def _pour(self, values: _Values) -> None:
        """The scale of the columns, from 1/σ̃ and q²."""
        if self._squared:
            torch.reciprocal(values.q2, out=values.inv)
        else:
            torch.rsqrt(values.q2, out=values.inv)
        factor = (values.inv * values.spread if self._singled else values.inv).unsqueeze(1)
        torch.mul(values.inv_std, factor, out=values.scale)
        if self._squared:
            values.scale.mul_(values.inv_std)

    def _tell(self) -> None:
        """Bring up to date what the factors hold beside views of the present values."""
        if self.on_host:
            for factors, inv in zip(self._factors, self.now.inv.tolist(), strict=True):
                if self._squared:
                    factors.inv_q2 = inv
                else:
                    factors.inv_q = inv
        if self._index is not None:
            torch.index_select(self._columns, 1, self._index, out=self._spelled_out)

    def factors(self, i: int) -> Factors:
        """P of layer ``i``, taps spelled out; the same tensors at every step. Before its first samples it is I."""
        return self._factors[i]

    def set_units(self, i: int, units: Tensor | None) -> None:
        """Compare the inputs of layer ``i`` in ``units``, (channels,), from the next samples or snapshot on."""
        self._has_units[i] = units is not None
        if units is None and self._units is None:
            return
        if self._units is None:
            self._units = torch.ones_like(self.now.variance)
        self._units[i] = 1
        if units is not None:
            self._units[i, : units.numel()] = units

    def expressed(self, i: int) -> tuple[Tensor, Tensor]:
        """μ and 1/σ̃ of layer ``i``, (channels,): views of what is now."""
        return self._expressed[i]

    def units(self, i: int) -> Tensor | None:
        """Those of layer ``i``, (channels,), a view; None: it has none."""
        known = self._units is not None and self._has_units[i]
        return self._units[i, : self.rows[i].statistics] if self._units is not None and known else None

    def set_q2(self, i: int, q2: Tensor) -> None:
        """The "spectral" step scale, which comes from outside; :meth:`refresh` is due after the last of them."""
        self.now.q2[i] = q2

    def refresh(self) -> None:
        """Derive from μ, σ² and q² what follows from them."""
        self._pour(self.now)
        self._flat_next.copy_(self._flat)
        self._tell()

    def statistics(self, i: int) -> LayerStatistics:
        """Copies of what layer ``i`` has."""
        mean, variance = self._real[i]
        return LayerStatistics(mean.clone(), variance.clone(), self.ledger.count(i))

    def snapshot(self, i: int) -> dict[str, Tensor]:
        """Everything that the future of layer ``i`` depends on, as fresh tensors."""
        mean, variance = self._real[i]
        units = self.units(i)
        return {
            "mean": mean.clone(),
            "variance": variance.clone(),
            "count": self.ledger.count(i),
            "mass": self.ledger.mass(i),
            "q2": self.now.q2[i].clone(),
        } | ({} if units is None else {"units": units.clone()})

    def restore(self, i: int, snapshot: dict[str, Tensor]) -> None:
        """Put a snapshot back (of matching shapes)."""
        mean, variance = self._real[i]
        self.now.variance[i].zero_()  # the padding too: it must not outlast what it was the start of
        mean.copy_(snapshot["mean"])
        variance.copy_(snapshot["variance"])
        self.now.q2[i] = snapshot["q2"]
        self.set_units(i, snapshot.get("units"))
        self.ledger.restore(i, snapshot["count"], snapshot["mass"])
        single = self.ledger.single if self.options.debias else None
        self._singled = single is not None
        self.now.spread.fill_(1) if single is None else self.now.spread.copy_(~single)
        self._invert(self.now)
        self.refresh()


def _plus_square(base: Tensor, delta: Tensor, weight: float | Tensor, out: Tensor | None = None) -> Tensor:
    """``base + weight · δ²``."""
    result: Tensor
    if isinstance(weight, float):
        result = torch.addcmul(base, delta, delta, value=weight, out=out)
    else:
        result = torch.addcmul(base, delta, delta * weight, out=out)
    return result


def _lerp(start: Tensor, end: Tensor, weight: float | Tensor, out: Tensor) -> None:
    torch.lerp(start.view_as(end), end, weight, out=out.view_as(end))
