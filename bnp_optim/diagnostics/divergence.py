"""How far a step may go: the loss along the gradient, and along the preconditioned step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from bnp_optim.curvature.batches import Batch, Closures, as_batches
from bnp_optim.curvature.coordinates import BNPCoordinates, Preconditioner, as_coordinates
from bnp_optim.curvature.vectors import trained
from bnp_optim.diagnostics.guard import untouched
from bnp_optim.diagnostics.values import loss_and_gradient, new_axes, num_samples_of, shares_of

__all__ = ["STEP_SIZES", "Direction", "StepDivergence", "checked_step_sizes", "step_divergence"]

Direction = Literal["gradient", "preconditioned"]

# half decades from 1e-4 to 1e2: below every rate in use, and far above
STEP_SIZES = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-8, 5))


@dataclass(frozen=True, kw_only=True)
class StepDivergence:
    """The relative loss after steps of several sizes.

    Args:
        step_sizes: The grid, ascending.
        relative_losses: By direction ("gradient", "preconditioned"), at each step size: the loss after the step over
            the loss before it; infinite where it is not finite.
        divergence: By direction, the first step size of the grid whose relative loss exceeds ``threshold``; infinite
            if none does.
        threshold: As given.
        loss: The loss before.
        num_samples: Behind the numbers; None if the closures do not say.
        coordinates: What "preconditioned" is, in words; empty without it.
    """

    step_sizes: tuple[float, ...]
    relative_losses: Mapping[str, tuple[float, ...]]
    divergence: Mapping[str, float]
    threshold: float
    loss: float
    num_samples: int | None
    coordinates: str = ""

    def plot(self, ax: Any = None) -> Any:
        """Draw the relative loss against the step size.

        Args:
            ax: A matplotlib axes. None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        ax = new_axes() if ax is None else ax
        for direction, losses in self.relative_losses.items():
            ax.plot(self.step_sizes, [min(x, 1e12) for x in losses], marker=".", label=f"along the {_NAMES[direction]}")
        ax.axhline(self.threshold, color="gray", linestyle=":", linewidth=1)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("step size")
        ax.set_ylabel("loss after the step / loss before")
        return ax


_NAMES = {"gradient": "gradient", "preconditioned": "preconditioned gradient"}


def step_divergence(
    model: nn.Module,
    closures: Closures,
    *,
    params: Iterable[Tensor] | None = None,
    step_sizes: Iterable[float] = STEP_SIZES,
    preconditioner: Preconditioner = None,
    direction: Direction | None = None,
    threshold: float = 1e3,
) -> StepDivergence:
    """Measure the relative loss ``L(w − α d) / L(w)`` over a grid of step sizes α.

    d is the gradient g, as in J. Bjorck et al., Understanding Batch Normalization, NeurIPS 2018, section 3, where a
    relative loss above 10³ counts as divergence; and beside it S Sᵀg for the preconditioner w = S z, both on the very
    closures that the loss is measured on. For a BNPreconditioner that is P Pᵀg with its statistics as they are. That
    is the step, without momentum, of its gradient form and of SGD in both forms. An adaptive base adds its own scaling
    in z: ``coordinates_of(optimizer, params)`` as ``preconditioner`` has Adam's, P D⁻¹Pᵀg with its D as it is; Adam's
    averaged gradient, weight decay and clipping are in neither.

    One backward pass, and a forward pass per step size and direction, each times the number of closures. Parameters
    are moved and put back to the last bit, and so is all that :func:`activation_health` leaves as it is.

    Args:
        model: Guarded while its parameters move.
        closures: As for :func:`activation_health`. Their loss must be positive.
        params: Which move. None: all of the model's that require grad.
        step_sizes: Positive numbers, in any order.
        preconditioner: A BNPreconditioner, or coordinates such as :func:`bnp_optim.curvature.coordinates_of` makes.
            None or an empty list: there is no preconditioned step.
        direction: Only "gradient" or "preconditioned". None: all that there are.
        threshold: What relative loss counts as divergence. 1e3: the paper's.

    Returns:
        Relative losses and the first divergent step size, by direction.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if ``step_sizes`` is empty or has one that is not positive and finite, ``threshold`` is not above
            1, the preconditioned direction is asked for without a preconditioner or before it has statistics, or a
            loss is not positive, no finite scalar, or without gradient history.
    """
    sizes = checked_step_sizes(step_sizes)
    if not 1 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold!r}, it must be above 1, such as 1e3")
    if direction not in (None, "gradient", "preconditioned"):
        raise ValueError(f"direction is {direction!r}, it must be 'gradient', 'preconditioned', or None for both")
    batches = as_batches(closures)
    moved = trained(model.parameters() if params is None else params)
    coordinates = as_coordinates(preconditioner, moved)
    if direction == "preconditioned" and not coordinates:
        raise ValueError(f"preconditioner is {preconditioner!r}, but direction='preconditioned' needs one")
    if any(isinstance(s, BNPCoordinates) and not s.num_preconditioned for s in coordinates):
        raise ValueError(
            "preconditioner has no statistics for any of params: let it make a step first, or leave it out"
        )
    with untouched(model) as restore, _put_back(moved) as start:
        loss, gradient = loss_and_gradient(batches, moved, restore)
        if not loss > 0:
            raise ValueError(f"loss is {loss:.6g}, it must be positive: a relative loss has no meaning otherwise")
        directions = {"gradient": gradient}
        if coordinates and direction != "gradient":
            directions["preconditioned"] = _preconditioned(gradient, coordinates)
        if direction == "preconditioned":
            del directions["gradient"]
        found = {
            name: tuple(_after(batches, restore, moved, start, d, size) / loss for size in sizes)
            for name, d in directions.items()
        }
    return StepDivergence(
        step_sizes=sizes,
        relative_losses=found,
        divergence={
            name: next((a for a, x in zip(sizes, losses, strict=True) if x > threshold), math.inf)
            for name, losses in found.items()
        },
        threshold=threshold,
        loss=loss,
        num_samples=num_samples_of(batches),
        coordinates=", ".join(s.description for s in coordinates) if "preconditioned" in found else "",
    )


def checked_step_sizes(step_sizes: Iterable[float]) -> tuple[float, ...]:
    """The step sizes, ascending and each once.

    Raises:
        TypeError: if they are no iterable.
        ValueError: if there are none, or one is not positive and finite.
    """
    if isinstance(step_sizes, (int, float, str)) or not isinstance(step_sizes, Iterable):
        raise TypeError(f"step_sizes is {step_sizes!r}, it must be a sequence of numbers, such as [1e-2, 1e-1, 1.0]")
    given = list(step_sizes)
    if not given:
        raise ValueError("step_sizes is empty: give at least one, such as [1e-2, 1e-1, 1.0]")
    for i, size in enumerate(given):
        if isinstance(size, (bool, str)) or not 0 < float(size) < math.inf:
            raise ValueError(f"step_sizes[{i}] is {size!r}, it must be a positive, finite number")
    return tuple(sorted({float(size) for size in given}))


def _preconditioned(gradient: Sequence[Tensor], coordinates: Sequence[Any]) -> list[Tensor]:
    """``S Sᵀ g`` for ``w = S₁ S₂ … z``."""
    tensors = list(gradient)
    for s in coordinates:
        tensors = s.to_z(tensors)
    for s in reversed(coordinates):
        tensors = s.from_z(tensors)
    return tensors


def _after(
    batches: Sequence[Batch], restore: Any, params: Sequence[Tensor], start: Sequence[Tensor], d: Any, size: float
) -> float:
    """The mean loss at ``start − size · d``; infinite if it is not finite."""
    # in d's dtype, which is float32 at least
    for p, s, x in zip(params, start, d, strict=True):
        p.data.copy_(s - size * x)
    loss = 0.0
    for batch, share in zip(batches, shares_of(batches), strict=True):
        restore()
        value = batch.closure()
        if isinstance(value, tuple):
            value = value[1](value[0])
        loss += share * float(value.detach())
        del value  # and its graph
    return loss if math.isfinite(loss) else math.inf


@contextmanager
def _put_back(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    saved = [p.detach().clone() for p in params]
    try:
        yield saved
    finally:
        # NOTE: into the same memory, which others may have views of, and not through autograd's version counter,
        # since a graph from before may have saved the parameter
        for p, s in zip(params, saved, strict=True):
            p.data.copy_(s)
