"""``fisher_lambda_max``: the largest eigenvalue of a network's Fisher matrix, as it is rather than as predicted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bnp_optim.curvature.coordinates import BNPCoordinates, Preconditioner, as_coordinates
from bnp_optim.curvature.derivatives import MissingDerivativeError, inspect_graph, second_derivatives, translated
from bnp_optim.curvature.lanczos import gaussian, lanczos
from bnp_optim.curvature.vectors import trained, vector_dtype

__all__ = ["FisherKernel", "fisher_lambda_max"]


def fisher_lambda_max(
    model: nn.Module,
    x: Tensor,
    *,
    params: Iterable[Tensor] | None = None,
    preconditioner: Preconditioner = None,
    centered_output: bool = False,
    tolerance: float = 1e-4,
    num_steps: int = 200,
    seed: int = 0,
) -> float:
    """Measure λ_max of ``F = (1/T) Σ_k Σ_t ∇f_k(t)∇f_k(t)ᵀ``, the Gauss-Newton matrix of ``(1/2T) Σ ‖y - f‖²``.

    f is differentiated as the model computes it: in training mode through the statistics of BatchNorm over the T
    samples, which are one batch. Nothing is left behind: buffers, ``.grad``, modes and random numbers stay as they are.
    (A model that a BNPreconditioner has wrapped: pass it as ``preconditioner``, or measure inside
    ``pause_statistics()``.)

    Lanczos runs on the kernel ``JJᵀ/T``, which has F's eigenvalues and T·C rows; J itself is never formed.

    Args:
        model: In the mode to measure it in; its output is a tensor whose first dimension is the T samples.
        x: The inputs, (T, …).
        params: Those that F is taken over. None: all of the model's that require grad.
        preconditioner: For SᵀFS in the coordinates ``w = S z``: a BNPreconditioner, or coordinates of
            :mod:`bnp_optim.curvature`.
        centered_output: Take each output's mean over the samples out, as ``bnp_optim.nn.OutputCentering`` in training.
        tolerance: Relative, by estimate; Lanczos stops there.
        num_steps: Products at most; a warning tells if they did not suffice, and the value is then a lower bound.
        seed: Of the start vector.

    Raises:
        TypeError: if the model's output is no tensor.
        ValueError: if a single sample meets BatchNorm in training mode, the output has other samples than ``x``,
            nothing requires grad, or an operation has no second derivative.
    """
    kernel = FisherKernel(model, x, params=params, preconditioner=preconditioner, centered_output=centered_output)
    start = gaussian(kernel.size, torch.Generator().manual_seed(seed), kernel.dtype, kernel.device)
    found = lanczos(kernel, start, num_steps=num_steps, tolerance=tolerance)
    if not (found.exhausted or found.has_converged(tolerance)):
        warnings.warn(
            f"λ_max has not converged to {tolerance:g} in {found.steps} products: it is a lower bound; raise num_steps",
            RuntimeWarning,
            stacklevel=2,
        )
    return float(found.ritz_values[-1])


class FisherKernel:
    """``u ↦ J S SᵀJᵀ u / T`` on vectors with an entry per sample and output: the Fisher matrix from its other side.

    The model runs once, at construction; products reuse its graph. See :func:`fisher_lambda_max` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        params: Iterable[Tensor] | None = None,
        preconditioner: Preconditioner = None,
        centered_output: bool = False,
    ) -> None:
        self._params = trained(model.parameters() if params is None else params)
        self.coordinates = as_coordinates(preconditioner, self._params)
        self.centered_output = centered_output
        self.num_samples = _num_samples(model, x)
        self.num_products = 0
        with second_derivatives():
            self._outputs = _outputs(model, x, self.coordinates)
            if self._outputs.shape[:1] != (self.num_samples,):
                raise ValueError(
                    f"model maps {self.num_samples} samples to an output of shape {tuple(self._outputs.shape)}, whose "
                    "first dimension must be the samples"
                )
            try:
                inspect_graph(self._outputs)
                with translated():
                    # Jᵀu is linear in u, so its derivative along v is J v, whatever u is
                    self._u = torch.zeros_like(self._outputs, requires_grad=True)
                    self._pulled = torch.autograd.grad(
                        self._outputs, self._params, self._u, create_graph=True, allow_unused=True
                    )
            except MissingDerivativeError as error:
                raise ValueError(f"model has no second derivative, which Jv is made of: {error}") from error

    @property
    def size(self) -> int:
        """T·C."""
        return self._outputs.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors."""
        return vector_dtype([self._outputs])

    @property
    def device(self) -> torch.device:
        """Of vectors."""
        return self._outputs.device

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with (T·C,)."""
        self.num_products += 1
        u = self._center(vector.view(self._outputs.shape)).to(self._outputs.dtype)
        with second_derivatives():
            tensors = torch.autograd.grad(
                self._outputs, self._params, u, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for s in self.coordinates:
                tensors = tuple(s.to_z(tensors))
            for s in reversed(self.coordinates):
                tensors = tuple(s.from_z(tensors))
            used = [(g, v) for g, v in zip(self._pulled, tensors, strict=True) if g is not None and g.requires_grad]
            if not used:  # the outputs depend on none of params
                return torch.zeros_like(vector)
            (pushed,) = torch.autograd.grad([g for g, _ in used], self._u, [v for _, v in used], retain_graph=True)
        return (self._center(pushed.to(vector.dtype)) / self.num_samples).reshape(-1)

    def _center(self, u: Tensor) -> Tensor:
        return u - u.mean(0) if self.centered_output else u


def _num_samples(model: nn.Module, x: Tensor) -> int:
    if not isinstance(x, Tensor) or x.dim() < 1 or len(x) < 1:
        what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"x is {what}, it must be a tensor of at least one sample, samples first")
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if len(x) == 1 and any(m.training or m.running_mean is None for m in norms):
        raise ValueError("x holds 1 sample, but BatchNorm in training mode needs at least 2: pass a batch, or eval()")
    return len(x)


def _outputs(model: nn.Module, x: Tensor, coordinates: Iterable[object]) -> Tensor:
    """The model's output on copies of its buffers, without moving the random numbers."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    cuda = {p.device for p in (x, *model.parameters()) if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(cuda)), ExitStack() as stack:
        for s in coordinates:
            if isinstance(s, BNPCoordinates):
                stack.enter_context(s.preconditioner.pause_statistics())
        y = functional_call(model, buffers, (x,))
    if not isinstance(y, Tensor):
        raise TypeError(f"model returns a {type(y).__name__}, it must return a tensor: wrap it to return its outputs")
    if not y.requires_grad:
        raise ValueError("model's output does not require grad: its parameters must, and nothing may detach it")
    return y
