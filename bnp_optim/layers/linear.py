"""``nn.Linear``: every position of an N-d input is a sample."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from bnp_optim.layers.base import LayerAdapter, Rows, Samples, register_layer


class LinearAdapter(LayerAdapter):
    """``(…, in_features)`` inputs; an unbatched input is one sample."""

    def rows(self, module: nn.Module) -> Rows:
        weight = cast(Tensor, module.weight)
        return Rows(groups=1, channels=weight.shape[1])

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        values = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        return Samples(values, values.shape[0])

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight

    def respond(self, module: nn.Module, input: Tensor, direction: Tensor) -> Tensor:
        return (input.reshape(-1, input.shape[-1]) @ direction[0])[:, None, None]

    def correlate(self, module: nn.Module, input: Tensor, response: Tensor) -> Tensor:
        return (response[:, 0, 0] @ input.reshape(-1, input.shape[-1]))[None]


register_layer(nn.Linear, LinearAdapter())
