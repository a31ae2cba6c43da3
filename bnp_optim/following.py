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
to undo training.
"""

from __future__ import annotations

import torch

from bnp_optim.application import apply_on_rows
from bnp_optim.discovery import Layer
from bnp_optim.fold import is_foldable
from bnp_optim.places import Place
from bnp_optim.transform import Factors, from_z
from bnp_optim.units import UNITS

__all__ = ["can_follow", "follow"]

# Of σ̃, and the distance of μ in σ̃: from 2 to 4 the same, at 8 shifts go unseen (docs/ablations.md)
_RATIO, _DISTANCE = 2.0, 1.0
# Of the running statistics' memory that must be filled: a few samples are no reason to change weights
_FILLED = 0.5


def can_follow(layer: Layer) -> bool:
    """Whether one module alone applies the weight, and has a bias for what the mean contributes."""
    use = layer.uses[0]
    return len(layer.uses) == 1 and use.part.bias is not None and not use.part.owner and is_foldable(use.module)


def follow(place: Place) -> None:
    """Express the weight of a layer that reads data anew where its statistics have left ``place.origin``."""
    live, bank, row = place.live, place.bank, place.row
    if live is None or live.bias is None or not place.intake.reads_data:
        return
    mean, inv_std = bank.expressed(row)
    if place.origin is None:
        place.origin = torch.stack((mean, inv_std))
    before_mean, before_inv_std = place.origin
    growth = before_inv_std / inv_std
    moved = (growth > _RATIO) | (growth < 1 / _RATIO) | (((mean - before_mean) * before_inv_std).abs() > _DISTANCE)
    filled = bank.ledger.mass(row) * (1 - bank.options.stat_decay) >= _FILLED
    if bank.on_host:  # which may read, and has most steps end here
        if not filled:
            place.origin = torch.stack((mean, inv_std))
        if not filled or not moved.any():
            return
    moved = moved & filled
    growth = torch.where(moved, growth, 1)
    shift = torch.where(moved, mean - before_mean * growth, 0)
    rows = live.layer.geometry
    shift, shrink = (v.view(rows.groups, -1).repeat_interleave(rows.taps, 1) for v in (shift, 1 / growth))
    if rows.groups == 1:
        shift, shrink = shift[0], shrink[0]
    one = torch.ones((), dtype=mean.dtype, device=mean.device)
    change = Factors(shift, shrink, q2=one, spread=one)
    apply_on_rows(from_z, live.layer.adapter, rows, live.weight, live.bias, change)
    place.origin = torch.where(moved | ~filled, torch.stack((mean, inv_std)), place.origin)
    _tell_units(place, moved)


def _tell_units(place: Place, moved: torch.Tensor) -> None:
    """The floors of a folded layer compare its features in the units of now, and so do those of the next optimizer."""
    units = place.bank.units(place.row)
    if units is None or place.origin is None:
        return
    new = torch.where(moved, place.origin[1].square().reciprocal(), units)
    place.bank.set_units(place.row, new)
    kept = place.layer.uses[0].module._buffers.get(UNITS)
    if kept is not None and kept.shape == new.shape:
        kept.copy_(new)
