"""What every result says of itself, and how it is written."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.runs import package_digest


def environment() -> dict[str, Any]:
    """What the numbers were had with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "bnp_optim_digest": package_digest(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compact(document: dict[str, Any]) -> str:
    """Indented JSON with one line per run, so that a change of a run is a change of a line."""
    runs = ",\n".join(f"    {json.dumps(run)}" for run in document["runs"])
    head = json.dumps({**document, "runs": []}, indent=2)
    return head.replace('"runs": []', f'"runs": [\n{runs}\n  ]')
