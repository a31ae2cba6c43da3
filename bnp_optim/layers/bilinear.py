"""``nn.Bilinear``: a linear layer on the outer product of its two inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from bnp_optim.layers.base import ModuleAdapter, Part, Rows, Samples
from bnp_optim.layers.registry import register_layer


class BilinearAdapter(ModuleAdapter):
    """``(…, in1_features)`` and ``(…, in2_features)`` inputs; N is the first dimension."""

    def parts(self, module: nn.Module) -> Sequence[Part]:
        bilinear = cast(nn.Bilinear, module)
        return (Part(Rows(groups=1, channels=bilinear.in1_features * bilinear.in2_features)),)

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        inputs = (*args, *(kwargs[name] for name in ("input1", "input2") if name in kwargs))
        return inputs if len(inputs) == 2 else None

    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        first, second = (x.reshape(-1, x.shape[-1]) for x in kept)
        values = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        return (Samples(values, kept[0].shape[0] if kept[0].dim() > 1 else 1),)


register_layer(nn.Bilinear, BilinearAdapter())
