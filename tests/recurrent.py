"""A small recurrent classifier, and what it is trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """The last output of an LSTM (or another) through a linear layer."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x)[0][-1])


def classifier(layers: int = 2, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Classifier(kind(3, 4, layers, **options))


def sequences(steps: int = 6, batch: int = 5, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(steps, batch, 3, generator=torch.Generator().manual_seed(seed)).to(dtype) + 0.5


def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
