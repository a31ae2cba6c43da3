"""The two lines that change: SGD and AdamW with and without BNP on scikit-learn's digits; seconds on a CPU.

    python examples/plain_loop.py                    # batch size 8
    python examples/plain_loop.py --batch-size 1     # where batch normalization cannot train

Needs scikit-learn and tqdm. One seed and one rate for each optimizer: what it shows is how, not how much.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from bnp_optim import BNPreconditioner  # changed line 1

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
}


def digits() -> tuple[Tensor, ...]:
    """Images (samples, 64) in [0, 1] and labels: 1,280 to train, 517 to test."""
    data = load_digits()
    parts = train_test_split(data.data / 16, data.target, train_size=1280, stratify=data.target, random_state=0)
    x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, test_y = (torch.tensor(part) for part in parts[2:])
    return x, y, test_x, test_y


def train(base: str, bnp: bool, *, batch_size: int, epochs: int, steps: int | None) -> float:
    """Test accuracy after the epochs, or after that many steps."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = BASES[base](model.parameters())
    if bnp:
        optimizer = BNPreconditioner(optimizer, model)  # changed line 2

    order = torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).split(batch_size)[:steps]
    for batch in tqdm(order, desc=f"{'BNP-' if bnp else ''}{base}", leave=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, help="stop after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small run no faster on more
    print(f"{'test accuracy':14s} {'base':>6s} {'BNP':>6s}")
    for base in BASES:
        plain, bnp = (train(base, bnp, **vars(options)) for bnp in (False, True))
        print(f"{base:14s} {plain:6.3f} {bnp:6.3f}")


if __name__ == "__main__":
    main()
