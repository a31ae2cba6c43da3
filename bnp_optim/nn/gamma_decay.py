"""Gamma decay: how strongly batch normalization's noise would pull at γ, measured as training goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from bnp_optim.checks import check_number
from bnp_optim.moments import statistics_dtype
from bnp_optim.nn.activations import Activation, activation_of, slope
from bnp_optim.nn.running import advanced, batch_statistics

__all__ = ["GammaMeter", "check_batch_size", "gamma_decay_coefficient", "gaussian_coefficient"]

_CELLS, _REACH = 1200, 6.0  # of the quadrature over a normal variable; midpoints, since ReLU's slope jumps at zero


class GammaMeter:
    """Running averages of what ζ is made of, for one layer; a forward hook.

    With x̂ the layer's normalized pre-activation, h̄ = γx̂ + β what goes into the activation A', and A'' its derivative,
    per channel over samples and positions: E x̂², E x̂⁴ (they give the excess kurtosis ρ), I(γ) = E[A''(h̄)x̂²] and
    E A''(h̄). For a PopulationNorm (or BatchNorm) x̂ is by its running statistics. For any other layer h̄ is its
    output, and x̂ the output by running statistics that the meter keeps.

    Measures in training mode, outside graphs of ``torch.compile``. Values that are not finite are left out.

    Args:
        activation: What follows the layer: "identity", "relu", "tanh", ..., an elementwise module or a function.
        interval: Measure every so many forward calls. 10: ζ changes slowly, and a measurement costs about two
            forward passes of a normalization.
        momentum: Weight of the newest measurement, bias corrected. 0.1: the last 100 calls.

    Attributes:
        averages: (4, C): E x̂², E x̂⁴, I(γ), E A''; None before the first measurement.
    """

    def __init__(self, activation: Activation, *, interval: int = 10, momentum: float = 0.1) -> None:
        check_number("interval", interval, lambda n: n >= 1 and n == int(n), "a whole number of at least 1")
        check_number("momentum", momentum, lambda m: 0 < m <= 1, "in (0, 1], such as 0.1")
        self.activation = activation_of("activation", activation)
        self.interval = interval
        self.momentum = momentum
        self._paused = 0
        self.averages: Tensor | None = None
        self.population: tuple[Tensor, Tensor] | None = None  # mean and variance of outputs without a normalization
        self._calls = 0
        self._measured = 0

    def attach(self, layer: nn.Module) -> RemovableHandle:
        """Measure ``layer`` from now on; returns the handle that ends it."""
        return layer.register_forward_hook(self)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forward passes inside measure nothing; contexts nest."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Measure one forward call, if it is due."""
        if torch.compiler.is_compiling() or not (layer.training and not self._paused and isinstance(output, Tensor)):
            return
        due = self._calls % self.interval == 0
        self._calls += 1
        if due and output.numel():
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._measure(layer, args[0] if args else output, output.detach())

    def _measure(self, layer: nn.Module, input: Tensor, output: Tensor) -> None:
        dtype = statistics_dtype(output)
        output = output.to(dtype)
        self._measured += 1
        share = self.momentum / (1 - (1 - self.momentum) ** self._measured)
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
            shape = (1, -1, *(1 for _ in input.shape[2:]))
            mean, variance = layer.running_mean.to(dtype), layer.running_var.to(dtype) + layer.eps
            standard = (input.detach().to(dtype) - mean.view(shape)) * variance.rsqrt().view(shape)
        else:
            if not isinstance(layer, nn.modules.conv._ConvNd):
                output = output.reshape(-1, output.shape[-1])  # any further dimensions of a Linear are samples
            elif output.dim() < layer.weight.dim():
                output = output.unsqueeze(0)
            standard = self._standardized(output, share)
        squares, slopes = standard.square(), slope(self.activation, output)
        dims = (0, *range(2, output.dim()))
        parts = (squares, squares.square(), slopes * squares, slopes)
        new = torch.stack([part.mean(dims) for part in parts])
        old = torch.zeros_like(new) if self.averages is None else self.averages.to(new)
        finite = new.isfinite().all()
        if self.averages is None and not finite:
            self._measured = 0
            return
        self.averages = torch.where(finite, old + share * (new - old), old)

    def _standardized(self, output: Tensor, share: float) -> Tensor:
        """The output by the running statistics of outputs, this one included."""
        found = batch_statistics(output, output.dtype)
        if self.population is not None:
            old_mean, old_variance = (t.to(output) for t in self.population)
            mixed = advanced(
                old_mean, old_variance, *found, torch.tensor(share, dtype=output.dtype, device=output.device)
            )
            finite = (mixed[0].isfinite() & mixed[1].isfinite()).all()
            found = torch.where(finite, mixed[0], old_mean), torch.where(finite, mixed[1], old_variance)
        elif not (found[0].isfinite() & found[1].isfinite()).all():
            return torch.full_like(output, math.nan)
        self.population = found
        shape = (1, -1, *(1 for _ in output.shape[2:]))
        scale = (found[1] + torch.finfo(output.dtype).tiny).rsqrt()
        return (output - found[0].view(shape)) * scale.view(shape)

    def state_dict(self) -> dict[str, Any]:
        """All that later measurements depend on."""
        return {
            "averages": self.averages, "population": self.population, "calls": self._calls, "measured": self._measured
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.averages, self.population = state["averages"], state["population"]
        self._calls, self._measured = state["calls"], state["measured"]

    def coefficient(self, batch_size: float) -> Tensor | None:
        """ζ of each channel, (C,); None before the first measurement."""
        if self.averages is None:
            return None
        second, fourth, information, mean_slope = self.averages
        kurtosis = fourth / second.square().clamp_min(torch.finfo(second.dtype).tiny) - 3
        return _zeta(kurtosis, information, mean_slope, batch_size)


def gamma_decay_coefficient(layer: nn.Module, batch_size: float, *, activation: Activation | None = None) -> Tensor:
    """ζ of each channel: batch normalization's noise adds about ζγ² to the loss of the population-normalized net.

    ζ = (ρ+2)/(8M)·I(γ) + (1/2M)·E A''(h̄), the first part from the noise of the batch's standard deviation and the
    second from that of its mean: ρ the excess kurtosis of the pre-activation, I(γ) = E[A''(h̄)x̂²], A' the activation
    (P. Luo et al., ICLR 2019, 1809.00846). With Gaussian pre-activations 3/(4M) without an activation and, at β = 0,
    3/(8M) with ReLU.

    Measured, if a :class:`GammaMeter` is attached to the layer and has seen a batch. Otherwise of Gaussian x̂ with the
    γ and β that a PopulationNorm or BatchNorm holds, by quadrature.

    Args:
        layer: The layer whose output goes into the activation.
        batch_size: M, at least 2: of the batch normalization whose effect is asked for.
        activation: What follows the layer (as for :class:`GammaMeter`), where nothing was measured.

    Returns:
        (C,), without gradient history.

    Raises:
        TypeError, ValueError: if an argument is out of its range, or the layer was not measured and either is no
            normalization or comes without an activation.
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a torch.nn.Module, got {type(layer).__name__}")
    check_batch_size(batch_size)
    for hook in layer._forward_hooks.values():
        if isinstance(hook, GammaMeter):
            measured = hook.coefficient(batch_size)
            if measured is not None:
                return measured
            activation = hook.activation if activation is None else activation
    if not isinstance(layer, _NormBase):
        raise ValueError(
            f"layer {type(layer).__name__} is no normalization and was not measured: attach a meter before its forward "
            "pass, GammaMeter('relu').attach(layer)"
        )
    if activation is None:
        raise ValueError("activation is None and the layer was not measured: say what follows it, such as 'relu'")
    like = layer.running_mean if layer.running_mean is not None else torch.zeros(layer.num_features)
    scale = torch.ones_like(like) if layer.weight is None else layer.weight.detach()
    shift = torch.zeros_like(like) if layer.bias is None else layer.bias.detach()
    return gaussian_coefficient(activation_of("activation", activation), scale, shift, batch_size)


def gaussian_coefficient(
    activation: Callable[[Tensor], Tensor], scale: Tensor, shift: Tensor, batch_size: float
) -> Tensor:
    """ζ for Gaussian x̂ at h̄ = scale·x̂ + shift (each (C,)), without a measurement."""
    step = 2 * _REACH / _CELLS
    z = torch.arange(_CELLS, dtype=torch.float64, device=scale.device).add_(0.5).mul_(step).sub_(_REACH)
    z = z.to(statistics_dtype(scale))
    weight = (z.square() / -2).exp() * (step / math.sqrt(2 * math.pi))
    slopes = slope(activation, z[:, None] * scale.to(z) + shift.to(z))
    return _zeta(
        torch.zeros((), dtype=z.dtype, device=z.device), (weight * z.square()) @ slopes, weight @ slopes, batch_size
    )


def check_batch_size(batch_size: Any) -> None:
    """Refuse a batch size at which there is no batch normalization."""
    check_number(
        "batch_size", batch_size, lambda m: 2 <= m < math.inf, "at least 2: that of the batch normalization to imitate"
    )


def _zeta(kurtosis: Tensor, information: Tensor, mean_slope: Tensor, batch_size: float) -> Tensor:
    return (kurtosis + 2) / (8 * batch_size) * information + mean_slope / (2 * batch_size)
