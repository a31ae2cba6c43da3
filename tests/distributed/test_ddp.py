"""Several processes under DistributedDataParallel are one process with all their data: all checks of ddp_script."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launching import answers, on_linux

pytestmark = [on_linux, pytest.mark.timeout(300)]
FEW = ("equal_with_four", "ranks_without_samples", "layers_used_by_some_ranks", "other_layers")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank found."""
    return answers("distributed.ddp_script", ranks=request.param, limit=280)


def found(ranks: list[dict[str, Any]], check: str) -> list[Any]:
    """The answers of all ranks; after a check that failed there are none."""
    for rank in ranks:
        for answer in rank.values():
            if isinstance(answer, dict) and "failed" in answer:
                pytest.fail(answer["failed"])
    return [rank[check] for rank in ranks]


def test_equal_to_one_process_on_the_joined_batch(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "equal_to_the_joined_batch"):
        for case, row in rank.items():
            assert row["same"] and row["same_statistics"], case
            assert row["from_joined"] < 1e-6, case
            assert row["counts"] == row["expected_counts"], case


def test_without_synchronization_the_ranks_drift_apart(ranks: list[dict[str, Any]]) -> None:
    """The check above is one that can fail: ranks that keep their statistics to themselves fail it."""
    for rank in found(ranks, "without_synchronization"):
        assert not rank["same"] and not rank["same_statistics"]
        assert rank["from_joined"] > 1e-2
        assert rank["synchronization"] == []


def test_a_fold_before_wrapping_is_the_first_ranks(ranks: list[dict[str, Any]]) -> None:
    """Weights and units: the ranks folded on samples of their own."""
    assert found(ranks, "folded") == [[True, True, True]] * len(ranks)


def test_following_inputs_is_refrained_from(ranks: list[dict[str, Any]]) -> None:
    assert found(ranks, "following") == [[True, 0, 1]] * len(ranks)


def test_bytes_of_a_step(ranks: list[dict[str, Any]]) -> None:
    """8 for each of the 15 input channels, 16 for each of the 3 layers, 8 for all; "spectral" adds its projections."""
    for before, size, contributed in found(ranks, "seen_from_the_first_step"):
        assert (before, size) == (None, len(ranks))
        assert contributed == 8 * 15 + 16 * 3 + 8
    for rank in found(ranks, "equal_to_the_joined_batch"):
        projections = sum(4 * (fan_in + 2) + 8 for fan_in in (4, 6, 5))
        assert rank["spectral"]["synchronization"] == [len(ranks), 176 + projections + (176 + projections) % 8]


def test_options_of_ddp(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "options_of_ddp"):
        assert rank.keys() == {"gradient_as_bucket_view", "static_graph", "find_unused_parameters", "bucket_cap_mb"}
        assert max(rank.values()) < 1e-6


def test_accumulation_without_synchronization(ranks: list[dict[str, Any]]) -> None:
    for same, distance in found(ranks, "accumulation"):
        assert same
        assert distance < 1e-6


def test_layers_that_only_some_ranks_use(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "layers_used_by_some_ranks"):
        assert rank["same"]
        assert rank["first"] == [3 * (len(ranks) - 1), 3, 0]
        # four steps as above, then either branch is taken by half of the ranks
        assert rank["last"] == [12 * (len(ranks) - 1) + 9 * len(ranks), 12 + 9 * len(ranks), 0]
        assert rank["ready"] == ["layers.0", "layers.1"]
        assert rank["preconditioned"] == [f"layers.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")]


def test_ranks_without_samples(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "ranks_without_samples"):
        assert rank["same"]
        assert rank["from_joined"] < 1e-6
        assert rank["statistics"] < 1e-5


def test_what_is_infinite_on_one_rank_changes_no_statistics(ranks: list[dict[str, Any]]) -> None:
    assert found(ranks, "infinity_on_one_rank") == [[True, True, True]] * len(ranks)


def test_gradient_scaler(ranks: list[dict[str, Any]]) -> None:
    n = 3 * len(ranks)
    for counts, scales, same in found(ranks, "scaled_gradients"):
        assert counts == [n, 2 * n, 2 * n, 3 * n, 4 * n, 5 * n]
        assert scales == [8, 8, 4, 4, 4, 4]
        assert same


def test_the_way_of_accelerators(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "nothing_is_read"):
        for same, distance in rank.values():
            assert same
            assert distance < 1e-5


def test_ranks_that_differ_get_the_same_error(ranks: list[dict[str, Any]]) -> None:
    everybodys = found(ranks, "other_layers")
    last = len(ranks) - 1
    for said in everybodys:
        assert said == everybodys[0]
        for key, expected in {
            "shape": "ranks differ in layer '0': rank 0 has Linear (3, 4)",
            "number": "ranks differ in layer '1': rank 0 has none, ",
            "option": f"ranks differ in stat_decay: rank 0 has 0.99, rank {last} has 0.9",
            "base": f"ranks differ in the base: rank 0 has 'SGD', rank {last} has 'AdamW'",
            "dtype": "ranks differ in layer '0': rank 0 has Linear (3, 4) torch.float32 on cpu",
            "checkpoint": "ranks differ in statistics of layer '0': rank 0 has 0 observations",
            "another model": "parameter group that doesn't match",
        }.items():
            assert said[key].startswith("ValueError") and expected in said[key], said[key]
            assert key == "another model" or "process_group" in said[key]


def test_layers_that_change_later(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "layers_that_change_later"):
        assert rank["grown"] == [4 * len(ranks), 2 * len(ranks)]
        assert rank["same"] and rank["untouched"]
        assert rank["said"].startswith("ValueError: ranks differ in layer '1': rank 0 has Linear (3, 3)")


def test_what_fails_on_one_rank_fails_on_all(ranks: list[dict[str, Any]]) -> None:
    first, *others = found(ranks, "an_adapter_that_fails")
    assert first == ["ValueError: the adapter is wrong", True]
    assert others == [["ValueError: rank 0 cannot go on: see its error", True]] * (len(ranks) - 1)


def test_join_is_refused(ranks: list[dict[str, Any]]) -> None:
    for said in found(ranks, "uneven_inputs"):
        assert said.startswith("RuntimeError: DistributedDataParallel.join() lets ranks stop early")
        assert "drop_last" in said


def test_one_rank_may_save(ranks: list[dict[str, Any]]) -> None:
    assert found(ranks, "checkpoints_by_one_rank") == [[6, True, True]] * len(ranks)


def test_other_engines(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "other_engines"):
        for base, form in (("SGD", "gradient"), ("AdamW", "two_sided")):
            same, distance, found_form = rank[base]
            assert same and distance < 1e-6 and found_form == form, base
        assert rank["decay"].startswith("ValueError: optimizer is a ZeroRedundancyOptimizer with weight_decay")
        assert rank["inside"].startswith("TypeError: optimizer PostLocalSGDOptimizer")
        assert rank["averaged"] == [True] * 6 + [False] * 3 + [True] + [False] * 3 + [True]
        for said in (*rank["FSDP1, True"], *rank["FSDP1, False"]):
            assert said.startswith("TypeError: model is wrapped in FullyShardedDataParallel (FSDP1)")
            assert "fully_shard" in said


def test_which_group(ranks: list[dict[str, Any]]) -> None:
    for rank in found(ranks, "groups"):
        said = rank.pop("not a member")
        assert said.startswith("TypeError: process_group is ") and "torch.distributed.new_group" in said
        assert rank == {
            "inside DDP": "DDP's",
            "holds DDP": "DDP's",
            "is DDP": "DDP's",
            "plain": "default",
            "given": "DDP's",
            "own": "none",
            "copy": "DDP's",
            "own copy": "none",
            "pickle": "default",
            "own pickle": "none",
        }


def test_four_processes() -> None:
    """A few of the above."""
    few = answers("distributed.ddp_script", *FEW, ranks=4)
    for rank in found(few, "equal_with_four"):
        assert rank["same"] and rank["same_statistics"] and rank["from_joined"] < 1e-6
    test_ranks_without_samples(few)
    test_layers_that_only_some_ranks_use(few)
    test_ranks_that_differ_get_the_same_error(few)
