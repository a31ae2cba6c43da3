"""Lightning's DDP strategy on two processes is one process on the joined batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.lightning_runs import BATCH, BATCHES, loop, wrapped
from tests.conftest import inputs, mlp
from tests.launching import answers, on_linux

EPOCHS = 2


@on_linux
@pytest.mark.parametrize("base", ["SGD", pytest.param("AdamW", marks=pytest.mark.slow)])
def test_two_ranks_are_one_process_on_the_joined_batches(base: str, tmp_path: Path) -> None:
    ranks = answers("clients.ddp_script", base, str(tmp_path))
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
