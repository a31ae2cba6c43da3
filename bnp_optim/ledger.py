"""How much each layer has seen, and with which weight the next batch enters: kept where it costs nothing.

``r`` of the running statistics is ρ, or with debias ``ρ(1-ρ^{t-1})/(1-ρ^t)``, so that the first batch counts fully;
it is kept as the mass ``w_t = 1 + ρ w_{t-1}``, for which ``r_t = 1 - 1/w_t``.

Whether a batch is finite is known on its device alone. On the CPU reading that is free, so the numbers are Python's
(:class:`HostLedger`); elsewhere reading would stall the queue, so they are tensors (:class:`DeviceLedger`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bnp_optim.moments import Moments

__all__ = ["DeviceLedger", "HostLedger", "Ledger"]

Batch = Sequence[Moments | None]
Weight = float | Tensor  # one for all layers, or (layers, 1)


class Ledger(Protocol):
    """Counts and masses of the layers of one bank. What it says of a batch holds from weigh() to the next one."""

    def weigh(self, batch: Batch, counts: Tensor | None = None) -> tuple[Weight, Weight]:
        """(1 - r, r) for a batch that may enter; a layer without samples gets (0, 1).

        ``counts``, (2, layers), are samples and observations where only the device knows them.
        """

    def enter(self, finite: Any) -> None:
        """The batch enters if ``finite``."""

    @property
    def touched(self) -> Tensor | None:
        """Which layers the batch has samples of, (layers,) bool; None: all of them."""

    @property
    def samples(self) -> Tensor:
        """N of the batch, at least 1, (layers,); another object if it changed."""

    @property
    def single(self) -> Tensor | None:
        """Which layers rest on one observation once it has entered, (layers,) bool; None: certainly none of them."""

    def count(self, i: int) -> Tensor:
        """Observations that layer ``i`` has seen, an int64 scalar (a copy)."""

    def mass(self, i: int) -> Tensor:
        """The mass of layer ``i``, a scalar (a copy)."""

    def restore(self, i: int, count: Tensor, mass: Tensor) -> None:
        """Go on from there."""


class HostLedger:
    """For a bank on the CPU."""

    def __init__(self, layers: int, decay: float, debias: bool, *, dtype: torch.dtype, device: torch.device) -> None:
        self._decay = decay
        self._debias = debias
        self._dtype = dtype
        self._counts = [0] * layers
        self._masses = [0.0] * layers
        self._new = self._counts, self._masses  # once the batch has entered
        self._samples_of = [1] * layers
        self.samples = torch.ones(layers, dtype=dtype)
        self.touched: Tensor | None = None

    def weigh(self, batch: Batch, counts: Tensor | None = None) -> tuple[Weight, Weight]:
        """See :class:`Ledger`."""
        new_counts, masses, samples, gains = [], [], [], []
        for b, count, mass in zip(batch, self._counts, self._masses, strict=True):
            n = 0 if b is None else int(b.observations)
            if b is None or not n:
                gain = 0.0
                samples.append(1)
            else:
                mass = self._decay * mass + 1
                gain = 1 / mass if self._debias else 1 - self._decay
                samples.append(max(1, int(b.samples)))
            new_counts.append(count + n)
            masses.append(mass)
            gains.append(gain)
        self._new = new_counts, masses
        if samples != self._samples_of:
            self._samples_of, self.samples = samples, torch.tensor(samples, dtype=self._dtype)
        self.touched = None if all(gains) else torch.tensor([g > 0 for g in gains])
        if gains.count(gains[0]) == len(gains):
            return gains[0], 1 - gains[0]
        column = torch.tensor(gains, dtype=self._dtype).unsqueeze(1)
        return column, 1 - column

    def enter(self, finite: Any) -> None:
        """See :class:`Ledger`."""
        if finite:
            self._counts, self._masses = self._new

    @property
    def single(self) -> Tensor | None:
        """See :class:`Ledger`."""
        counts = self._new[0]
        return torch.tensor([n == 1 for n in counts]) if 1 in counts else None

    def count(self, i: int) -> Tensor:
        """See :class:`Ledger`."""
        return torch.tensor(self._counts[i])

    def mass(self, i: int) -> Tensor:
        """See :class:`Ledger`."""
        return torch.tensor(self._masses[i], dtype=torch.float64)

    def restore(self, i: int, count: Tensor, mass: Tensor) -> None:
        """See :class:`Ledger`."""
        self._counts[i] = int(count)
        self._masses[i] = float(mass)
        self._new = self._counts, self._masses


class DeviceLedger:
    """For a bank on an accelerator: nothing is read, so nothing waits; and a captured graph replays all of it."""

    def __init__(self, layers: int, decay: float, debias: bool, *, dtype: torch.dtype, device: torch.device) -> None:
        self._decay = decay
        self._debias = debias
        self._counts = torch.zeros(layers, dtype=torch.int64, device=device)
        self._masses = torch.zeros(layers, dtype=dtype, device=device)
        self._new = self._counts, self._masses
        self._samples = torch.ones(layers, dtype=dtype, device=device)
        self._observations = torch.zeros(layers, dtype=torch.int64, device=device)
        self._written: list[tuple[int | Tensor, int | Tensor] | None] = [(1, 0)] * layers
        self.touched: Tensor | None = self._counts > 0

    def weigh(self, batch: Batch, counts: Tensor | None = None) -> tuple[Weight, Weight]:
        """See :class:`Ledger`."""
        if counts is not None:
            self._samples.copy_(counts[0])
            self._observations.copy_(counts[1])
            self._written = [None] * len(batch)
        capturing = self._counts.is_cuda and torch.cuda.is_current_stream_capturing()
        for i, b in enumerate(batch if counts is None else ()):
            now: tuple[int | Tensor, int | Tensor] = (1, 0) if b is None else (b.samples, b.observations)
            # counts change seldom, so the host remembers what it wrote; but a captured graph must write them itself
            if capturing or any(isinstance(x, Tensor) for x in now) or now != self._written[i]:
                self._samples[i], self._observations[i] = now
                self._written[i] = now
        self.touched = touched = self._observations > 0
        masses = torch.where(touched, self._decay * self._masses + 1, self._masses)
        self._new = self._counts + self._observations, masses
        # a mass is at least 1 where there are samples
        gain = touched / masses.clamp(min=1) if self._debias else touched * (1 - self._decay)
        gain = gain.unsqueeze(1).to(masses.dtype)
        return gain, 1 - gain

    def enter(self, finite: Any) -> None:
        """See :class:`Ledger`."""
        for kept, new in zip((self._counts, self._masses), self._new, strict=True):
            kept.copy_(torch.where(finite, new, kept))

    @property
    def samples(self) -> Tensor:
        """See :class:`Ledger`."""
        return self._samples.clamp(min=1)

    @property
    def single(self) -> Tensor | None:
        """See :class:`Ledger`."""
        return self._new[0] == 1

    def count(self, i: int) -> Tensor:
        """See :class:`Ledger`."""
        return self._counts[i].clone()

    def mass(self, i: int) -> Tensor:
        """See :class:`Ledger`."""
        return self._masses[i].clone()

    def restore(self, i: int, count: Tensor, mass: Tensor) -> None:
        """See :class:`Ledger`."""
        self._counts[i] = count
        self._masses[i] = mass.to(self._masses.dtype)  # float64 in checkpoints of CPU models, which MPS has not
        self._new = self._counts, self._masses
