"""Two processes, DistributedDataParallel on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import answers, on_linux

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")


@on_linux
@pytest.mark.parametrize("optimizer", ["BNP-SGD", pytest.param("SGD", marks=pytest.mark.slow)])
def test_two_processes(optimizer: str, tmp_path: Path) -> None:
    """Training is what it was; both ranks know the curvature of all their samples; an error of one stops neither."""
    ranks = answers("callbacks.ddp_script", str(tmp_path), optimizer)
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
