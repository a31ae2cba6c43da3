"""What the wrapper warns of: (kind, message) pairs; each kind is said once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from bnp_optim.bases import leaves_of, traits_of
from bnp_optim.ownership import Ownerless
from bnp_optim.places import LiveLayer
from bnp_optim.tracking import Tracker

__all__ = ["ALONE", "COLD", "at_first_steps", "at_the_door"]

COLD = ("cold", "this state_dict has no BNP statistics (it was saved by the plain optimizer): they start anew")
ALONE = (
    "alone",
    "follow_inputs does nothing where several ranks train together: each of them knows of its own samples alone "
    "whether they are data, so the weights could drift apart. Normalize the inputs before the model",
)


def at_the_door(base: Optimizer, model: nn.Module, form: str, tracker: Tracker) -> Iterator[tuple[str, str]]:
    """What can be seen when the wrapper is built."""
    if isinstance(model, Ownerless):
        if any(p.requires_grad for group in base.param_groups for p in group["params"]):  # else it is but a probe
            yield (
                "no owner",
                "no live module has these parameters, so there is no layer to look at and every gradient passes "
                "through unchanged. Build the model first, and keep it, or name it with model=",
            )
    elif not tracker.layers and not tracker.awaited:
        yield (
            "no layers",
            f"no layer of the {type(model).__name__} has its weight in the groups of the {type(base).__name__}: "
            "every gradient passes through unchanged. Check that the optimizer was built from this model's parameters",
        )
    for leaf in leaves_of(base):
        name, traits = type(leaf).__name__, traits_of(leaf)
        if traits.adaptive and form == "gradient":
            yield (
                "mode",
                f"mode='gradient' feeds P Pᵀ g to {name}, which rescales its gradient itself: that can be far worse "
                "than the plain base. Use mode='auto' or 'two_sided'",
            )
        decays = any(group.get("weight_decay", 0) for group in leaf.param_groups)
        if form == "two_sided" and traits.decoupled is None and decays:
            yield (
                "decay",
                f"{name} is no optimizer of torch.optim: how its weight_decay acts is unknown, and in the two-sided "
                "form it decays preconditioned coordinates. Set weight_decay=0 there if that is not wanted",
            )


def at_first_steps(live: list[LiveLayer], tracker: Tracker, *, together: bool, steps: int) -> Iterator[tuple[str, str]]:
    """What shows only when training: hooks that a compiled model ignores.

    Of several ranks one may have no samples in its first step, but others do.
    """
    if not live or (together and steps == 0):
        return
    unseen = not any(tracker.fired(x.layer) or (x.layer in tracker.ready and not together) for x in live)
    if unseen and tracker.gate.open and tracker.attached:
        yield (
            "unseen",
            "gradients have come, but no forward pass of any preconditioned layer was seen: they pass through "
            "unchanged. A compiled model ignores hooks that are added after its first call: wrap it before",
        )
