"""The workloads of --device cuda: ResNet-50, ViT-B/16 and GPT-2 124M, in plain torch, trained under bf16 autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Batch, Norm, TransformerBlock, Workload, classified, conv, norm2d

VOCABULARY, CONTEXT = 50257, 1024


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride) and 1 × 1 convolutions, the last four times as wide, and a shortcut."""

    def __init__(self, n_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        n_out = 4 * width
        self.conv1, self.norm1 = conv(n_in, width, 1, norm), norm2d(width, norm)
        self.conv2, self.norm2 = conv(width, width, 3, norm, stride), norm2d(width, norm)
        self.conv3, self.norm3 = conv(width, n_out, 1, norm), norm2d(n_out, norm)
        self.shortcut = nn.Sequential()
        if n_in != n_out:
            self.shortcut = nn.Sequential(conv(n_in, n_out, 1, norm, stride), norm2d(n_out, norm))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def resnet50(norm: Norm) -> nn.Sequential:
    """For 224 × 224 images and 1000 classes."""
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(conv(3, 64, 7, norm, 2), norm2d(64, norm), nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
    n_in = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            net.add_module(f"stage{stage + 1}_{block + 1}", Bottleneck(n_in, width, stride, norm))
            n_in = 4 * width
    net.add_module("average", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(n_in, 1000))
    return net


class VisionTransformer(nn.Module):
    """ViT-B/16 for 224 × 224 images and 1000 classes."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 14 * 14 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT2(nn.Module):
    """GPT-2 124M; the head shares its weight with the token embedding."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def _text(batch: int) -> Batch:
    return torch.randint(VOCABULARY, (batch, CONTEXT)), torch.randint(VOCABULARY, (batch, CONTEXT))


def _next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


_IMAGES = classified(3, 224, 224, classes=1000)

GPU_WORKLOADS = {
    work.name: work
    for work in (
        Workload("resnet50", (64,), resnet50, _IMAGES, F.cross_entropy, norms=("none", "bn"), gpu=True),
        Workload(
            "vit-b", (64,), lambda _: VisionTransformer(), _IMAGES, F.cross_entropy, norms=("none",), gpu=True
        ),
        Workload(
            "gpt2-124m", (8,), lambda _: GPT2(), _text, _next_token_loss,
            norms=("none",), loss_average="batch+sequence", gpu=True,
        ),
    )
}  # fmt: skip
