"""The code in README and CONTRIBUTING runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.conftest import train

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.S)


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    loop, lightning, stream = blocks("README.md")
    scope: dict[str, Any] = {}
    exec(loop, scope)
    assert scope["optimizer"].statistics["0"].count == 320
    shown = capsys.readouterr().out
    assert shown.startswith("BNPreconditioner(SGD, 2 layers, mode='gradient'")
    assert shown.strip().endswith("4 of 4 parameters preconditioned")

    exec(stream, scope)
    assert scope["optimizer"].statistics["0"].count == 200
    assert scope["error"] / 200 < 1.0  # the answer is around 5

    pytest.importorskip("pytorch_lightning", reason="the Lightning example needs pytorch-lightning")
    exec(lightning, scope)
    optimizer = scope["Classifier"]().configure_optimizers()
    assert repr(optimizer).startswith("BNPreconditioner(AdamW, 2 layers, mode='two_sided'")


def test_the_table_of_the_readme() -> None:
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2, bias=False))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train(model, optimizer, [torch.randn(4, 20)])
    table = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)[0]
    lines = [[cell.split() for cell in line.split("  ") if cell] for line in table.splitlines()]
    mine = [[cell.split() for cell in line.split("  ") if cell] for line in str(optimizer.coverage()).splitlines()]
    assert lines[0] == mine[0]
    assert lines[2:] == mine[2:]


@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
def test_the_layer_type_of_contributing(step_scale: Any) -> None:
    (code,) = blocks("CONTRIBUTING.md")
    scope: dict[str, Any] = {}
    exec(code, scope)
    folded = nn.Sequential(scope["FoldedLinear"](4, 3))
    linear = nn.Sequential(nn.Linear(4, 3))
    linear.load_state_dict(folded.state_dict())
    data = [torch.randn(6, 8) + 1 for _ in range(4)]
    for model, inputs in ((folded, data), (linear, [x[:, :4] + x[:, 4:] for x in data])):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, BNPreconditioner(base, model, step_scale=step_scale), inputs)
    for p, q in zip(folded.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
