"""``nn.ConvTranspose1d/2d/3d``: a row is an output channel, and most taps of its kernel see zeros.

A transposed convolution is a convolution of its input with zeros in between (stride - 1 of them) and around. So at
an output position a tap sees an input at a share of about 1/stride per dimension, its *occupancy*, and a zero
otherwise. Statistics are those of what the taps see, from the input's own: mean o·μ, variance o(σ² + μ²) - o²μ².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_optim.layers.base import LayerAdapter, Rows, Samples
from bnp_optim.layers.conv import batched
from bnp_optim.layers.registry import register_layer

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_Transposed = nn.modules.conv._ConvTransposeNd


class TransposedConvAdapter(LayerAdapter):
    """``(N, C, *spatial)`` inputs, or ``(C, *spatial)`` as one sample; every tap of a channel has its statistics."""

    def rows(self, module: nn.Module) -> Rows:
        conv = cast(_Transposed, module)
        return Rows(groups=conv.groups, channels=conv.in_channels // conv.groups * prod(conv.kernel_size))

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        kept = super().keep(module, args, kwargs, output)
        dims = len(cast(_Transposed, module).kernel_size)
        return kept if kept is None else (*kept, output.shape[-dims:])  # the caller may have chosen it

    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        samples = self.samples(module, kept[0])
        return (samples._replace(occupancy=_occupancy(cast(_Transposed, module), kept[0], kept[1])),)

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        values = batched(module, input)
        return Samples(values, values.shape[0])

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        # stored as (inputs, rows, taps)
        return weight.view(rows.groups, -1, weight.shape[1], prod(weight.shape[2:])).transpose(1, 2)

    def respond(self, module: nn.Module, values: Tensor, direction: Tensor) -> Tensor:
        conv = cast(_Transposed, module)
        y = _TRANSPOSED[len(conv.kernel_size)](
            values,
            direction.reshape(conv.in_channels, 1, *conv.kernel_size),
            None,
            conv.stride,
            cast("tuple[int, ...]", conv.padding),
            conv.output_padding,
            conv.groups,
            conv.dilation,
        )
        return y.flatten(2)

    def correlate(self, module: nn.Module, values: Tensor, response: Tensor) -> Tensor:
        conv = cast(_Transposed, module)
        kernel = values.new_empty(conv.in_channels, 1, *conv.kernel_size)
        spatial = _output_size(conv, values)
        z = torch.ops.aten.convolution_backward(
            response.reshape(*response.shape[:2], *spatial),
            values,
            kernel,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            True,
            conv.output_padding,
            conv.groups,
            (False, True, False),
        )[1]
        return cast(Tensor, z).reshape(conv.groups, -1)


def _output_size(conv: _Transposed, values: Tensor) -> list[int]:
    geometry = zip(
        values.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.output_padding, conv.dilation, strict=True
    )
    return [
        (size - 1) * stride - 2 * cast(int, pad) + dilation * (kernel - 1) + extra + 1
        for size, kernel, stride, pad, extra, dilation in geometry
    ]


def _occupancy(conv: _Transposed, input: Tensor, output_size: Sequence[int]) -> Tensor:
    """The shares of output positions at which the taps see an input, (taps,)."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    shares = torch.ones(1, device=input.device, dtype=dtype)
    sizes = input.shape[-len(output_size) :]
    geometry = zip(sizes, output_size, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    for size, out, kernel, stride, padding, dilation in geometry:
        # input i reaches output i · stride + reach
        reach = torch.arange(kernel, device=input.device) * dilation - cast(int, padding)
        first = torch.div(stride - 1 - reach, stride, rounding_mode="floor").clamp(min=0)
        last = torch.div(out - 1 - reach, stride, rounding_mode="floor").clamp(max=size - 1)
        share = (last - first + 1).clamp(min=0).to(dtype) / out
        shares = (shares.unsqueeze(1) * share).flatten()
    return shares


_adapter = TransposedConvAdapter()
for _type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_type, _adapter)
