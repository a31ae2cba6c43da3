"""The net of the paper's claims: deep ReLU MLPs with He initialization, and labels that are noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def deep_net(norm: bool, *, depth: int = 30, width: int = 100, classes: int = 10) -> nn.Sequential:
    """``depth`` ReLU layers, then logits; He initialization, biases zero."""
    net = nn.Sequential()
    for i in range(depth + 1):
        linear = nn.Linear(width, classes if i == depth else width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        net.append(linear)
        if i < depth:
            net.extend([nn.BatchNorm1d(width), nn.ReLU()] if norm else [nn.ReLU()])
    return net


def noise(width: int = 100, classes: int = 10, batch: int = 128) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width), torch.randint(classes, (batch,))


def closure(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y))
