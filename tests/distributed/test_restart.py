"""Checkpoints across numbers of processes, and a process that dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.restart_script import OPTIONS, continuations
from tests.launching import answers, on_linux

pytestmark = [on_linux, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """Two ranks train without a break, and save on the way."""
    ranks = answers("distributed.restart_script", "whole", str(folder))
    assert ranks[0] == ranks[1]
    return ranks[0]


def test_a_rank_dies_and_all_start_again(whole: dict[str, Any], folder: Path) -> None:
    """A restart from either kind of checkpoint goes on bitwise; whoever loses a rank ends with an error, at once."""
    survivor, dead = answers("distributed.restart_script", "continue and die", str(folder))
    for kind in OPTIONS:
        for how in ("plain", "dcp"):
            assert survivor[f"{kind}, {how}"] == dead[f"{kind}, {how}"] == whole[kind]
    assert survivor["said"].startswith("RuntimeError: BNPreconditioner could not exchange statistics")
    assert "restart all from a checkpoint" in survivor["said"]
    assert survivor["untouched"]


def assert_goes_on(found: dict[str, Any], whole: dict[str, Any]) -> None:
    for kind in OPTIONS:
        assert found[f"{kind}, plain"] == found[f"{kind}, dcp"]
        assert found[f"{kind}, dcp"] == pytest.approx(whole[kind], rel=0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.6 in its own checkpoints
def test_one_process_goes_on(whole: dict[str, Any], folder: Path) -> None:
    assert_goes_on(continuations(folder), whole)


@pytest.mark.slow
def test_four_processes_go_on(whole: dict[str, Any], folder: Path) -> None:
    ranks = answers("distributed.restart_script", "continue", str(folder), ranks=4)
    assert all(rank == ranks[0] for rank in ranks)
    assert_goes_on(ranks[0], whole)
