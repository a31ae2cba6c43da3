"""The example runs, on random images in the place of Fashion-MNIST."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = importlib.import_module("examples.lightning_callbacks")
    data = TensorDataset(torch.rand(64, 784), torch.randint(10, (64,)))
    monkeypatch.setattr(example, "fashion_mnist", lambda folder, samples: data)
    monkeypatch.setattr(example, "EVERY", 1)
    monkeypatch.setattr(sys, "argv", ["lightning_callbacks", "--epochs", "1"])
    monkeypatch.chdir(tmp_path)
    example.main()
    last = capsys.readouterr().out.strip().split("\n")[-1].split()
    assert last[0] == "1" and len(last) == 6 and all(float(x) > 0 for x in last)
    assert (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").is_file()


def test_no_data(tmp_path: Path) -> None:
    example = importlib.import_module("examples.lightning_callbacks")
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte"):
        example.fashion_mnist(tmp_path, 10)
