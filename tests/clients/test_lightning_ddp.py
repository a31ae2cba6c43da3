"""Lightning's DDP strategy on two processes is one process on the joined batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.lightning_runs import BATCH, BATCHES, loop, wrapped
from tests.conftest import inputs, mlp

ROOT = Path(__file__).parent.parent.parent
EPOCHS = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def on_two_ranks(*arguments: str) -> list[dict[str, Any]]:
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
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.clients.ddp_script", *arguments],
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
    return [json.loads(out.strip().split("\n")[-1]) for out, _ in outputs]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo on one machine was tried on Linux only")
@pytest.mark.parametrize("base", ["SGD", pytest.param("AdamW", marks=pytest.mark.slow)])
def test_two_ranks_are_one_process_on_the_joined_batches(base: str, tmp_path: Path) -> None:
    ranks = on_two_ranks(base, str(tmp_path))
    net = mlp()
    optimizer = wrapped(net, base)
    loop(net, optimizer, inputs(BATCHES) * EPOCHS)
    for rank in ranks:
        assert rank["weights"].keys() == net.state_dict().keys()
        for name, value in net.state_dict().items():
            assert rank["weights"][name] == pytest.approx(value.flatten().tolist(), rel=1e-5, abs=1e-6), name
    for rank in ranks:
        assert rank["counts"] == [EPOCHS * BATCHES * BATCH] * 2
    assert ranks[0] == ranks[1]  # to the last bit
