"""Layers that read data follow its units.

P follows a change of the inputs' units by itself, the weights do not: a feature that grows tenfold drives the net ten
times as hard, and steps that are bounded in the new coordinates need thousands of samples to undo that. Nor do the
floors of a fold follow, which compare features in the units of its batch (:mod:`bnp_optim.units`). So where the
statistics of a feature have left those at which the weights were last expressed, the weights are expressed anew: of
the normalized feature the layer goes on computing what it did. Between two such expressions lies one more change of
variables of the paper's kind,

    w ← P' P⁻¹ w = P_Δ w,   σ_Δ = σ̃'/σ̃,   μ_Δ = μ' - μ σ̃'/σ̃   (q = 1; 1 and 0 where nothing has moved)

(ours, after Lange, Helfrich, Ye, JMLR 2022). What the base remembers lives in z, and stays right.

Only for layers that read data: what trained layers hand on moves because training moves it, and to undo that would be
to undo training. And only where the data have moved for good: one outlier moves running statistics for hundreds of
steps, and so does a feature's silence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnp_optim.application import apply_on_rows
from bnp_optim.discovery import Layer
from bnp_optim.fold import is_foldable
from bnp_optim.places import Place
from bnp_optim.transform import Factors, from_z
from bnp_optim.units import UNITS

__all__ = ["ORIGIN", "can_follow", "follow"]

ORIGIN = 4  # rows of a place's origin: μ, 1/σ̃, batches beyond it in a row, whether it has moved before
# By what factor σ̃, and by how many σ̃ μ, must have changed (docs/ablations.md)
_RATIO, _DISTANCE = 2.0, 1.0
# Batches in a row that must lie farther from the origin than so many √(σ̃ σ̃'), root mean square: √ of what an outlier
# has left in σ̃', which the samples after it are nowhere near
_BATCHES, _BEYOND = 3, 2.0
# Of the running statistics' memory that must be filled: a few samples are no reason to change weights
_FILLED = 0.5


def can_follow(layer: Layer) -> bool:
    """Whether one module alone applies the weight, and has a bias for what the mean contributes."""
    use = layer.uses[0]
    return len(layer.uses) == 1 and use.part.bias is not None and not use.part.owner and is_foldable(use.module)


def follow(place: Place) -> None:
    """Express the weight of a layer that reads data anew where its statistics have left ``place.origin``.

    A feature has moved where they are outside of the band and the last batches were, too; one that has moved before
    also where σ̃ has shrunk: it was large because of the move, or the data have moved back.
    """
    live, seen, bank = place.live, place.seen, place.bank
    if live is None or live.bias is None or seen is None or not place.intake.reads_data:
        return
    mean, inv_std = bank.expressed(place.row)
    filled = bank.ledger.mass(place.row) * (1 - bank.options.stat_decay) >= _FILLED
    here = torch.stack((mean, inv_std, torch.zeros_like(mean), torch.zeros_like(mean)))
    if place.origin is None or (bank.on_host and not filled):
        place.origin = here
        return
    before, inv_before, count, went = place.origin
    deviation = (seen.mean.flatten() - before).square()
    if seen.variance is not None:
        deviation = deviation + seen.variance
    count = (count + 1) * (deviation * inv_before * inv_std > _BEYOND**2)
    growth = inv_before / inv_std
    left = (growth > _RATIO) | (((mean - before) * inv_before).abs() > _DISTANCE)
    moved = left & (count >= _BATCHES) & filled
    went = torch.maximum(went, moved.to(went))
    moved = moved | ((growth < 1 / _RATIO) & (went > 0))
    place.origin = torch.stack((before, inv_before, count, went))
    if bank.on_host and not moved.any():  # which may read, and has most steps end here
        return
    _express(place, torch.where(moved, growth, 1), torch.where(moved, mean - before * growth, 0))
    here[3] = went
    place.origin = torch.where(moved | ~filled, here, place.origin)
    _tell_units(place, moved)


def _express(place: Place, growth: Tensor, shift: Tensor) -> None:
    """``w ← P_Δ w`` with σ_Δ = ``growth`` and μ_Δ = ``shift``, (channels,)."""
    live = place.live
    assert live is not None
    rows = live.layer.geometry
    shift, shrink = (v.view(rows.groups, -1).repeat_interleave(rows.taps, 1) for v in (shift, 1 / growth))
    if rows.groups == 1:
        shift, shrink = shift[0], shrink[0]
    one = torch.ones((), dtype=growth.dtype, device=growth.device)
    change = Factors(shift, shrink, q2=one, spread=one)
    apply_on_rows(from_z, live.layer.adapter, rows, live.weight, live.bias, change)


def _tell_units(place: Place, moved: Tensor) -> None:
    """The floors of a folded layer compare its features in the units of now, and so do those of the next optimizer."""
    units = place.bank.units(place.row)
    if units is None or place.origin is None:
        return
    new = torch.where(moved, place.origin[1].square().reciprocal(), units)
    place.bank.set_units(place.row, new)
    kept = place.layer.uses[0].module._buffers.get(UNITS)
    if kept is not None and kept.shape == new.shape:
        kept.copy_(new)
