"""Which activation follows a layer, and its derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Activation", "activation_of", "following_activations", "slope"]

Activation = str | nn.Module | Callable[[Tensor], Tensor]

_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Threshold,
)  # fmt: skip
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def activation_of(name: str, activation: Any) -> Callable[[Tensor], Tensor]:
    """The function that ``activation``, the argument called ``name``, stands for.

    Raises:
        ValueError: if it is no known name.
        TypeError: if it is nothing that can be called.
    """
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ValueError(
                f"{name} is {activation!r}, it must be one of {', '.join(map(repr, _BY_NAME))}, a module or a function"
            )
        return _BY_NAME[activation]
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(f"{name} is {activation!r}, it must be a name such as 'relu', a module or a function")
    # forward, not the call: a module's hooks must not see what is only measured
    return activation.forward if isinstance(activation, nn.Module) else activation


def slope(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function at each entry of ``x``; that of ReLU at zero is zero.

    Raises:
        ValueError: if the function changes the shape.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = activation(leaf.clone())  # it may work in place
        if y.shape != x.shape:
            raise ValueError(
                f"activation {activation!r} makes {tuple(y.shape)} of {tuple(x.shape)}: it must be elementwise"
            )
        (found,) = torch.autograd.grad(y.sum(), leaf)
    return found


def following_activations(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For modules inside an ``nn.Sequential``, the elementwise activation that comes next, dropout left out."""
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            row = [m for m in _flat(module) if not isinstance(m, _TRANSPARENT)]
            for layer, following in pairwise(row):
                if isinstance(following, _ELEMENTWISE):
                    found.setdefault(layer, following)
    return found


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flat(child)
    else:
        yield module
