"""Activation functions as the mean-field theory sees them: φ, φ', and where they are not smooth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Activation", "as_activation", "is_activation"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ with what its Gaussian integrals need.

    Args:
        function: φ, elementwise on float64 tensors; φ' comes by automatic differentiation.
        kinks: Where φ or one of its derivatives jumps. The integrals are split there; without them they would be
            wrong, which is noticed and refused.
        name: For reports; by default the function's own.
        slope: s, if φ(u) = u for u ≥ 0 and s·u below: such integrals have closed forms (0: ReLU, 1: linear).
        is_erf: Whether φ is the error function, which has closed forms as well.
    """

    function: Function
    kinks: tuple[float, ...] = ()
    name: str = ""
    slope: float | None = None
    is_erf: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function is {self.function!r}, it must be a callable on tensors, such as torch.tanh")
        if not all(math.isfinite(k) for k in self.kinks):
            raise ValueError(f"kinks is {self.kinks!r}, it must hold finite numbers: where the slope jumps")

    def __str__(self) -> str:
        return self.name or getattr(self.function, "__name__", type(self.function).__name__)

    def values(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """φ(u) and φ'(u).

        Raises:
            ValueError: if φ is not elementwise, not finite, or not differentiable by autograd.
        """
        with torch.inference_mode(False), torch.enable_grad():
            u = u.detach().clone().requires_grad_()
            y = self.function(u)
            if not isinstance(y, Tensor) or y.shape != u.shape or not y.requires_grad:
                raise ValueError(
                    f"activation {self} maps a tensor of shape {tuple(u.shape)} to {_described(y)}: it must be "
                    "elementwise and differentiable by autograd"
                )
            (slope,) = torch.autograd.grad(y.sum(), u)
        if not bool(torch.isfinite(y.detach()).all() and torch.isfinite(slope).all()):
            low, high = float(u.detach().min()), float(u.detach().max())
            raise ValueError(f"activation {self} is not finite on [{low:.3g}, {high:.3g}]")
        return y.detach(), slope


def _described(y: Any) -> str:
    if not isinstance(y, Tensor):
        return f"a {type(y).__name__}"
    return f"one of shape {tuple(y.shape)}" + ("" if y.requires_grad else " without gradient")


@dataclass(frozen=True)
class _Known:
    """How a module class is read: the kinks of an instance, the slope of its negative half where it is all of it."""

    kinks: Callable[[Any], tuple[float, ...]] = field(default=lambda m: ())
    slope: Callable[[Any], float] | None = None


_MODULES: dict[type[nn.Module], _Known] = {
    nn.Identity: _Known(slope=lambda m: 1.0),
    nn.ReLU: _Known(lambda m: (0.0,), lambda m: 0.0),
    nn.LeakyReLU: _Known(lambda m: (0.0,), lambda m: m.negative_slope),
    nn.ReLU6: _Known(lambda m: (0.0, 6.0)),
    nn.Hardtanh: _Known(lambda m: (m.min_val, m.max_val)),
    nn.Hardswish: _Known(lambda m: (-3.0, 3.0)),
    nn.Hardsigmoid: _Known(lambda m: (-3.0, 3.0)),
    nn.ELU: _Known(lambda m: (0.0,)),
    nn.CELU: _Known(lambda m: (0.0,)),
    nn.SELU: _Known(lambda m: (0.0,)),
    nn.Softsign: _Known(lambda m: (0.0,)),
    nn.Softshrink: _Known(lambda m: (-m.lambd, m.lambd)),
    nn.Softplus: _Known(lambda m: (m.threshold / m.beta,)),  # torch goes on linearly from there
    nn.Tanh: _Known(),
    nn.Sigmoid: _Known(),
    nn.LogSigmoid: _Known(),
    nn.Tanhshrink: _Known(),
    nn.GELU: _Known(),
    nn.SiLU: _Known(),
    nn.Mish: _Known(),
}

_NAMES: dict[str, Callable[[], Activation]] = {
    "linear": lambda: Activation(_identity, name="linear", slope=1.0),
    "erf": lambda: Activation(torch.erf, name="erf", is_erf=True),
    **{
        name: (lambda module=module, name=name: _from_module(module(), name))  # type: ignore[misc]
        for name, module in {
            "relu": nn.ReLU,
            "leaky_relu": nn.LeakyReLU,
            "tanh": nn.Tanh,
            "sigmoid": nn.Sigmoid,
            "gelu": nn.GELU,
            "silu": nn.SiLU,
            "softplus": nn.Softplus,
            "elu": nn.ELU,
            "selu": nn.SELU,
            "mish": nn.Mish,
            "hardtanh": nn.Hardtanh,
        }.items()
    },
}
# The same functions by their other names, which come without a module
_FUNCTIONS: dict[Any, str] = {torch.relu: "relu", nn.functional.relu: "relu", torch.erf: "erf"}


def as_activation(activation: str | Activation | nn.Module | Function) -> Activation:
    """``activation`` in its one form.

    Args:
        activation: A name ("relu", "leaky_relu", "linear", "erf" (of u itself), "tanh", "sigmoid", "gelu", "silu",
            "softplus", "elu", "selu", "mish", "hardtanh"), a torch activation module, an :class:`Activation`, or a
            callable, which is taken to be smooth.

    Raises:
        ValueError: if a name is unknown.
        TypeError: if it is nothing of the above.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in _NAMES:
            raise ValueError(
                f"activation is {activation!r}, known are {', '.join(sorted(_NAMES))}: pass another one as a callable"
            )
        return _NAMES[activation]()
    if isinstance(activation, nn.Module):
        return _from_module(activation, type(activation).__name__)
    if not callable(activation):
        raise TypeError(f"activation is {activation!r}, it must be a name, a module or a callable")
    if activation in _FUNCTIONS:
        return _NAMES[_FUNCTIONS[activation]]()
    return Activation(activation)


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation that is known to be elementwise."""
    return type(module) in _MODULES or isinstance(module, nn.PReLU)


def _from_module(module: nn.Module, name: str) -> Activation:
    if isinstance(module, nn.PReLU):
        if module.num_parameters != 1:
            raise ValueError(f"activation PReLU has num_parameters={module.num_parameters}, it must be 1: one function")
        return as_activation(nn.LeakyReLU(float(module.weight.detach())))
    known = _MODULES.get(type(module), _Known())
    quiet = copy.deepcopy(module).double().cpu().eval()
    if getattr(quiet, "inplace", False):
        quiet.inplace = False  # type: ignore[assignment]
    return Activation(quiet, known.kinks(module), name, None if known.slope is None else float(known.slope(module)))


def _identity(u: Tensor) -> Tensor:
    return u * 1
