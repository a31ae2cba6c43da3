"""What the wrapper says of itself: coverage, repr, statistics."""

from __future__ import annotations

import torch
from torch import nn

from bnp_optim import BNPreconditioner


def test_coverage_of_a_lazy_layer_before_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    coverage = optimizer.coverage()
    assert not coverage["0.weight"].preconditioned
    assert coverage["0.weight"].why == "not initialized yet: run one forward pass, then call rescan()"
    assert coverage["1.weight"].preconditioned
    assert "0.weight" in str(coverage)
