"""What is learned: data, a net, and how much of the data at which batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data import DataMissingError, Split, load_mnist
from benchmarks.workloads import BasicBlock, Norm, RowClassifier, cnn, mlp, norm2d


@dataclass(frozen=True)
class Task:
    """A classification.

    Args:
        load: Its data, given ``--data-dir``.
        build: The net; the last layer is called ``head``.
        samples: Seen in all, by batch size, in the full protocol.
        test, curve: How many test images the final accuracy is on, and the points of the curve.
        prepare: From what is stored to what the net takes, batch by batch.
        chance: What a diverged run scores.
    """

    name: str
    title: str
    load: Callable[[Path], Split]
    build: Callable[[Norm], nn.Module]
    samples: Mapping[int, int]
    test: int = 10_000
    curve: int = 1_000
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    chance: float = 0.1


def _mnist(data_dir: Path, *, folder: str, standardize: bool = False) -> Split:
    split = load_mnist(data_dir, folder)
    if not standardize:
        return split
    std, mean = torch.std_mean(split.train_x, 0)
    return split._replace(
        train_x=(split.train_x - mean) / (std + 1e-2), test_x=(split.test_x - mean) / (std + 1e-2)
    )  # a pixel that is always black stays where it is


def _digits(_: Path) -> Split:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images, labels = torch.from_numpy(x[order] / 16).float(), torch.from_numpy(y[order]).long()
    return Split(images[:1300], labels[:1300], images[1300:], labels[1300:])


def _cifar10(data_dir: Path) -> Split:
    path = data_dir / "cifar10" / "cifar10.npz"
    if not path.is_file():
        raise DataMissingError(f"{path} is missing: point --data-dir at the folder that holds cifar10/cifar10.npz")
    raw = np.load(path)

    def images(name: str) -> Tensor:  # in memory channels stay last, which convolutions on CPUs like
        return torch.from_numpy(raw[name]).permute(0, 3, 1, 2)

    def labels(name: str) -> Tensor:
        return torch.from_numpy(raw[name]).long()

    return Split(images("x_train"), labels("y_train"), images("x_test"), labels("y_test"))


_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
_STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


def _standardized(x: Tensor) -> Tensor:
    return x.float().div_(255).sub_(_MEAN).div_(_STD)


def resnet8(norm: Norm) -> nn.Sequential:
    """A stem and three stages of one block, 16-32-64 channels."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm2d(16, norm), nn.ReLU())
    n_in = 16
    for stage, width in enumerate((16, 32, 64)):
        net.append(BasicBlock(n_in, width, 2 if stage else 1, norm))
        n_in = width
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    net.add_module("head", nn.Linear(n_in, 10))
    return net


_MLP: Callable[[Norm], nn.Module] = partial(mlp, (784, 100, 100, 100, 10))
_ONE_PASS = {1: 15_000, 4: 60_000, 16: 60_000, 64: 60_000, 256: 60_000}
_IMAGES = {1: 10_000, 4: 20_000, 16: 40_000, 64: 40_000, 256: 40_000}
_SEQUENCES = {1: 5_000, 4: 20_000, 16: 60_000, 64: 60_000, 256: 60_000}
TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("mnist", "MNIST, MLP 784-100³-10, pixels / 255", partial(_mnist, folder="mnist"), _MLP, _ONE_PASS),
        Task(
            "fashion", "Fashion-MNIST, MLP 784-100³-10, pixels / 255", partial(_mnist, folder="fashion-mnist"), _MLP,
            _ONE_PASS,
        ),
        Task(
            "fashion-scaled", "Fashion-MNIST, MLP 784-100³-10, standardized pixels",
            partial(_mnist, folder="fashion-mnist", standardize=True), _MLP, _ONE_PASS,
        ),
        Task(
            "digits", "scikit-learn's digits, MLP 64-100³-10, pixels / 16", _digits,
            partial(mlp, (64, 100, 100, 100, 10)), {1: 5_200, 4: 5_200, 16: 13_000, 64: 13_000, 256: 13_000},
            test=497, curve=497,
        ),
        Task(
            "cifar", "CIFAR-10, five convolutions 16-16-32-32-64", _cifar10, cnn, _IMAGES, test=2_000, curve=250,
            prepare=_standardized,
        ),
        Task(
            "resnet", "CIFAR-10, ResNet-8 16-32-64", _cifar10, resnet8, _IMAGES, test=2_000, curve=250,
            prepare=_standardized,
        ),
        Task(
            "sequential", "MNIST row by row, LSTM of 128 units, pixels / 255", partial(_mnist, folder="mnist"),
            lambda norm: RowClassifier(28, 128, 10, norm), _SEQUENCES,
        ),
    )
}  # fmt: skip
