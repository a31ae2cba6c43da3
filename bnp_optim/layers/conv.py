"""``nn.Conv1d/2d/3d``: statistics per input channel over batch and positions, shared by the kernel's taps.

``N`` is the number of samples, not of samples × positions (reference method, point 7). Padded zeros are not
counted: the statistics are those of the unpadded input.
"""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_optim.layers.base import LayerAdapter, Rows, Samples
from bnp_optim.layers.registry import register_layer

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvAdapter(LayerAdapter):
    """``(N, C, *spatial)`` inputs, or ``(C, *spatial)`` as one sample; any groups, stride, dilation, padding."""

    def rows(self, module: nn.Module) -> Rows:
        weight = cast(Tensor, module.weight)
        return Rows(groups=cast(int, module.groups), channels=weight.shape[1], taps=prod(weight.shape[2:]))

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        values = batched(module, input)
        return Samples(values, values.shape[0])

    def respond(self, module: nn.Module, values: Tensor, direction: Tensor) -> Tensor:
        conv = cast("nn.modules.conv._ConvNd", module)
        kernel = direction.view(conv.groups, -1, *conv.kernel_size)
        input, padding = _padded(conv, values)
        apply = _CONV[len(conv.kernel_size)]
        y = apply(input, kernel, None, conv.stride, padding, conv.dilation, conv.groups)
        return y.flatten(2)

    def correlate(self, module: nn.Module, values: Tensor, response: Tensor) -> Tensor:
        conv = cast("nn.modules.conv._ConvNd", module)
        input, padding = _padded(conv, values)
        spatial = tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                input.shape[2:], padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        )
        kernel = input.new_empty(conv.groups, conv.in_channels // conv.groups, *conv.kernel_size)
        z = torch.ops.aten.convolution_backward(
            response.reshape(*response.shape[:2], *spatial),
            input,
            kernel,
            None,
            conv.stride,
            padding,
            conv.dilation,
            False,
            [0] * len(spatial),
            conv.groups,
            (False, True, False),
        )[1]
        return cast(Tensor, z).reshape(conv.groups, -1)


def batched(module: nn.Module, input: Tensor) -> Tensor:
    """``input`` with a batch dimension."""
    spatial = len(cast("nn.modules.conv._ConvNd", module).kernel_size)
    return input.unsqueeze(0) if input.dim() == spatial + 1 else input


def _padded(conv: nn.modules.conv._ConvNd, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that the convolution itself cannot do, and the rest of it."""
    if conv.padding_mode != "zeros":
        pad = conv._reversed_padding_repeated_twice
        return F.pad(input, pad, mode=conv.padding_mode), (0,) * len(conv.kernel_size)
    if isinstance(conv.padding, str):  # "valid", or "same", which may pad one side more than the other
        return F.pad(input, conv._reversed_padding_repeated_twice), (0,) * len(conv.kernel_size)
    return input, conv.padding


_adapter = ConvAdapter()
for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_type, _adapter)
