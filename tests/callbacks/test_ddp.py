"""Two processes, DistributedDataParallel on gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo on one machine was tried on Linux only")
@pytest.mark.parametrize("optimizer", ["BNP-SGD", pytest.param("SGD", marks=pytest.mark.slow)])
def test_two_processes(optimizer: str, tmp_path: Path) -> None:
    """Training is what it was; both ranks know the curvature of all their samples; an error of one stops neither."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.callbacks.ddp_script", str(tmp_path), optimizer]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=100) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    ranks = [json.loads(out.strip().split("\n")[-1]) for out, _ in outputs]
    for rank in ranks:
        assert rank["different"] == []
        assert rank["steps"] == [[2, 4]] * 5
        assert rank["histories"] == ranks[0]["histories"]
        for mine, expected in rank["together"]:
            assert mine == pytest.approx(expected, rel=1e-4)
        assert rank["samples"] == [16, 16]
        assert rank["half"] == [4, 0]
    assert ranks[0]["rows"] == 10 and ranks[1]["rows"] == 0
    (said,) = ranks[0]["said"]
    assert "another rank could not evaluate its batch" in said
    assert ranks[1]["said"] == []
