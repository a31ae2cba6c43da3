"""One collective per step: every rank's samples of all layers in one flat buffer, merged alike on every rank.

A rank contributes counts, means, variances (and projections, for ``step_scale="spectral"``) of its layers, zeros where
it has no samples. All ranks gather all contributions and merge them in the order of the ranks, by the rule of Chan,
Golub and LeVeque (1983) for many parts at once,

    n = Σ n_r,   μ_A = Σ (n_r/n) μ_r,   σ_A² = Σ (n_r/n) (σ_r² + (μ_r - μ_A)²),

so that all of them have the same bits. Nothing is added up on the way: no digit is lost however far the means are from
zero, counts are exact (int64), and what is not finite on one rank is finite on none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnp_optim.moments import Moments
from bnp_optim.places import Place
from bnp_optim.spectral import Projection

__all__ = ["CHANGED", "FAILED", "WELL", "Batches", "Exchange", "Shared", "Shelves"]

Shelves = Sequence[Sequence[Place]]
Batches = Sequence[Sequence[Moments | None]]

# What a rank says of itself: it has other layers than before; its step fails
WELL, CHANGED, FAILED = range(3)
_DTYPES = (torch.float64, torch.float32)


class Shared(NamedTuple):
    """A step's samples of all ranks.

    Args:
        batches: Moments of each bank's layers.
        counts: Where the host must not read them: samples and observations of each bank's layers, (2, layers) int64.
    """

    batches: Batches
    counts: Sequence[Tensor | None]


class Exchange:
    """The flat buffers for the layers at hand, and the way in and out of them.

    Args:
        shelves: The layers' places, bank by bank; alike on every rank.
        group: A ``torch.distributed.ProcessGroup``.
        on_host: Whether the host may read what depends on the data.
    """

    def __init__(self, shelves: Shelves, group: Any, *, on_host: bool) -> None:
        self.shelves = shelves
        self.group = group
        self._on_host = on_host
        self._places = [place for shelf in shelves for place in shelf]
        self._device = self._places[0].bank.now.mean.device
        self._directions = [p.intake.direction for p in self._places]
        self._members = {d: [i for i, p in enumerate(self._places) if p.bank.now.mean.dtype is d] for d in _DTYPES}
        # words of four bytes; those of eight come first
        words = 2 * (1 + 2 * len(self._places) + sum(0 if u is None else u.shape[0] for u in self._directions))
        spans = {torch.int64: (0, words)}
        for dtype, members in self._members.items():
            start, words = words, words + sum(map(self._length, members)) * dtype.itemsize // 4
            spans[dtype] = start, words
        words += words % 2
        self._mine = torch.zeros(words, device=self._device, dtype=torch.float32)
        self._all = torch.zeros(group.size(), words, device=self._device, dtype=torch.float32)
        self._sent = {dtype: self._mine[a:b].view(dtype) for dtype, (a, b) in spans.items()}
        self._received = {dtype: self._all[:, a:b].view(dtype) for dtype, (a, b) in spans.items()}
        self._written: list[int | None] = [0] * self._sent[torch.int64].numel()
        self._layer_of_channel = {
            dtype: torch.tensor([i for i in members for _ in range(self._places[i].intake.channels)], dtype=torch.int64)
            .to(self._device)
            for dtype, members in self._members.items()
        }  # fmt: skip

    @property
    def bytes(self) -> int:
        """What each rank contributes to a step."""
        return self._mine.numel() * self._mine.itemsize

    def _length(self, i: int) -> int:
        direction = self._directions[i]
        return 2 * self._places[i].intake.channels + (0 if direction is None else direction.numel() + len(direction))

    def __call__(self, batches: Batches, status: int = WELL) -> tuple[list[int], Shared | None]:
        """Gather and merge; the merged projections are left in the places.

        Returns what each rank says of itself (nothing where the host must not read), and if all are well, the samples.
        """
        mine = [m for batch in batches for m in batch] if status == WELL else [None] * len(self._places)
        self._write_counts(mine, status)
        for dtype in _DTYPES:
            self._write_moments(dtype, mine)
        _all_gather(self._all, self._mine, self.group)
        said = self._received[torch.int64][:, 0].tolist() if self._on_host else []
        return said, None if any(said) else self._merge()

    def _write_counts(self, mine: Sequence[Moments | None], status: int) -> None:
        numbers: list[int | Tensor] = [status]
        for m in mine:
            numbers += (0, 0) if m is None else (m.samples, m.observations)
        for place, direction in zip(self._places, self._directions, strict=True):
            if direction is not None:
                rows = 0 if place.projection is None else place.projection.rows
                numbers += rows.unbind() if isinstance(rows, Tensor) else [rows] * len(direction)
        counts = self._sent[torch.int64]
        if self._on_host:
            counts.copy_(torch.tensor([int(n) for n in numbers]))
            return
        capturing = counts.is_cuda and torch.cuda.is_current_stream_capturing()
        for i, n in enumerate(numbers):  # they change seldom; but a captured graph must write them itself
            if capturing or isinstance(n, Tensor) or n != self._written[i]:
                counts[i] = n
                self._written[i] = None if isinstance(n, Tensor) else n

    def _write_moments(self, dtype: torch.dtype, mine: Sequence[Moments | None]) -> None:
        means, variances, projections = [], [], []
        for i in self._members[dtype]:
            place, m, direction = self._places[i], mine[i], self._directions[i]
            blank = place.bank.now.mean.new_zeros(place.intake.channels)
            means.append(blank if m is None else m.mean.flatten())
            variances.append(blank if m is None or m.variance is None else m.variance)
            if direction is not None:
                p = place.projection
                if m is None or p is None:
                    projections.append(direction.new_zeros(direction.numel() + len(direction)))
                else:
                    projections += p.weight.flatten(), p.bias, p.norm2
        if means:
            parts = [x.to(self._device, dtype) for x in (*means, *variances, *projections)]
            torch.cat(parts, out=self._sent[dtype])

    def _merge(self) -> Shared:
        counts = self._received[torch.int64][:, 1:]
        layers = len(self._places)
        observations = counts[:, 1 : 2 * layers : 2]
        total = counts.sum(0)
        numbers = total.tolist() if self._on_host else None
        merged: list[Moments | None] = [None] * layers
        for dtype in _DTYPES:
            share = observations.to(dtype) / total[1 : 2 * layers : 2].clamp(min=1).to(dtype)
            for i, mean, variance in self._merge_moments(dtype, share):
                device = self._places[i].bank.now.mean.device
                samples, n = (0, 0) if numbers is None else numbers[2 * i : 2 * i + 2]
                if numbers is None or n:
                    merged[i] = Moments(samples, n, mean.to(device), variance.to(device))
        self._merge_projections(total[2 * layers :], None if numbers is None else numbers[2 * layers :])
        batches, sums, at = [], [], 0
        for shelf in self.shelves:
            end = at + len(shelf)
            batches.append(merged[at:end])
            here = total[2 * at : 2 * end].view(-1, 2).t()
            sums.append(here.to(shelf[0].bank.now.mean.device) if numbers is None else None)
            at = end
        return Shared(batches, sums)

    def _merge_moments(self, dtype: torch.dtype, share: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        members = self._members[dtype]
        if not members:
            return []
        sizes = [self._places[i].intake.channels for i in members]
        received = self._received[dtype]
        means, variances = received[:, : sum(sizes)], received[:, sum(sizes) : 2 * sum(sizes)]
        share = share.index_select(1, self._layer_of_channel[dtype])
        # about the first rank's, so that what is equal on all ranks stays what it is
        mean = means[0] + (share * (means - means[0])).sum(0)
        deviation = means - mean
        variance = (share * torch.addcmul(variances, deviation, deviation)).sum(0)
        return list(zip(members, torch.split(mean, sizes), torch.split(variance, sizes), strict=True))

    def _merge_projections(self, rows: Tensor, numbers: list[int] | None) -> None:
        at = dict.fromkeys(_DTYPES, 0)
        sums: dict[torch.dtype, Tensor] = {}
        for dtype, members in self._members.items():
            start = 2 * sum(self._places[i].intake.channels for i in members)
            sums[dtype] = self._received[dtype][:, start:].sum(0)
        row = 0
        for place, direction in zip(self._places, self._directions, strict=True):
            if direction is None:
                continue
            dtype, groups = place.bank.now.mean.dtype, len(direction)
            start, size = at[dtype], direction.numel() - groups
            weight, bias, norm2 = torch.split(sums[dtype][start : start + size + 2 * groups], [size, groups, groups])
            at[dtype] += size + 2 * groups
            place.projection = Projection(
                weight.view(groups, -1).to(direction.device),
                bias.to(direction.device),
                norm2.to(direction.device),
                rows[row : row + groups].to(direction.device),
            )
            if numbers is not None and not any(numbers[row : row + groups]):
                place.projection = None
            row += groups


def _all_gather(out: Tensor, mine: Tensor, group: Any) -> None:
    # torch 2.13 renamed it
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    gather(out.view(-1), mine, group=group)
