"""Start a module of the tests on several processes, under a time limit, and read what each prints last."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo was tried on Linux only")


def launch(module: str, *args: str, ranks: int = 2, limit: float = 150) -> list[tuple[int, str, str]]:
    """Return code, output and errors of each rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    # by these Lightning knows that it need not start processes itself
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    command = [sys.executable, "-m", f"tests.{module}", *args]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [p.communicate(timeout=limit) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
            for pipe in (p.stdout, p.stderr):
                assert pipe is not None
                pipe.close()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, outputs, strict=True)]


def answers(module: str, *args: str, ranks: int = 2, limit: float = 150) -> list[dict[str, Any]]:
    """The line of JSON that each rank ends with."""
    results = launch(module, *args, ranks=ranks, limit=limit)
    assert all(code == 0 for code, _, _ in results), "\n".join(err[-3000:] for _, _, err in results)
    return [json.loads(out.strip().split("\n")[-1]) for _, out, _ in results]
