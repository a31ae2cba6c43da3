"""``nn.Linear``, and transformers' ``Conv1D``, which is one.

Statistics see every position of an N-d input. ``N`` counts its first dimension only, as it counts the images of a
convolution and the sequences of a recurrent layer: positions of a sequence are not independent samples, and the
gradient's scale does not fall with their number (docs/ablations.md).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from bnp_optim.layers.base import LayerAdapter, Rows, Samples
from bnp_optim.layers.registry import register_by_name, register_layer


class LinearAdapter(LayerAdapter):
    """``(N, …, in_features)`` inputs; an unbatched input is one sample."""

    def rows(self, module: nn.Module) -> Rows:
        weight = cast(Tensor, module.weight)
        return Rows(groups=1, channels=weight.shape[1])

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        values = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        return Samples(values, input.shape[0] if input.dim() > 1 else 1)

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight


class TransposedLinearAdapter(LinearAdapter):
    """A linear layer with its weight stored as (inputs, outputs), called with ``x``."""

    def rows(self, module: nn.Module) -> Rows:
        weight = cast(Tensor, module.weight)
        return Rows(groups=1, channels=weight.shape[0])

    def keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Any, ...] | None:
        return super().keep(module, args or tuple(kwargs.values()), {}, output)

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight.t()


register_layer(nn.Linear, LinearAdapter())
register_by_name("transformers", "Conv1D", TransposedLinearAdapter())
