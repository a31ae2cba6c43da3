"""The examples for several processes run under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.launching import ROOT, on_linux

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def run(example: str) -> list[str]:
    """The lines that the example prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, f"examples/{example}", "--epochs", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().split("\n")


@on_linux
@pytest.mark.timeout(200)
def test_ddp_example() -> None:
    *epochs, same, exchange = run("ddp.py")
    assert float(epochs[-1].split()[-1]) > 0.85
    assert same == "parameters the same on all 2 ranks: True"
    # 264 channels, 3 layers
    assert exchange == f"Synchronization(ranks=2, bytes={8 * 264 + 16 * 3 + 8})"


@on_linux
@pytest.mark.timeout(200)
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 has fully_shard on accelerators only")
def test_fsdp2_example() -> None:
    *epochs, holds, same, exchange = run("fsdp2.py")
    assert float(epochs[-1].split()[-1]) > 0.85
    assert holds == "rank 0 holds (50, 64) of (100, 64)"
    assert same == "the checkpoint holds the same parameters and statistics: True"
    assert exchange == f"Synchronization(ranks=2, bytes={8 * 264 + 16 * 3 + 8})"
