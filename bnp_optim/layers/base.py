"""What the preconditioner must know of a layer type.

A weight is seen as ``groups`` blocks of rows; each row of a block multiplies the same inputs,
``channels * taps`` of them. A ``Linear`` is one block with one tap; a grouped convolution has one block per
group and one tap per kernel position. Statistics live on the ``groups * channels`` input channels; all taps of
a channel share them.

:class:`LayerAdapter` is for modules with one weight and one input, :class:`ModuleAdapter` for all others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LayerAdapter", "ModuleAdapter", "Part", "Rows", "Samples", "is_readable"]


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


@dataclass(frozen=True)
class Part:
    """One weight of a module: its geometry, and where it is.

    Args:
        rows: Its geometry.
        weight: Name of the parameter.
        bias: Name of the bias that is added to its product; None if that is no parameter of its own.
        owner: The child module that holds both; "" for the module itself.
    """

    rows: Rows
    weight: str = "weight"
    bias: str | None = "bias"
    owner: str = ""

    @property
    def label(self) -> str:
        """What tells it from the module's other weights: the parameter's name without the word "weight"."""
        words = [word for word in self.weight.split("_") if word != "weight"]
        return ".".join(filter(None, (self.owner, "_".join(words))))

    def find(self, module: nn.Module, name: str | None) -> Tensor | None:
        """The parameter ``name`` (``weight`` or ``bias``) of this part, or None."""
        holder = module._modules.get(self.owner) if self.owner else module
        return None if holder is None or name is None else holder._parameters.get(name)


class Samples(NamedTuple):
    """A layer's input as the statistics read it.

    Args:
        values: Tensor with the observations in dimension 0, the input channels in dimension 1, and any further
            dimensions (positions) behind them; or one such tensor per group, each with the channels of its group.
        size: ``N``, the samples that the mini-batch holds for ``q² = max(·/N, 1)``.
        occupancy: The shares of output positions at which the taps see an input and not a zero, (taps,). With it
            ``values`` has channels without taps, and every tap becomes a channel of the statistics: the part's
            ``Rows`` count ``channels × taps`` channels of one tap.
    """

    values: Tensor | tuple[Tensor, ...]
    size: int
    occupancy: Tensor | None = None


class ModuleAdapter(ABC):
    """How one family of modules maps onto rows × inputs. Stateless; one instance serves every module."""

    uses_weights: bool = False  # whether read() does, which FSDP has taken away by the time of the backward pass

    @abstractmethod
    def parts(self, module: nn.Module) -> Sequence[Part]:
        """The weights of ``module`` that multiply inputs which can be had, and their geometry."""

    @abstractmethod
    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        """What of a forward call :meth:`read` will need, or None if the call cannot be read.

        Called in the forward pass; it should do nothing but pick tensors that autograd keeps anyway. They are
        detached before they are read, which is later, in the backward pass.
        """

    @abstractmethod
    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        """The inputs of the :meth:`parts`, in their order; None for a part that this call says nothing of."""

    def reason(self, module: nn.Module, name: str) -> str | None:
        """Why the parameter ``name`` of ``module``, which is in none of the :meth:`parts`, passes through."""
        return None

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        """A view of ``weight``, or of its gradient, of shape ``(groups, rows of a group, fan_in)``.

        With one group it may be ``(rows, fan_in)``; where the inputs cannot be one dimension of a view, two may stand
        for it, ``(groups, rows of a group, channels, taps)``, which costs a copy.

        Raises:
            RuntimeError: if the memory layout admits no such view; the caller then works on a contiguous copy.
        """
        return weight.view(rows.groups, -1, rows.fan_in)

    def respond(self, module: nn.Module, values: Tensor, direction: Tensor) -> Tensor:
        """``y = A u``: the layer's output for one weight row per group, ``(samples, groups, positions)``.

        For ``step_scale="spectral"``. As it stands it serves dense layers, whose ``values`` are observations ×
        channels.

        Args:
            module: The module.
            values: As in :class:`Samples`.
            direction: ``u``, (groups, fan_in), without bias.
        """
        return (values @ direction[0])[:, None, None]

    def correlate(self, module: nn.Module, values: Tensor, response: Tensor) -> Tensor:
        """``z = Aᵀ y``, the adjoint of :meth:`respond`: ``(groups, fan_in)``."""
        return (response[:, 0, 0] @ values)[None]


class LayerAdapter(ModuleAdapter):
    """A family of modules with one weight, perhaps a bias, and one input tensor.

    Subclasses say how the weight splits into rows (:meth:`rows`) and how the input is read (:meth:`samples`).
    """

    weight_name: str = "weight"
    bias_name: str = "bias"

    @abstractmethod
    def rows(self, module: nn.Module) -> Rows:
        """The geometry of ``module``'s weight."""

    @abstractmethod
    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        """``input`` (what the module was called with, detached) as observations × channels (× positions)."""

    def parts(self, module: nn.Module) -> Sequence[Part]:
        return (Part(self.rows(module), self.weight_name, self.bias_name),)

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        input = args[0] if args else kwargs.get("input")
        return (input,) if isinstance(input, Tensor) else None

    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        return (self.samples(module, kept[0]),)


def is_readable(kept: tuple[Any, ...]) -> bool:
    """Whether the tensors among what was kept of a call are dense, real and of a definite shape."""
    for x in kept:
        if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_nested or x.is_complex()):
            return False
    return True
