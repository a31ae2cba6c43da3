"""Products of the Hessian and of the Gauss-Newton matrix with a vector, averaged over batches.

Both are exact: reverse over reverse for ``H v`` (B. Pearlmutter, Neural Computation 6(1), 1994), and for ``Jᵀ H_L J v``
the double vector-Jacobian product that makes ``J v`` of two backward passes (N. Schraudolph, Neural Computation 14(7),
2002, for the matrix). Where an operation has no second derivative, central differences stand in, and ``method`` says
so.

Nothing is left behind: ``torch.autograd.grad`` accumulates nowhere, and no graph outlives its batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from bnp_optim.curvature.batches import Batch, Closures, as_batches, loss_of, outputs_of
from bnp_optim.curvature.derivatives import (
    MissingDerivativeError,
    inspect_graph,
    second_derivatives,
    translated,
)
from bnp_optim.curvature.vectors import flatten, trained, unflatten, vector_dtype

__all__ = [
    "EXACT",
    "CurvatureOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "SymmetricOperator",
    "blocks",
]

EXACT = "double backward"
# The step of the central differences, of ‖θ‖, for a vector of length 1: errors of 2e-5 to 2e-4 were measured with it
_STEP = 1e-2


class SymmetricOperator(Protocol):
    """A symmetric matrix that can be multiplied with a vector."""

    @property
    def size(self) -> int:
        """Its dimension ``n``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors."""

    @property
    def device(self) -> torch.device:
        """Of vectors."""

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` (n,), as a fresh vector (n,)."""


class CurvatureOperator(ABC):
    """A curvature matrix over some parameters, averaged over batches by their number of samples.

    Args:
        closures: One or several closures, pairs (closure, num_samples) or :class:`Batch`. Each evaluates the loss of
            a batch; all on the same parameters.
        params: The parameters whose curvature it is, any subset of the model's: those of one layer give its block.
            Frozen ones are left out, and those that the loss does not depend on have zero rows.

    Attributes:
        params: The parameters, in the order of a flat vector.
        method: ``"double backward"``, or ``"finite differences: …"`` with the reason, once a product has needed them.
        num_products: Products so far.
        num_samples: Samples averaged over; None if the closures came without.

    Raises:
        TypeError: if closures or params are of the wrong kind.
        ValueError: if there are none. A product raises it for a loss that is no finite scalar with gradient history.
    """

    def __init__(self, closures: Closures, params: Iterable[Tensor]) -> None:
        self.batches = as_batches(closures)
        self.params = trained(params)
        self.method = EXACT
        self.num_products = 0
        known = [b.num_samples for b in self.batches if b.num_samples is not None]
        self.num_samples = sum(known) if known else None
        weights = known or [1] * len(self.batches)
        self._weights = [w / sum(weights) for w in weights]

    @property
    def size(self) -> int:
        """Number of parameters ``n``."""
        return sum(p.numel() for p in self.params)

    @property
    def dtype(self) -> torch.dtype:
        """Of flat vectors: the parameters' widest, float32 at least."""
        return vector_dtype(self.params)

    @property
    def device(self) -> torch.device:
        """Of flat vectors: the first parameter's."""
        return self.params[0].device

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a flat vector (n,).

        Raises:
            ValueError: if the vector has another shape, or the loss has no curvature.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {tuple(vector.shape)}, it must be ({self.size},), one number per entry")
        return flatten(self.product(unflatten(vector.detach(), self.params)), vector)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product with a vector given as tensors shaped like the parameters."""
        self.num_products += 1
        with second_derivatives():
            if self.method == EXACT:
                try:
                    return self._average(vectors, self._exact)
                except MissingDerivativeError as error:
                    self.method = f"finite differences: {error}"
            return self._differences(vectors)

    def _average(self, vectors: Sequence[Tensor], product: _BatchProduct) -> list[Tensor]:
        """The mean over batches of what ``product`` gives, unused parameters as zeros."""
        dtype = self.dtype
        total = [torch.zeros(p.shape, device=p.device, dtype=dtype) for p in self.params]
        aligned = [v.to(p.device, p.dtype) for v, p in zip(vectors, self.params, strict=True)]
        for batch, weight in zip(self.batches, self._weights, strict=True):
            for sum_, part in zip(total, product(batch, aligned), strict=True):
                if part is not None:
                    sum_.add_(part.detach().to(dtype), alpha=weight)
        return total

    @abstractmethod
    def _exact(self, batch: Batch, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One batch's product by automatic differentiation; raises ``MissingDerivativeError`` if there is none."""

    def _inspect(self, result: Tensor) -> None:
        """Look through each batch's graph once, at the first product."""
        if self.num_products == 1:
            inspect_graph(result)

    @abstractmethod
    def _differences(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The product by finite differences."""

    def _step(self, vectors: Sequence[Tensor]) -> float:
        """The factor ε of the vector that moves the parameters by 1 % of their length, or 0 for no direction."""
        # NOTE: some devices (MPS) have no float64
        length, size = (
            math.hypot(*(float(torch.linalg.vector_norm(t.detach().cpu().double())) for t in tensors))
            for tensors in (vectors, self.params)
        )
        return 0.0 if length == 0 else _STEP * (size or 1.0) / length

    @contextmanager
    def _moved(self, vectors: Sequence[Tensor], step: float, home: Sequence[Tensor]) -> Iterator[None]:
        """The parameters at ``home + step · vectors``; afterwards what they were, to the last bit."""
        try:
            with torch.no_grad():
                for p, v, h in zip(self.params, vectors, home, strict=True):
                    p.copy_(h + step * v)
            yield
        finally:
            with torch.no_grad():
                for p, h in zip(self.params, home, strict=True):
                    p.copy_(h)

    def _home(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


class HessianOperator(CurvatureOperator):
    """``v ↦ H v``, H the Hessian of the mean loss."""

    def _exact(self, batch: Batch, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        loss = loss_of(batch)
        self._inspect(loss)
        with translated():
            grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
            curved = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
            if not curved:
                return [None] * len(self.params)
            return torch.autograd.grad([g for g, _ in curved], self.params, [v for _, v in curved], allow_unused=True)

    def _differences(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        step = self._step(vectors)
        home = self._home()
        sides = []
        for side in (step, -step):
            with self._moved(vectors, side, home):
                sides.append(self._average(vectors, self._gradient))
        return [(a - b).div_(2 * step) if step else a.zero_() for a, b in zip(*sides, strict=True)]

    def _gradient(self, batch: Batch, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(loss_of(batch), self.params, allow_unused=True)


class GaussNewtonOperator(CurvatureOperator):
    """``v ↦ Jᵀ H_L J v``, J the outputs' Jacobian and H_L the loss's Hessian in the outputs, both exact.

    For cross-entropy and squared error it is the Fisher matrix. (The *empirical* Fisher matrix, of the gradients at
    the labels, is another thing: at the end of training it can be 46 times too small.)
    Closures return the pair (outputs, loss as a function of outputs), outputs one tensor.
    """

    def _exact(self, batch: Batch, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        outputs, loss = outputs_of(batch)
        self._inspect(outputs)
        with translated():
            # Jᵀu is linear in u, so its derivative along v is J v, whatever u is
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, self.params, u, create_graph=True, allow_unused=True)
            used = [(g, v) for g, v in zip(pulled, vectors, strict=True) if g is not None and g.requires_grad]
            pushed = torch.autograd.grad(
                [g for g, _ in used], u, [v for _, v in used], retain_graph=True, materialize_grads=True
            )[0]
        return self._pull(outputs, _loss_curvature(loss, outputs, pushed.detach()))

    def _pull(self, outputs: Tensor, cotangent: Tensor | None) -> Sequence[Tensor | None]:
        if cotangent is None:
            return [None] * len(self.params)
        return torch.autograd.grad(outputs, self.params, cotangent, allow_unused=True)

    def _differences(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        step = self._step(vectors)
        home = self._home()

        def product(batch: Batch, aligned: Sequence[Tensor]) -> Sequence[Tensor | None]:
            sides = []
            for side in (step, -step):
                with self._moved(aligned, side, home), torch.no_grad():
                    sides.append(batch.closure()[0].detach())
            outputs, loss = outputs_of(batch)
            pushed = (sides[0] - sides[1]) / (2 * step) if step else torch.zeros_like(sides[0])
            return self._pull(outputs, _loss_curvature(loss, outputs, pushed))

        return self._average(vectors, product)


def blocks(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trained parameters of each module by its name, those of its children not: a layer's diagonal block.

    Pass one of the lists as ``params``. A parameter that several modules share belongs to the first.
    """
    found: dict[str, list[Tensor]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            found[name] = list(own)
    return found


class _BatchProduct(Protocol):
    def __call__(self, batch: Batch, vectors: Sequence[Tensor], /) -> Sequence[Tensor | None]: ...


def _loss_curvature(loss: object, outputs: Tensor, vector: Tensor) -> Tensor | None:
    """``H_L vector``, H_L the loss's Hessian in the outputs; None where the loss is linear in them."""
    leaf = outputs.detach().requires_grad_()
    value = loss_of(Batch(lambda: (leaf, loss)))
    with translated():
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        if not slope.requires_grad:
            return None
        (curved,) = torch.autograd.grad(slope, leaf, vector, allow_unused=True)
    return None if curved is None else curved.detach()
