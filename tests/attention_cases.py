"""``nn.MultiheadAttention`` by hand: what each of its weights multiplies, and BNP of each weight by the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer

Array = NDArray[np.float64]
WIDTH, HEADS, KDIM, VDIM = 4, 2, 3, 6

knows_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch 2.6: out_proj passes through"
)


@dataclass(frozen=True)
class AttentionCase:
    """A way to build and to call the module."""

    kind: str = "self"  # "self" | "cross": other keys, which are the values | "distinct": three inputs | "apart": kdim
    bias: bool = True
    layout: str = "batch_first"  # "batch_first" | "length_first" | "unbatched"
    need_weights: bool = True

    def __str__(self) -> str:
        words = (self.kind, self.layout, "bias" if self.bias else "no_bias", "weights" if self.need_weights else "sdpa")
        return "-".join(words)

    def build(self, **options: Any) -> nn.MultiheadAttention:
        if self.kind == "apart":
            options |= {"kdim": KDIM, "vdim": VDIM}
        attention = nn.MultiheadAttention(
            WIDTH, HEADS, bias=self.bias, batch_first=self.layout == "batch_first", **options
        )
        with torch.no_grad():  # torch's own start has biases of zero
            for p in attention.parameters():
                p.add_(torch.randn(p.shape) / 2)
        return attention

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 query, key and value, (batch, length, channels), exact in float32; the same object where equal."""
        batch = 1 if self.layout == "unbatched" else 2

        def some(length: int, channels: int) -> Tensor:
            x = torch.randn(batch, length, channels, generator=generator) * torch.linspace(1, 3, channels) + 0.5
            return x.double()

        query = some(6, WIDTH)
        if self.kind == "self":
            return query, query, query
        if self.kind == "cross":
            memory = some(5, WIDTH)
            return query, memory, memory
        if self.kind == "distinct":
            return query, some(5, WIDTH), some(5, WIDTH)
        return query, some(5, KDIM), some(5, VDIM)

    def call(self, attention: nn.MultiheadAttention, given: tuple[Tensor, ...], **options: Any) -> Tensor:
        """The output, in the layout of the case; equal inputs stay one object."""
        arranged: dict[int, Tensor] = {}
        for x in given:
            y = x.to(attention.out_proj.weight.dtype)
            if self.layout != "batch_first":
                y = y[0] if self.layout == "unbatched" else y.transpose(0, 1)
            arranged.setdefault(id(x), y)
        query, key, value = (arranged[id(x)] for x in given)
        return attention(query, key, value, need_weights=self.need_weights, **options)[0]


def heads_of(attention: nn.MultiheadAttention, given: tuple[Tensor, ...], mask: Array | float = 0.0) -> Array:
    """What ``out_proj`` multiplies, (batch · length, width): softmax(QKᵀ/√d + mask) V, the heads side by side."""
    own = {name: p.detach().double().numpy() for name, p in attention.named_parameters()}
    if "in_proj_weight" in own:
        weights = np.split(own["in_proj_weight"], 3)
    else:
        weights = [own[f"{x}_proj_weight"] for x in "qkv"]
    biases = np.split(own.get("in_proj_bias", np.zeros(3 * WIDTH)), 3)
    q, k, v = (x.numpy() @ w.T + b for x, w, b in zip(given, weights, biases, strict=True))
    batch, length = q.shape[:2]
    if "bias_k" in own:
        k, v = (np.concatenate([x, np.repeat(own[b], batch, 0)], 1) for x, b in ((k, "bias_k"), (v, "bias_v")))
    if attention.add_zero_attn:
        k, v = (np.concatenate([x, np.zeros_like(x[:, :1])], 1) for x in (k, v))
    q, k, v = (x.reshape(batch, -1, HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(WIDTH // HEADS) + mask
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    heads: Array = (shares @ v).transpose(0, 2, 1, 3).reshape(batch * length, WIDTH)
    return heads


class ByHand:
    """The reference of each weight that is preconditioned."""

    def __init__(self, attention: nn.MultiheadAttention, wrapper: BNPreconditioner, options: dict[str, Any]) -> None:
        bias = attention.in_proj_bias is not None
        self.packed = attention.in_proj_weight is not None
        geometry = {"out_proj.weight": ReferenceLayer("linear", (WIDTH, WIDTH), bias)}
        if self.packed:  # three blocks of rows, as the groups of a convolution with one tap
            geometry["in_proj_weight"] = ReferenceLayer("conv", (3 * WIDTH, WIDTH, 1), bias, groups=3)
        else:
            for x, channels in zip("qkv", (WIDTH, KDIM, VDIM), strict=True):
                geometry[f"{x}_proj_weight"] = ReferenceLayer("linear", (WIDTH, channels), False)
        self.each: dict[str, ReferenceBNP] = {}
        directions = {
            layer.uses[0].part.weight if not layer.uses[0].part.owner else "out_proj.weight": layer
            for layer in wrapper._tracker.layers
        }
        for name, layer in geometry.items():
            extra = {}
            if options.get("step_scale") == "spectral":
                direction = wrapper._tracker.snapshot(directions[name])["direction"].double().numpy()
                extra["direction"] = direction if layer.bias else direction[:, 1:]
            self.each[name] = ReferenceBNP(layer, **options, **extra)

    def observe(self, given: tuple[Tensor, ...], heads: Array) -> None:
        flat = [x.reshape(-1, x.shape[-1]).numpy() for x in given]
        n = len(given[0])  # sequences
        if self.packed:
            # The reference wants as many queries as keys. Several copies of all rows have the mean, the variance
            # and λ̂ of one, so that only N must be told.
            rows = math.lcm(*(len(x) for x in flat))
            reference = self.each["in_proj_weight"]
            before = reference._samples
            reference.observe(np.concatenate([np.tile(x, (rows // len(x), 1)) for x in flat], 1)[:, :, None])
            reference._samples = before + n
        else:
            for x, rows_of in zip("qkv", flat, strict=True):
                self.each[f"{x}_proj_weight"].observe(rows_of, samples=n)
        self.each["out_proj.weight"].observe(heads, samples=n)

    def commit(self) -> None:
        for reference in self.each.values():
            reference.commit()

    def map(self, form: str, gradients: dict[str, Array]) -> dict[str, Array]:
        """``gradient_form``, ``to_z`` or ``from_z`` of everything that belongs to a layer; the rest as it is."""
        mapped = dict(gradients)
        for name, reference in self.each.items():
            bias_name = name.replace("weight", "bias") if reference.layer.bias else None
            weight = gradients[name].reshape(reference.layer.weight_shape)
            g_w, g_b = getattr(reference, form)(weight, None if bias_name is None else gradients[bias_name])
            mapped[name] = g_w.reshape(gradients[name].shape)
            if bias_name is not None:
                mapped[bias_name] = g_b
        return mapped


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


def sequences(steps: int, *, batch: int = 4, length: int = 5, width: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, width, generator=generator) * 2 + 0.5 for _ in range(steps)]


def train(model: nn.Module, optimizer: Any, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        y = model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
        y.square().mean().backward()
        optimizer.step()


def counts(optimizer: BNPreconditioner) -> dict[str, int]:
    return {name: int(s.count) for name, s in optimizer.statistics.items()}
