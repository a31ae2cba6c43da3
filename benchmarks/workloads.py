"""What is trained in the overhead benchmark: nets in plain torch, with fixed inputs and a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.online_norm import OnlineNorm

Norm = Literal["none", "bn", "ln", "gn", "on"]
OWN_BIAS = ("bn", "on")  # after a layer these take its mean away, so its bias stays away
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A net at some batch sizes.

    Args:
        build: The net with a normalization after every hidden layer: "none", "bn" (BatchNorm), "ln" (LayerNorm;
            GroupNorm(1, C) in convolutional nets), "gn" (GroupNorm) or "on" (Online Normalization).
        data: Inputs and targets of a batch of that many samples.
        loss: A mean over the batch (and over positions where there are any).
        norms: The normalizations that make sense.
        loss_average: What the loss is a mean over, in singd's words.
        slow: Left out by --quick.
        gpu: Runs with --device cuda only.
    """

    name: str
    batch_sizes: tuple[int, ...]
    build: Callable[[Norm], nn.Module]
    data: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    norms: tuple[Norm, ...] = ("none", "bn", "ln")
    loss_average: Literal["batch", "batch+sequence"] = "batch"
    slow: bool = False
    gpu: bool = False


def mlp(widths: Sequence[int], norm: Norm) -> nn.Sequential:
    """Linear, norm, ReLU for each hidden layer; a plain Linear at the end, called ``head``."""
    net = nn.Sequential()
    for i, (n_in, n_out) in enumerate(pairwise(widths[:-1]), start=1):
        net.add_module(f"fc{i}", nn.Linear(n_in, n_out, bias=norm not in OWN_BIAS))
        if norm != "none":
            net.add_module(f"norm{i}", norm1d(n_out, norm))
        net.add_module(f"relu{i}", nn.ReLU())
    net.add_module("head", nn.Linear(widths[-2], widths[-1]))
    return net


def norm1d(channels: int, norm: Norm) -> nn.Module:
    """The normalization of ``channels``; groups are ten channels wide, or eight."""
    if norm == "on":
        return OnlineNorm(channels)
    if norm == "gn":
        return nn.GroupNorm(channels // (8 if channels % 8 == 0 else 10), channels)
    return nn.BatchNorm1d(channels) if norm == "bn" else nn.LayerNorm(channels)


def norm2d(channels: int, norm: Norm) -> nn.Module:
    """The normalization of ``channels`` × height × width; groups are eight channels wide."""
    if norm == "none":
        return nn.Identity()
    if norm == "on":
        return OnlineNorm(channels)
    if norm == "gn":
        return nn.GroupNorm(channels // 8, channels)
    return nn.BatchNorm2d(channels) if norm == "bn" else nn.GroupNorm(1, channels)


def conv(n_in: int, n_out: int, size: int, norm: Norm, stride: int = 1) -> nn.Conv2d:
    """A zero-padded convolution; its bias stays away where the norm's takes its place."""
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=norm not in OWN_BIAS)


def cnn(norm: Norm) -> nn.Sequential:
    """Five 3 × 3 convolutions on 3 × 32 × 32, max-pooling after the second and the fourth, global average."""
    net = nn.Sequential()
    widths = (3, 16, 16, 32, 32, 64)
    for i, (n_in, n_out) in enumerate(pairwise(widths), start=1):
        net.add_module(f"conv{i}", conv(n_in, n_out, 3, norm))
        if norm != "none":
            net.add_module(f"norm{i}", norm2d(n_out, norm))
        net.add_module(f"relu{i}", nn.ReLU())
        if i in (2, 4):
            net.add_module(f"pool{i}", nn.MaxPool2d(2))
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(widths[-1], 10))
    return net


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, which is a 1 × 1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(n_in, n_out, 3, norm, stride), norm2d(n_out, norm)
        self.conv2, self.norm2 = conv(n_out, n_out, 3, norm), norm2d(n_out, norm)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(conv(n_in, n_out, 1, norm, stride), norm2d(n_out, norm))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(norm: Norm) -> nn.Sequential:
    """The ResNet-18 of 32 × 32 images: a 3 × 3 stem without pooling, four stages of two blocks."""
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(conv(3, 64, 3, norm), norm2d(64, norm), nn.ReLU()))
    n_in = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            net.add_module(f"stage{stage + 1}_{block + 1}", BasicBlock(n_in, width, stride, norm))
            n_in = width
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(n_in, 10))
    return net


class RowClassifier(nn.Module):
    """An LSTM that reads an image row by row, and a linear layer on its last output, which may be normalized before.

    Args:
        norm: "none" or "ln".
    """

    def __init__(self, columns: int, units: int, classes: int, norm: Norm = "none") -> None:
        super().__init__()
        if norm not in ("none", "ln"):
            raise ValueError(f"norm is {norm!r}: a recurrent net takes 'none' or 'ln'")
        self.rnn = nn.LSTM(columns, units, batch_first=True)
        self.norm = nn.LayerNorm(units) if norm == "ln" else nn.Identity()
        self.head = nn.Linear(units, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        outputs, _ = self.rnn(pixels.unflatten(1, (-1, self.rnn.input_size)))
        scores: Tensor = self.head(self.norm(outputs[:, -1]))
        return scores


class TransformerBlock(nn.Module):
    """The pre-LayerNorm block of GPT-2 (``causal``) or of a vision transformer."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = nn.GELU(approximate="tanh" if causal else "none")

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.attention_proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.proj(self.gelu(self.fc(self.norm2(x))))


def classified(*shape: int, classes: int = 10) -> Callable[[int], Batch]:
    """Normal inputs of that shape per sample, and random labels."""
    return lambda batch: (torch.randn(batch, *shape), torch.randint(classes, (batch,)))


def _tokens(batch: int) -> Batch:
    return torch.randn(batch, 128, 768), torch.randn(batch, 128, 768)


CPU_WORKLOADS = {
    work.name: work
    for work in (
        Workload(
            "mlp-64", (1, 64), lambda norm: mlp((64, 64, 64, 64, 64, 10), norm), classified(64), F.cross_entropy
        ),
        Workload(
            "mlp-1024", (1, 60, 256), lambda norm: mlp((784, 1024, 1024, 1024, 10), norm), classified(784),
            F.cross_entropy,
        ),
        Workload("cnn", (2, 32, 128), cnn, classified(3, 32, 32), F.cross_entropy),
        Workload("resnet18", (64,), resnet18, classified(3, 32, 32), F.cross_entropy, slow=True),
        Workload(
            "gpt-block", (8,), lambda _: TransformerBlock(768, 12, causal=True), _tokens, F.mse_loss,
            norms=("none",), loss_average="batch+sequence",
        ),
    )
}  # fmt: skip
