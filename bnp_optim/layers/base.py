"""What the preconditioner must know of a layer type, and the registry of the types it knows.

A layer is seen as ``groups`` blocks of rows; each row of a block multiplies the same inputs,
``channels * taps`` of them. A ``Linear`` is one block with one tap; a grouped convolution has one block per
group and one tap per kernel position. Statistics live on the ``groups * channels`` input channels; all taps of
a channel share them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LayerAdapter", "Rows", "Samples", "adapter_for", "register_layer"]


@dataclass(frozen=True)
class Rows:
    """A weight as blocks of rows times inputs.

    Args:
        groups: Blocks of rows that see different input channels (1 for all but grouped convolutions).
        channels: Input channels that one row sees.
        taps: Weights of one row on one channel (kernel positions; 1 for dense layers).
    """

    groups: int
    channels: int
    taps: int = 1

    @property
    def fan_in(self) -> int:
        """Inputs of one row, ``n`` in the paper."""
        return self.channels * self.taps

    @property
    def statistics(self) -> int:
        """Input channels of the layer: how many means and variances are kept."""
        return self.groups * self.channels


class Samples(NamedTuple):
    """A layer's input as the statistics read it.

    Args:
        values: Tensor with the observations in dimension 0, the input channels in dimension 1, and any further
            dimensions (positions) behind them.
        size: ``N``, the samples that the mini-batch holds for ``q² = max(·/N, 1)``.
    """

    values: Tensor
    size: int


class LayerAdapter(ABC):
    """How one family of modules maps onto rows × inputs. Stateless; one instance serves every module.

    Subclasses say where the parameters are, how the weight splits into rows, and how the module's input is read.
    :meth:`respond` and :meth:`correlate` are needed by ``step_scale="spectral"`` alone.
    """

    weight_name: str = "weight"
    bias_name: str = "bias"

    @abstractmethod
    def rows(self, module: nn.Module) -> Rows:
        """The geometry of ``module``'s weight."""

    @abstractmethod
    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        """``input`` (what the module was called with, detached) as observations × channels (× positions)."""

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        """A view of ``weight``, or of its gradient, of shape ``(groups, rows of a group, fan_in)``.

        With one group it may be ``(rows, fan_in)``.

        Raises:
            RuntimeError: if the memory layout admits no such view; the caller then works on a contiguous copy.
        """
        return weight.view(rows.groups, -1, rows.fan_in)

    @abstractmethod
    def respond(self, module: nn.Module, input: Tensor, direction: Tensor) -> Tensor:
        """``y = A u``: the layer's output for one weight row per group, ``(samples, groups, positions)``.

        ``direction`` is ``(groups, fan_in)``, without bias.
        """

    @abstractmethod
    def correlate(self, module: nn.Module, input: Tensor, response: Tensor) -> Tensor:
        """``z = Aᵀ y``, the adjoint of :meth:`respond`: ``(groups, fan_in)``."""


_REGISTRY: dict[type[nn.Module], LayerAdapter] = {}


def register_layer(module_type: type[nn.Module], adapter: LayerAdapter) -> None:
    """Teach the preconditioner a layer type; subclasses of ``module_type`` are matched too.

    A later registration for the same type replaces the earlier one. Wrappers that exist already keep what they
    found; call their ``rescan()``.

    Raises:
        TypeError: if ``module_type`` is no ``nn.Module`` class or ``adapter`` no :class:`LayerAdapter`.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if not isinstance(adapter, LayerAdapter):
        raise TypeError(f"adapter must be a LayerAdapter instance, got {adapter!r}")
    _REGISTRY[module_type] = adapter


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter of the nearest registered class of ``module``, or None."""
    for cls in type(module).__mro__:
        found = _REGISTRY.get(cls)
        if found is not None:
            return found
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a dense, real, floating-point tensor with a definite shape."""
    return tensor.layout == torch.strided and tensor.is_floating_point() and not tensor.is_nested
