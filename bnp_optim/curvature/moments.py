"""The second moment of observations that come batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SecondMoment"]

_ROWS = 65536  # converted to float64 at once


class SecondMoment:
    """``E[ââᵀ]``, â = [1; a], in float64 on the CPU, and which entries of a vary.

    Args:
        size: Entries of ``a``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._sum = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self._low = torch.full((size,), torch.inf, dtype=torch.float64)
        self._high = -self._low

    def add(self, values: Tensor, count: int | None = None) -> None:
        """Add observations.

        Args:
            values: (observations, size, *positions); a position is an observation of its own.
            count: How many these count for in the mean. None: as many as they are.
        """
        rows = values.detach().movedim(1, -1).reshape(-1, self.size)
        self.count += len(rows) if count is None else count
        for part in torch.split(rows, _ROWS):
            a = part.to("cpu", torch.float64)
            if not len(a):
                continue
            self._low = torch.minimum(self._low, a.amin(0))
            self._high = torch.maximum(self._high, a.amax(0))
            wide = torch.cat([a.new_ones(len(a), 1), a], 1)
            self._sum += wide.T @ wide

    @property
    def varying(self) -> Tensor:
        """Entries that are not the same in all observations, to the last bit: (size,) bool."""
        return self._high > self._low

    def whole(self, *, ones: bool) -> Tensor:
        """The moment of all entries, with the column of ones first or without it."""
        moment = self._sum / max(self.count, 1)
        return moment if ones else moment[1:, 1:]

    def matrix(self, *, ones: bool) -> Tensor:
        """The moment of the entries that vary, with the column of ones first or without it."""
        kept = torch.cat([torch.ones(int(ones), dtype=torch.bool), self.varying])
        return self.whole(ones=ones)[kept][:, kept]
