"""examples/ddp.py runs under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributed.launching import ROOT, on_linux

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@on_linux
@pytest.mark.timeout(200)
def test_ddp_example() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "examples/ddp.py", "--epochs", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    *epochs, same, exchange = run.stdout.strip().split("\n")
    assert float(epochs[-1].split()[-1]) > 0.85
    assert same == "parameters the same on all 2 ranks: True"
    # 264 channels, 3 layers
    assert exchange == f"Synchronization(ranks=2, bytes={8 * 264 + 16 * 3 + 8})"
