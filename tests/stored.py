"""Checkpoints as earlier versions wrote them: ``tests/data/state_dict_v<format version>.pt``.

Later versions must go on from them. A file is written once, when its format is the present one, and never again:

    python -m tests.stored    # refuses to overwrite

It holds, for each of ``CASES``, a model and its optimizer after five steps, three more batches, and model and
optimizer after those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnp_optim import BNPreconditioner
from bnp_optim.checkpoint import FORMAT_VERSION
from tests.conftest import train

FOLDER = Path(__file__).parent / "data"
CASES: dict[str, Callable[[nn.Module], BNPreconditioner]] = {  # "momentum" came with format 2
    "SGD": lambda m: BNPreconditioner(torch.optim.SGD(m.parameters(), lr=0.1), m),
    "SGD-spectral": lambda m: BNPreconditioner(
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), m, mode="gradient", step_scale="spectral",
        stat_interval=3,
    ),
    "momentum": lambda m: BNPreconditioner(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), m),
    "AdamW": lambda m: BNPreconditioner(torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1), m),
}  # fmt: skip


def net() -> nn.Sequential:
    """A convolution, a linear layer and one without bias; takes (n, 1, 4, 4)."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))


def written_now() -> dict[str, Any]:
    """What the present code writes."""
    stored = {}
    for name, build in CASES.items():
        model = net()
        optimizer = build(model)
        data = [torch.randn(4, 1, 4, 4) + 1 for _ in range(8)]
        train(model, optimizer, data[:5])
        before = copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
        train(model, optimizer, data[5:])
        after = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
        stored[name] = {"before": before, "data": data[5:], "after": after}
    return stored


if __name__ == "__main__":
    path = FOLDER / f"state_dict_v{FORMAT_VERSION}.pt"
    if path.exists():
        raise SystemExit(f"{path} exists: it must stay as it was written")
    path.parent.mkdir(exist_ok=True)
    torch.save(written_now(), path)
