"""How much each layer has seen, and with which weight the next batch enters: kept where it costs nothing.

``r`` of the running statistics is ρ, or with debias ``ρ(1-ρ^{t-1})/(1-ρ^t)``, so that the first batch counts fully;
it is kept as the mass ``w_t = 1 + ρ w_{t-1}``, for which ``r_t = 1 - 1/w_t``.

Whether a batch is finite is known on its device alone. On the CPU reading that is free, so the numbers are Python's
(:class:`HostLedger`); elsewhere reading would stall the queue, so they are tensors (:class:`DeviceLedger`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bnp_optim.moments import Moments

__all__ = ["DeviceLedger", "HostLedger", "Ledger"]

Batch = Sequence[Moments | None]


class Ledger(Protocol):
    """Counts and masses of the layers of one bank; all tensors are (layers, 1) or broadcast to it."""

    def admit(self, batch: Batch, total: Tensor) -> bool:
        """Enter the batch, unless ``total`` (a sum over it) is not finite. False: certainly nothing entered."""

    @property
    def gain(self) -> Tensor:
        """1 - r of the last batch; 0 for layers that it did not touch."""

    @property
    def touched(self) -> Tensor | None:
        """Which layers the last batch entered (bool); None: all of them."""

    @property
    def samples(self) -> Tensor:
        """N of the last batch, at least 1."""

    @property
    def single(self) -> Tensor:
        """Which layers have seen exactly one observation (bool)."""

    @property
    def unseen(self) -> Tensor | None:
        """Which layers have seen nothing although they were to (bool); None: certainly none."""

    def spoil(self, total: Tensor, values: Tensor) -> None:
        """Blank ``values`` in place if ``total`` is not finite."""

    def count(self, i: int) -> Tensor:
        """Observations that layer ``i`` has seen, an int64 scalar (a copy)."""

    def mass(self, i: int) -> Tensor:
        """w of layer ``i``, a scalar (a copy)."""

    def restore(self, i: int, count: Tensor, mass: Tensor) -> None:
        """Go on from there."""


class HostLedger:
    """For a bank on the CPU."""

    def __init__(self, layers: int, decay: float, debias: bool, *, dtype: torch.dtype, device: torch.device) -> None:
        self._decay = decay
        self._debias = debias
        self._counts = [0] * layers
        self._masses = [0.0] * layers
        self._dtype = dtype
        self._common = torch.zeros(1, 1, dtype=dtype)  # written anew at each step, where all layers have the same gain
        self._samples_of: tuple[int, ...] = ()
        self._single_of: list[bool] = []
        self.gain = self._common
        self.touched: Tensor | None = None
        self.samples = self._common
        self.single = torch.zeros(layers, 1, dtype=torch.bool)
        self.unseen = None

    def admit(self, batch: Batch, total: Tensor) -> bool:
        if not math.isfinite(total.item()):
            return False
        gains = []
        for i, b in enumerate(batch):
            n = 0 if b is None else int(b.observations)
            if not n:
                gains.append(0.0)
                continue
            self._counts[i] += n
            if self._debias:
                self._masses[i] = self._decay * self._masses[i] + 1
                gains.append(1 / self._masses[i])
            else:
                gains.append(1 - self._decay)
        if gains.count(gains[0]) == len(gains):
            self.gain = self._common.fill_(gains[0])
        else:
            self.gain = self._column(gains)
        self.touched = None if all(gains) else self._column([g > 0 for g in gains], torch.bool)
        samples = tuple(1 if b is None else max(1, int(b.samples)) for b in batch)
        if samples != self._samples_of:
            self._samples_of, self.samples = samples, self._column(samples)
        self._note_single()
        return True

    def spoil(self, total: Tensor, values: Tensor) -> None:
        return None

    def count(self, i: int) -> Tensor:
        return torch.tensor(self._counts[i])

    def mass(self, i: int) -> Tensor:
        return torch.tensor(self._masses[i], dtype=torch.float64)

    def restore(self, i: int, count: Tensor, mass: Tensor) -> None:
        self._counts[i] = int(count)
        self._masses[i] = float(mass)
        self._note_single()

    def _note_single(self) -> None:
        single = [n == 1 for n in self._counts]
        if single != self._single_of:
            self._single_of, self.single = single, self._column(single, torch.bool)

    def _column(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(values, dtype=dtype or self._dtype).unsqueeze(1)


class DeviceLedger:
    """For a bank on an accelerator: nothing is read, so nothing waits; and a captured graph replays all of it."""

    def __init__(self, layers: int, decay: float, debias: bool, *, dtype: torch.dtype, device: torch.device) -> None:
        self._decay = decay
        self._debias = debias
        self._counts = torch.zeros(layers, 1, dtype=torch.int64, device=device)
        self._masses = torch.zeros(layers, 1, dtype=dtype, device=device)
        self.gain = torch.zeros(layers, 1, dtype=dtype, device=device)
        self.samples = torch.ones(layers, 1, dtype=dtype, device=device)
        self._observations = torch.zeros(layers, 1, dtype=dtype, device=device)
        self._written: list[tuple[int | Tensor, int | Tensor]] = [(1, 0)] * layers
        self.touched: Tensor | None = torch.zeros(layers, 1, dtype=torch.bool, device=device)

    @property
    def single(self) -> Tensor:
        return self._counts == 1

    @property
    def unseen(self) -> Tensor | None:
        return self._counts == 0

    def admit(self, batch: Batch, total: Tensor) -> bool:
        for i, b in enumerate(batch):
            now = (1, 0) if b is None else (b.samples, b.observations)
            # counts change seldom, so the host remembers what it wrote; but a captured graph must write them itself
            remembered = now == self._written[i] if all(isinstance(x, int) for x in now) else False
            if remembered and not _capturing(self._counts):
                continue
            for buffer, value in zip((self.samples, self._observations), now, strict=True):
                buffer[i] = value
            self._written[i] = now
        self.samples.clamp_(min=1)
        touched = (self._observations > 0) & torch.isfinite(total)
        self.touched = touched
        self._counts += torch.where(touched, self._observations, 0).to(torch.int64)
        if self._debias:
            self._masses.copy_(torch.where(touched, self._decay * self._masses + 1, self._masses))
            self.gain = torch.where(touched, 1 / self._masses.clamp(min=1), 0.0)
        else:
            self.gain = touched.to(self._masses.dtype) * (1 - self._decay)
        return True

    def spoil(self, total: Tensor, values: Tensor) -> None:
        values.copy_(torch.where(torch.isfinite(total), values, 0))

    def count(self, i: int) -> Tensor:
        return self._counts[i, 0].clone()

    def mass(self, i: int) -> Tensor:
        return self._masses[i, 0].clone()

    def restore(self, i: int, count: Tensor, mass: Tensor) -> None:
        self._counts[i, 0] = count
        self._masses[i, 0] = mass


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
