"""Lightning Fabric, unmodified."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.clients.lightning_runs import (
    BASES,
    BATCH,
    BATCHES,
    counts,
)
from tests.conftest import inputs, mlp, same, weights

# ---- Fabric --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("base", BASES)
def test_fabric_is_the_loop_that_one_would_write(base: str, precision: str) -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1, precision=precision)
    net, plain = mlp(), mlp()
    model, optimizer = fabric.setup(net, BNPreconditioner(BASES[base](net.parameters()), net))
    expected = BNPreconditioner(BASES[base](plain.parameters()), plain)
    for x in inputs(BATCHES):
        optimizer.zero_grad()
        fabric.backward(model(x).float().square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        optimizer.step()
        expected.zero_grad()
        half = precision != "32-true"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output = plain(x.bfloat16() if half else x)  # Fabric casts the input itself, too
        output.float().square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        expected.step()
    assert same(weights(net), weights(plain))
    assert counts(optimizer) == {BATCHES * BATCH}
    assert same(optimizer.state_dict(), expected.state_dict())
