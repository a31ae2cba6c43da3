"""Sharded models on several processes are one process with all their data: all checks of sharded_script."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import answers, on_linux

pytest.importorskip("torch.distributed.fsdp", reason="needs torch.distributed")
pytestmark = [
    on_linux,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 has fully_shard on accelerators only"),
]
TWO = (
    "fsdp",
    "float32",
    "accumulation",
    "unsharded_at_step",
    "mixed_precision",
    "meta",
    "sharded_after_wrapping",
    "replaced_in_the_groups",
    "other_layers",
    "passed_through",
    "tensor_parallel",
    "batch_sharded_inputs",
    "muon",
    "checkpoints",
    "reports",
)
EXACT = 1e-12  # float64 in another order of summation, over 50 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks leave checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKPOINTS", str(folder))
        verify = ("verify_state_dict",) if importlib.util.find_spec("expecttest") else ()
        return answers("distributed.sharded_script", *TWO, *verify, limit=280)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    """What each of four ranks found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPS", "5")
        return answers("distributed.sharded_script", "two_dimensions", ranks=4, limit=280)


def found(ranks: list[dict[str, Any]], check: str) -> list[Any]:
    """The answers of all ranks; after a check that failed there are none."""
    for rank in ranks:
        for answer in rank.values():
            if isinstance(answer, dict) and "failed" in answer:
                pytest.fail(answer["failed"])
    return [rank[check] for rank in ranks]


def equal_to_plain(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """Parameters and statistics are one process's, and the same on all ranks to the last bit."""
    for case in ranks[0]:
        rows = [rank[case] for rank in ranks if isinstance(rank[case], dict)]
        assert len({row["digest"] for row in rows}) <= 1, case
        for row in rows:
            assert row["from_plain"] < EXACT and row["statistics"] < EXACT, (case, row)
            assert row.get("preconditioned") == row.get("of_plain"), case


def test_fsdp_is_one_process_on_the_joined_batch(two: list[dict[str, Any]]) -> None:
    """Convolutions, Conv1D, tied weights, rows that ranks cannot share evenly; five ways to optimize."""
    ranks = found(two, "fsdp")
    equal_to_plain(ranks)
    for case, row in ranks[0].items():
        assert row["moved"] > 0.1 and row["preconditioned"] == 16, case


def test_fsdp_in_float32(two: list[dict[str, Any]]) -> None:
    assert max(found(two, "float32")) < 1e-6


def test_accumulation_clipping_and_gradients_that_wait(two: list[dict[str, Any]]) -> None:
    for rank in found(two, "accumulation"):
        for case, (difference, counts) in rank.items():
            assert difference < (1e-6 if case == "bfloat16" else EXACT) and counts, case


def test_parameters_that_are_gathered_at_the_step(two: list[dict[str, Any]]) -> None:
    for difference, covered, expected in found(two, "unsharded_at_step"):
        assert difference == 0 and covered == expected == 16


def test_mixed_precision_keeps_statistics_in_float32(two: list[dict[str, Any]]) -> None:
    for rank in found(two, "mixed_precision"):
        assert rank["dtype"] == "torch.float32" and rank["finite"]
        assert rank["mean"] < 1e-6 and rank["variance"] < 1e-4


def test_a_model_from_the_meta_device(two: list[dict[str, Any]]) -> None:
    assert max(found(two, "meta")) < EXACT


def test_sharding_after_wrapping_is_an_error_on_every_rank(two: list[dict[str, Any]]) -> None:
    for message, untouched in found(two, "sharded_after_wrapping"):
        assert "was sharded (fully_shard, parallelize_module) after the optimizer was built" in message
        assert "shard the model first" in message and untouched


def test_sharding_after_wrapping_works_if_the_groups_follow(two: list[dict[str, Any]]) -> None:
    assert max(found(two, "replaced_in_the_groups")) < EXACT


def test_attention_recurrent_layers_and_shards_along_another_dimension(two: list[dict[str, Any]]) -> None:
    for rank in found(two, "other_layers"):
        for kind, covered in (("Attending", 6), ("Recurrent", 14)):
            difference, here, alone = rank[kind]
            assert difference < 1e-9 and here == alone == covered, kind  # attention's kernels round otherwise
        for kind in ("SGD", "AdamW"):
            difference, passed = rank[f"Shard(1), {kind}"]
            assert difference < EXACT and not passed


def test_layouts_without_blocks_pass_through(two: list[dict[str, Any]]) -> None:
    for why, same in found(two, "passed_through"):
        assert why["0.weight"] == why["0.bias"] == "sharded along dimension 0, which leaves no block of rows and inputs"
        assert why["1.weight"] == "sharded along dimension 3, which leaves no block of rows and inputs"
        assert why["3.weight"].startswith("rank-one P")
        assert same == [True, True, True, True, False]


@pytest.mark.slow
def test_gpt2_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for difference, here, alone in found(answers("distributed.sharded_script", "gpt2"), "gpt2"):
        assert difference < 1e-9 and here == alone == 16


def test_tensor_parallel_is_the_whole_model(two: list[dict[str, Any]]) -> None:
    ranks = found(two, "tensor_parallel")
    equal_to_plain(ranks)
    assert all(ranks[0][kind]["preconditioned"] == 8 for kind in ("SGD", "AdamW", "two-sided momentum"))
    assert all(rank["SGD"]["synchronization"] for rank in ranks)  # nothing is pooled
    assert all("use step_scale='trace'" in rank["spectral"] for rank in ranks)
    assert all("max_norm is 1.0, but weights are sharded" in rank["max_norm"] for rank in ranks)
    assert all("follow_inputs is True, but weights are sharded" in rank["follow_inputs"] for rank in ranks)


def test_ranks_that_share_a_weight_and_not_its_samples(two: list[dict[str, Any]]) -> None:
    for caught in found(two, "batch_sharded_inputs"):
        assert len(caught) == 1 and "a mesh dimension of their own" in caught[0]


def test_muon_is_as_near_as_without_the_wrapper(two: list[dict[str, Any]]) -> None:
    """Its Newton-Schulz steps are in bfloat16, so neither is exact."""
    for ours, base in found(two, "muon"):
        assert ours < 10 * base + 1e-6 < 0.05


def test_checkpoints_bitwise_or_with_another_number_of_ranks(two: list[dict[str, Any]]) -> None:
    for rank in found(two, "checkpoints"):
        for kind, row in rank.items():
            assert row["same_ranks"], kind
            assert row["to_one"] < EXACT and row["from_one"] < EXACT, kind
    assert found(two, "checkpoints")[0]["SGD"]["shapes"] == [1, 3, 5, 6, 7, 24, 90]  # whole, on one rank


@pytest.mark.slow
def test_a_checkpoint_of_two_loaded_by_four(
    two: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(two, "checkpoints")
    monkeypatch.setenv("CHECKPOINTS", str(folder))
    for rank in found(answers("distributed.sharded_script", "checkpoint_of_two", ranks=4), "checkpoint_of_two"):
        assert all(difference < EXACT for difference in rank.values())


def test_torchs_own_checks_of_state_dicts(two: list[dict[str, Any]]) -> None:
    pytest.importorskip("expecttest", reason="torch's own test utilities need it")
    assert all(found(two, "verify_state_dict"))


def test_reports_and_copies(two: list[dict[str, Any]]) -> None:
    for rank in found(two, "reports"):
        assert rank["repr"].startswith("BNPreconditioner(SGD, 9 layers")
        assert rank["rows"]["flat.weight"] == [[7, 90], "P"] and rank["rows"]["one.bias"] == [[1], "P, with one.weight"]
        assert rank["width"] == 90
        assert all("cannot be copied or pickled" in error for error in rank["copies"])


def test_two_dimensional_meshes(four: list[dict[str, Any]]) -> None:
    """Replicas of shards; FSDP over tensor parallel; and a mesh that does not say who shares samples."""
    ranks = found(four, "two_dimensions")
    equal_to_plain([{k: v for k, v in rank.items() if isinstance(v, dict)} for rank in ranks])
    for rank in ranks:
        assert len([k for k in rank if k.startswith(("HSDP", "FSDP"))]) == 5
        message, untouched = rank["ambiguous"]
        assert "process_group is None" in message and "mesh['dp'].get_group()" in message and untouched
        assert rank["given"] < EXACT


@pytest.mark.slow
def test_two_dimensional_meshes_for_50_steps() -> None:
    ranks = found(answers("distributed.sharded_script", "two_dimensions", ranks=4, limit=280), "two_dimensions")
    equal_to_plain([{k: v for k, v in rank.items() if isinstance(v, dict)} for rank in ranks])


@pytest.mark.slow
def test_fsdp_on_four_processes() -> None:
    """Ranks without rows, and more of them than some layers have."""
    equal_to_plain(found(answers("distributed.sharded_script", "fsdp", "other_layers", ranks=4, limit=280), "fsdp"))
