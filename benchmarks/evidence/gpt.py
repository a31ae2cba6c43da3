"""A character GPT: pre-LN blocks, causal attention, an MLP four times as wide, learned positions, a head of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.corpus import ALPHABET

HEAD_WIDTH = 32


class GPT(nn.Module):
    """Args:
        layers, width: Blocks, and channels (a multiple of HEAD_WIDTH).
        context: The longest input.

    Weights start as torch's layers do: for nn.Linear that is a standard deviation of 1/√(3·width), which at GPT-2's
    width is GPT-2's .02. Not torch's are embeddings (torch's N(0, 1) would drown what the blocks add; .02 as in GPT-2)
    and the layers that end in the residual stream (divided by √(2·layers), so that its variance does not grow with
    depth; also GPT-2's).
    """

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))
        with torch.no_grad():
            for embedding in (self.characters, self.positions):
                embedding.weight.mul_(0.02)
            for block in self.blocks:
                for layer in (block.attention.out, block.mlp[2]):
                    layer.weight.div_((2 * layers) ** 0.5)
                    layer.bias.div_((2 * layers) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of each next character (batch, length, characters), from ids (batch, length)."""
        x = self.characters(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Projections are layers of their own, and not one packed matrix, as Muon and SOAP want them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats per character of predicting each character of ``windows`` (batch, context + 1) but the first."""
    windows = windows.long()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
