"""Layers that the numeric tests multiply with options: name → how to build it, its input, its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.reference.numpy_bnp import ReferenceLayer


@dataclass(frozen=True)
class LayerCase:
    """A layer, and the shape of one batch of inputs: ``shape(n)`` for n samples."""

    name: str
    build: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]]

    def inputs(self, n: int, ratio: float, generator: torch.Generator, step: int) -> Tensor:
        """Float64 inputs of which every channel has |mean|/std of at most ``ratio``, in different scales and signs.

        Deviations alternate in sign from sample to sample and have a size between 1 and 2, so that the *running*
        ratio keeps the bound too: two close samples at batch size 1 would be a ratio of thousands. The values are
        exact in float32, so that both precisions see the same samples.
        """
        shape = self.shape(n)
        channel_dim = len(shape) - 1 - self.spatial
        channels = shape[channel_dim]
        view = [channels if d == channel_dim else 1 for d in range(len(shape))]
        scale = torch.logspace(-0.5, 0.5, channels, dtype=torch.float64).view(view)
        mean_sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(channels)[:channels].view(view)
        size = 1 + torch.rand(shape, generator=generator, dtype=torch.float64)
        phase = torch.full(shape, step, dtype=torch.int64)
        for dim in range(len(shape)):
            along = [-1 if d == dim else 1 for d in range(len(shape))]
            if dim != channel_dim:
                phase += torch.arange(shape[dim]).view(along)
        phase += torch.randint(2, view, generator=torch.Generator().manual_seed(3))
        deviation = size * (1 - 2 * (phase % 2))
        return ((deviation + ratio * mean_sign) * scale).float().double()

    @property
    def spatial(self) -> int:
        kernel = getattr(self.build(), "kernel_size", ())
        return len(kernel)

    def reference_layer(self) -> ReferenceLayer:
        layer = self.build()
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            return ReferenceLayer("linear", tuple(layer.weight.shape), bias)
        dims = len(layer.kernel_size)
        padding = layer.padding
        if padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        elif padding == "valid":
            padding = (0,) * dims
        return ReferenceLayer(
            "transposed" if layer.transposed else "conv",
            tuple(layer.weight.shape),
            bias,
            groups=layer.groups,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
            output_padding=layer.output_padding,
        )


def _case(name: str, build: Callable[[], nn.Module], *tail: int, lead: tuple[int, ...] | None = None) -> LayerCase:
    """``lead`` None: one batch dimension; () an unbatched input; (t,) t positions per sample."""

    def shape(n: int) -> tuple[int, ...]:
        return (n, *tail) if lead is None else (() if lead == () else (n, *lead)) + tail

    return LayerCase(name, build, shape)


LAYERS = [
    _case("linear", lambda: nn.Linear(5, 3), 5),
    _case("linear-no-bias", lambda: nn.Linear(5, 3, bias=False), 5),
    _case("linear-3d", lambda: nn.Linear(4, 3), 4, lead=(3,)),
    _case("linear-unbatched", lambda: nn.Linear(4, 3), 4, lead=()),
    _case("conv1d-stride", lambda: nn.Conv1d(3, 4, 3, stride=2), 3, 9),
    _case("conv2d", lambda: nn.Conv2d(3, 4, 3, padding=1), 3, 5, 4),
    _case("conv2d-no-bias", lambda: nn.Conv2d(3, 4, 3, bias=False), 3, 5, 4),
    _case("conv2d-grouped", lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding=(1, 0)), 4, 4, 5),
    _case("conv2d-depthwise-no-bias", lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False, padding=2), 3, 4, 4),
    _case("conv2d-dilated-same", lambda: nn.Conv2d(2, 3, 3, dilation=2, padding="same"), 2, 5, 6),
    _case("conv2d-reflect", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2, 4, 4),
    _case("conv2d-replicate-stride", lambda: nn.Conv2d(2, 3, 3, 2, padding=1, padding_mode="replicate"), 2, 5, 5),
    _case("conv1d-circular", lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), 2, 6),
    _case("conv2d-unbatched", lambda: nn.Conv2d(2, 3, 2), 2, 4, 4, lead=()),
    _case("conv3d", lambda: nn.Conv3d(2, 3, 2, padding=1), 2, 3, 3, 2),
    _case("transposed1d-stride", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), 3, 5),
    _case("transposed2d", lambda: nn.ConvTranspose2d(2, 3, (3, 2), 2, (1, 0), (1, 0), dilation=(1, 2)), 2, 4, 3),
    _case("transposed2d-grouped-no-bias", lambda: nn.ConvTranspose2d(4, 6, 2, 3, groups=2, bias=False), 4, 2, 3),
    _case("transposed3d-unbatched", lambda: nn.ConvTranspose3d(2, 2, 2, 2, padding=1), 2, 2, 3, 2, lead=()),
    _case("conv3d-valid-grouped", lambda: nn.Conv3d(2, 2, (1, 2, 2), groups=2, padding="valid"), 2, 3, 3, 3),
]
