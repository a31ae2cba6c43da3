"""The sampling benchmark: its data, its arithmetic, its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import sampling
from benchmarks.data import DataMissingError


def test_cifar10_is_standardized(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    np.savez(tmp_path / "cifar10" / "cifar10.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    x, y, x_test, y_test = sampling.load_cifar10(tmp_path, 50)
    assert (x.shape, x.dtype, y.tolist()[:3]) == ((50, 3, 32, 32), torch.float32, [0, 1, 2])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)
    assert torch.equal(x_test[:50], x) and len(y_test) == 60


def test_missing_data_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"point --data-dir at the folder that holds cifar10/cifar10\.npz"):
        sampling.load_cifar10(tmp_path, 1)


def test_summary_of_known_numbers() -> None:
    rows = [
        {"setting": "plain SGD", "accuracy": [0.2, 0.4], "step_ms": [2.0] * 9 + [50.0]},
        {"setting": "exact", "accuracy": [0.5, 0.6], "step_ms": [3.0] * 10},
        {"setting": "thin", "accuracy": [0.5, 0.8], "step_ms": [1.0] * 5 + [3.0] * 4 + [99.0]},
    ]
    plain, exact, thin = sampling.summarize(rows)
    assert (plain["ratio"], exact["ratio"]) == (1.0, 1.5)  # the slowest tenth is left out
    assert exact["difference"] == exact["difference_standard_error"] == 0
    assert thin["step_ms"] == pytest.approx(17 / 9)
    assert (thin["accuracy"], thin["difference"]) == (pytest.approx(0.65), pytest.approx(0.1))
    assert thin["difference_standard_error"] == pytest.approx(0.1)  # of 0.0 and 0.2
    assert "| thin | 0.650 ± 0.150 | +0.100 ± 0.100 | 1.9 | 0.944 |" in sampling.table([plain, exact, thin])


def test_a_short_run_trains_every_setting() -> None:
    torch.manual_seed(0)
    data = (torch.randn(64, 3, 32, 32), torch.arange(64) % 10, torch.randn(20, 3, 32, 32), torch.arange(20) % 10)
    rows = sampling.run(data, [0], 0.01)
    assert [row["setting"] for row in rows] == list(sampling.SETTINGS)
    assert all(len(row["step_ms"]) == 2 and len(row["accuracy"]) == 1 for row in rows)
