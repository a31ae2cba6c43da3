"""MNIST and Fashion-MNIST from their four idx files, as tensors."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_FILES = {
    "train_x": ("train-images-idx3-ubyte.gz", 2051, 16),
    "train_y": ("train-labels-idx1-ubyte.gz", 2049, 8),
    "test_x": ("t10k-images-idx3-ubyte.gz", 2051, 16),
    "test_y": ("t10k-labels-idx1-ubyte.gz", 2049, 8),
}


class DataMissingError(FileNotFoundError):
    """A data file is not where the user said."""


class Split(NamedTuple):
    """Images (samples × pixels, float32 in [0, 1]) and labels (int64) for training and testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def check_mnist(data_dir: Path, folder: str = "mnist") -> None:
    """Raise DataMissingError, in one sentence, unless the four files are in ``data_dir/mnist``."""
    missing = [name for name, _, _ in _FILES.values() if not (data_dir / folder / name).is_file()]
    if missing:
        kind = "FashionMNIST" if folder == "fashion-mnist" else "MNIST"
        raise DataMissingError(
            f"{data_dir / folder} lacks {', '.join(missing)}: point --data-dir at the folder that holds "
            f"{folder}/ with the four original .gz files (torchvision.datasets.{kind} downloads the same ones)"
        )


def load_mnist(data_dir: Path, folder: str = "mnist") -> Split:
    """The whole of MNIST, or of another set in its format; pixels are divided by 255 and not standardized further.

    Raises:
        DataMissingError: if a file is missing.
        ValueError: if a file is no idx file of the expected kind.
    """
    check_mnist(data_dir, folder)
    raw = {key: _read_idx(data_dir / folder / name, magic, skip) for key, (name, magic, skip) in _FILES.items()}
    return Split(
        _images(raw["train_x"]), torch.from_numpy(raw["train_y"]).long(),
        _images(raw["test_x"]), torch.from_numpy(raw["test_y"]).long(),
    )  # fmt: skip


def _read_idx(path: Path, magic: int, header: int) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise ValueError(f"{path.name} begins with {found}, not {magic}: it is no idx file of this kind")
    count = int.from_bytes(content[4:8], "big")
    return np.frombuffer(content, np.uint8, offset=header).reshape(count, -1).squeeze().copy()


def _images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).float().div_(255)
