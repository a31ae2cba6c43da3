"""The digits and two small networks, with or without BatchNorm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

TRAIN_SAMPLES = 1280  # divisible by all batch sizes: BatchNorm never sees a remainder


class Digits(NamedTuple):
    """Images (samples × 1 × 8 × 8, in [0, 1]) and labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Digits:
    """scikit-learn's 1,797 digits in a fixed stratified split: 1,280 to train, 517 to test."""
    data = load_digits()
    parts = train_test_split(
        data.images / 16, data.target, train_size=TRAIN_SAMPLES, stratify=data.target, random_state=0
    )
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).unsqueeze(1) for x in parts[:2])
    train_y, test_y = (torch.tensor(y) for y in parts[2:])
    return Digits(train_x, train_y, test_x, test_y)


def mlp(batch_norm: bool = False) -> nn.Sequential:
    """64-100-100-100-10."""
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in in (64, 100, 100):
        layers += [nn.Linear(n_in, 100), nn.BatchNorm1d(100) if batch_norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def cnn(batch_norm: bool = False) -> nn.Sequential:
    """Two 3×3 convolutions with 16 and 32 channels, each halving the image, and a linear layer."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 16), (16, 32)):
        norm = nn.BatchNorm2d(n_out) if batch_norm else nn.Identity()
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))
