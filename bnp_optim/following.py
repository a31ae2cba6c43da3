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
from bnp_optim.places import Origin, Place
from bnp_optim.transform import Factors, from_z
from bnp_optim.units import UNITS

__all__ = ["can_follow", "follow"]

# The band: by what factor σ̃, and by how many σ̃ μ, may change (docs/ablations.md)
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
    live, seen, bank, origin = place.live, place.seen, place.bank, place.origin
    if live is None or live.bias is None or seen is None or not place.intake.reads_data:
        return
    mean, inv_std = bank.expressed(place.row)
    if origin is None:
        place.origin = Origin.at(mean, inv_std)
        return
    if bank.on_host:  # which may read, and has most steps end here
        if not origin.settled:
            origin.settled = bool(_filled(place))
            if not origin.settled:
                origin.become(mean, inv_std, origin.beyond, origin.went)
                return
        if not _any_left(origin, mean, inv_std):
            if origin.waiting:
                origin.beyond.zero_()
                origin.waiting = False
            return
    growth = origin.inv_std / inv_std
    left = (growth > _RATIO) | (((mean - origin.mean) * origin.inv_std).abs() > _DISTANCE)
    deviation = (seen.mean.flatten() - origin.mean).square()
    if seen.variance is not None:
        deviation = deviation + seen.variance
    far = deviation * origin.inv_std * inv_std > _BEYOND**2
    beyond = (origin.beyond + 1) * (far & left)
    filled = torch.as_tensor(_filled(place), device=mean.device)
    moved = (beyond >= _BATCHES) & filled
    went = torch.maximum(origin.went, moved.to(mean.dtype))
    moved = moved | ((growth < 1 / _RATIO) & (went > 0))
    if not bank.on_host or moved.any():
        _express(place, torch.where(moved, growth, 1), torch.where(moved, mean - origin.mean * growth, 0))
        _tell_units(place, moved, inv_std)
    here = moved | ~filled
    mean, inv_std = torch.where(here, mean, origin.mean), torch.where(here, inv_std, origin.inv_std)
    origin.become(mean, inv_std, beyond * ~here, went)
    origin.waiting = True


def _filled(place: Place) -> Tensor | bool:
    """Whether the running statistics rest on enough."""
    bank = place.bank
    filled: Tensor | bool = bank.ledger.mass(place.row) * (1 - bank.options.stat_decay) >= _FILLED
    return filled


def _any_left(origin: Origin, mean: Tensor, inv_std: Tensor) -> bool:
    """Whether there is anything to look at more closely, in few operations."""
    least, most = (float(x) for x in torch.aminmax(origin.inv_std / inv_std))
    distance = torch.linalg.vector_norm((mean - origin.mean) * origin.inv_std, float("inf"))
    return most > _RATIO or float(distance) > _DISTANCE or (least < 1 / _RATIO and bool(origin.went.any()))


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


def _tell_units(place: Place, moved: Tensor, inv_std: Tensor) -> None:
    """The floors of a folded layer compare its features in the units of now, and so do those of the next optimizer."""
    units = place.bank.units(place.row)
    if units is None:
        return
    new = torch.where(moved, inv_std.square().reciprocal(), units)
    place.bank.set_units(place.row, new)
    kept = place.layer.uses[0].module._buffers.get(UNITS)
    if kept is not None and kept.shape == new.shape:
        kept.copy_(new)
