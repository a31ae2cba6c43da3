"""The variances that ``fold_normalization`` found at a layer's inputs: the units in which floors compare features.

ε1·max(σ²) measures small variances by the largest of the layer, which says nothing where one feature is in
millimetres and another in dollars. A layer that was folded knows the scale u of each of its inputs, so its floors are

    σ̃² = σ² + ε1·max_k(σ_k²/u_k)·u + ε2,

and training no longer depends on the units of the inputs (ours). They are kept beside the weights that were folded, in
a buffer that is in no ``state_dict`` of the model: it follows the model to its device, into copies, and from the first
rank to the others under DistributedDataParallel. Checkpoints of the optimizer have them.
"""

from __future__ import annotations

from torch import Tensor, nn

from bnp_optim.discovery import Layer

__all__ = ["UNITS", "keep_units", "units_of"]

UNITS = "bnp_fold_variance"  # the buffer's name


def keep_units(module: nn.Module, variance: Tensor) -> None:
    """Note the ``variance``, floors included, (input channels,), at which ``module`` was folded."""
    module.register_buffer(UNITS, variance, persistent=False)


def units_of(layer: Layer) -> Tensor | None:
    """What was noted at any of the modules that share the weight; nothing if it did not survive a cast (to float16)."""
    found = (use.module._buffers.get(UNITS) for use in layer.uses)
    units = next((u for u in found if u is not None and u.numel() == layer.rows.statistics), None)
    sound = units is not None and bool((units.isfinite() & (units > 0)).all())
    return units if sound else None
