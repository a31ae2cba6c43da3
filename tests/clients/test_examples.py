"""The examples of building from a configuration run, in a short form."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:pytorch_lightning\.cli")
@pytest.mark.parametrize("name", ["BNPAdamW", "BNPMuon"])
def test_lightning_cli(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as it stands, and with another optimizer on the command line."""
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    if not hasattr(torch.optim, "Muon") and name == "BNPMuon":
        pytest.skip("this torch has no Muon")
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py"])
    example = importlib.import_module("examples.lightning_cli")
    arguments = ["fit", "--config", str(EXAMPLES / "lightning_cli.yaml")]
    if name == "BNPMuon":
        arguments += ["--optimizer", name, "--optimizer.lr", "0.01"]
    short = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.samples", "150"]
    cli = example.main(arguments + short)
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer).__name__ == name and optimizer.statistics["0"].count == 150
    assert optimizer.param_groups[0]["initial_lr"] == (0.01 if name == "BNPMuon" else 0.001)
    shown = capsys.readouterr().out.split()
    assert shown[-2] == "accuracy" and float(shown[-1]) > 0.3  # of ten classes, after 150 samples


def test_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    example: Any = importlib.import_module("examples.hugging_face")
    losses = example.main(["--optimizers", "BNPAdamW", "--steps", "8"])
    assert losses["BNPAdamW"] < 5.545  # log 256, a model that knows nothing
    assert "BNPAdamW   held-out loss" in capsys.readouterr().out
