"""Statistics as users see them and choose them; and which layers keep theirs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LayerStatistics", "StatisticsOptions", "shelves"]

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
    """Split layers (by their numbers of channels) among banks so that padding stays below half of what they hold.

    Small networks fit into one bank, whose steps then cost the same for any number of layers.
    """
    banks: list[list[int]] = []
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        for bank in banks:
            padded = widths[bank[0]] * (len(bank) + 1)
            if 2 * padded <= 3 * (sum(widths[j] for j in bank) + widths[i]) or padded <= _SLACK:
                bank.append(i)
                break
        else:
            banks.append([i])
    return [sorted(bank) for bank in banks]
