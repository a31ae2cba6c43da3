"""What a curvature matrix is averaged over: closures that evaluate a batch, and how many samples each one has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Closures", "as_batches", "closures_from_loader", "loss_of", "outputs_of"]

LossOfOutputs = Callable[[Tensor], Tensor]
Evaluate = Callable[[], Any]


@dataclass(frozen=True)
class Batch:
    """A closure, and its weight in the average.

    Args:
        closure: Evaluates the model on the batch, anew at each call, and returns the mean loss over it (a scalar with
            gradient history); or, as the Gauss-Newton matrix needs, the pair (outputs, loss as a function of
            outputs). It must give the same numbers each time: dropout and batch statistics are the caller's
            business.
        num_samples: Samples in the batch; a mean of batches of different sizes weighs them by it. None: unknown, and
            all batches weigh the same.
    """

    closure: Evaluate
    num_samples: int | None = None


Closures: TypeAlias = "Evaluate | Batch | tuple[Evaluate, int] | Iterable[Evaluate | Batch | tuple[Evaluate, int]]"


def as_batches(closures: Closures) -> list[Batch]:
    """``closures`` in their one form.

    Args:
        closures: One or several of: a closure, a pair (closure, num_samples), a :class:`Batch`.

    Raises:
        TypeError: if one of them is none of these.
        ValueError: if there are none, if only some come with a number of samples, or if such a number is below 1.
    """
    pair = isinstance(closures, tuple) and len(closures) == 2 and isinstance(closures[1], int)
    many: list[Any] = [closures] if pair or isinstance(closures, Batch) or callable(closures) else list(closures)
    batches = [_batch(x, i) for i, x in enumerate(many)]
    if not batches:
        raise ValueError(f"closures is {closures!r}, it must hold at least one: each evaluates the loss on a batch")
    known = [b.num_samples for b in batches if b.num_samples is not None]
    if known and len(known) < len(batches):
        raise ValueError(
            f"closures has num_samples for {len(known)} of {len(batches)} batches: give it for all or for none, since "
            "the average weighs batches by it"
        )
    return batches


def _batch(x: Any, i: int) -> Batch:
    if isinstance(x, tuple) and len(x) == 2:
        x = Batch(*x)
    elif callable(x) and not isinstance(x, Batch):
        x = Batch(x)
    if not isinstance(x, Batch) or not callable(x.closure):
        raise TypeError(f"closures[{i}] is {x!r}, it must be a closure, a pair (closure, num_samples) or a Batch")
    if x.num_samples is not None and (int(x.num_samples) != x.num_samples or x.num_samples < 1):
        raise ValueError(f"closures[{i}] has num_samples {x.num_samples!r}, it must be a whole number of at least 1")
    return x


def closures_from_loader(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    loader: Iterable[Any],
    *,
    max_batches: int | None = None,
) -> list[Batch]:
    """Closures over the batches of a data loader, fit for both matrices.

    The batches are read once, here, and kept as they come, so that every product sees the same samples; they move
    to the model's device only while they are evaluated. A loader that shuffles draws from the global random numbers
    here.

    Args:
        model: Called with a batch's inputs. Its mode (train or eval) is left as it is.
        loss_fn: ``loss_fn(outputs, targets)``, the *mean* over the batch, such as ``nn.functional.cross_entropy``.
        loader: Of sequences (inputs, …, targets).
        max_batches: Read so many at most. None: all.

    Returns:
        One :class:`Batch` per batch, with ``num_samples`` the first dimension of its targets.

    Raises:
        TypeError: if a batch is no sequence of at least two entries, or its targets are no tensor.
        ValueError: if ``max_batches`` is below 1 or the loader is empty.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches!r}, it must be at least 1, or None for all")
    batches = [_loader_batch(model, loss_fn, batch) for batch in islice(loader, max_batches)]
    if not batches:
        raise ValueError(f"loader {loader!r} gave no batch: it must hold at least one")
    return batches


def _loader_batch(model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], batch: Any) -> Batch:
    if isinstance(batch, (str, Mapping, Tensor)) or not isinstance(batch, Sequence) or len(batch) < 2:
        raise TypeError(
            f"loader gave a {type(batch).__name__}, it must give sequences (inputs, …, targets): write the closures "
            "yourself for other batches"
        )
    *inputs, targets = batch
    if not isinstance(targets, Tensor):
        raise TypeError(f"loader gave targets of type {type(targets).__name__}, they must be a tensor")

    def evaluate() -> tuple[Tensor, LossOfOutputs]:
        device = next((p.device for p in model.parameters()), targets.device)
        there = targets.to(device)
        outputs = model(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))
        return outputs, lambda y: loss_fn(y, there)

    return Batch(evaluate, targets.shape[0] if targets.dim() else 1)


def loss_of(batch: Batch) -> Tensor:
    """Evaluate the batch's loss, and refuse what has no curvature.

    Raises:
        TypeError: if the closure returns neither a tensor nor a pair (outputs, loss as a function of outputs).
        ValueError: if the loss is no scalar, is not finite, or does not require grad.
    """
    value = batch.closure()
    if _is_pair(value):
        value = value[1](value[0])
    if not isinstance(value, Tensor):
        raise TypeError(
            f"a closure returned a {type(value).__name__}, it must return the loss as a tensor, or the pair "
            "(outputs, loss as a function of outputs)"
        )
    return _checked(value, "loss")


def outputs_of(batch: Batch) -> tuple[Tensor, LossOfOutputs]:
    """Evaluate the batch's outputs; the loss is a function of them.

    Raises:
        TypeError: if the closure does not return such a pair.
        ValueError: if the outputs do not require grad.
    """
    value = batch.closure()
    if not _is_pair(value):
        raise TypeError(
            f"a closure returned a {type(value).__name__}, but matrix='gauss_newton' needs the pair (outputs, loss as "
            "a function of outputs): return model(x), lambda outputs: loss_fn(outputs, y)"
        )
    outputs, loss = value
    if not outputs.requires_grad:
        raise ValueError(_NO_GRAD.format("outputs"))
    return outputs, loss


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor) and callable(value[1])


_NO_GRAD = (
    "{} does not require grad: evaluate the model inside the closure, without torch.no_grad() and without detaching, "
    "on parameters with requires_grad=True"
)


def _checked(loss: Tensor, name: str) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(loss.shape)}, it must be a scalar: return its mean over the batch")
    if not loss.requires_grad:
        raise ValueError(_NO_GRAD.format(name))
    if not bool(torch.isfinite(loss.detach()).all()):
        raise ValueError(f"{name} is {loss.item()}, it must be finite: there is no curvature where training diverged")
    return loss.reshape(())
