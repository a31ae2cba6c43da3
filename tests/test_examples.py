"""The examples run, in a short form; tests/callbacks/test_example.py has the one on curvature."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest


def output_of(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[list[str]]:
    """Words of the lines that it prints."""
    example = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    example.main()
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_plain_loop(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    head, *rows = output_of("plain_loop", ["--steps", "60"], monkeypatch, capsys)
    assert head == ["test", "accuracy", "base", "BNP"]
    assert [name for name, *_ in rows] == ["SGD", "AdamW"]
    for _, plain, bnp in rows:
        assert 0 < float(plain) < 1 and float(bnp) > 0.6  # 480 images; a tenth is chance


def test_lightning_training(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps", "30", "--epochs", "2", "--folder", str(tmp_path)]
    *_, head, plain, bnp = output_of("lightning_training", arguments, monkeypatch, capsys)
    assert head == ["accuracy", "halfway", "end", "best"]
    assert plain[0] == "AdamW" and bnp[0] == "BNP-AdamW"
    for row in (plain, bnp):
        half, end, best = map(float, row[1:])
        assert best == max(half, end) > 0.6
    assert sorted(f.name for f in (tmp_path / "BNP-AdamW").iterdir())[-1] == "last.ckpt"


def test_river_stream(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("river", reason="river is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = tmp_path / "stream.png"
    head, *rows = output_of("river_stream", ["--steps", "400", "--figure", str(figure)], monkeypatch, capsys)
    assert head == ["progressive", "accuracy"]
    assert [row[0].rstrip(",") for row in rows] == ["SGD", "Adam", "BNP-SGD"]
    assert all(float(row[-1]) > 0.5 for row in rows)  # a seventh is chance
    assert figure.read_bytes()[:4] == b"\x89PNG"
