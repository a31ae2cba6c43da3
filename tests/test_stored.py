"""Files that earlier versions wrote load and go on to the numbers that those versions reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnp_optim.checkpoint import FORMAT_VERSION
from tests.conftest import same, train
from tests.stored import CASES, FOLDER, net

FILES = sorted(FOLDER.glob("state_dict_v*.pt"))


def test_every_format_up_to_the_present_one_is_here() -> None:
    assert [f.stem for f in FILES] == [f"state_dict_v{i}" for i in range(1, FORMAT_VERSION + 1)]


FIRST = "state_dict_v1"
HELD = [(f, case) for f in FILES for case in torch.load(f, weights_only=True)]


def test_every_case_is_in_the_latest_file() -> None:
    assert [case for f, case in HELD if f == FILES[-1]] == list(CASES)


@pytest.mark.parametrize(("file", "case"), HELD, ids=lambda v: getattr(v, "stem", v))
def test_a_stored_file_loads_bitwise_and_goes_on(file: Any, case: str) -> None:
    stored = torch.load(file, weights_only=True)[case]
    model = net()
    optimizer = CASES[case](model)
    model.load_state_dict(stored["before"]["model"])
    optimizer.load_state_dict(stored["before"]["optimizer"])
    loaded, saved = optimizer.state_dict(), stored["before"]["optimizer"]
    assert same(loaded["state"], saved["state"])
    assert loaded["bnp"]["version"] == FORMAT_VERSION
    interval = optimizer._settings["stat_interval"]  # steps are counted for it, and need be known modulo it only
    assert (loaded["bnp"]["steps"] - saved["bnp"]["steps"]) % interval == 0
    for mine, theirs in zip(loaded["param_groups"], saved["param_groups"], strict=True):
        assert all(mine[key] == value for key, value in theirs.items())  # a newer torch may have more

    train(model, optimizer, stored["data"])
    # float32 on another processor
    expected = stored["after"]
    torch.testing.assert_close(dict(model.state_dict()), expected["model"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state_dict()["state"], expected["optimizer"]["state"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("file", "case"), HELD, ids=lambda v: getattr(v, "stem", v))
def test_the_file_holds_what_it_is_there_for(file: Any, case: str) -> None:
    """Entries of the base and of ours, in its format: a file without them would test nothing."""
    saved = torch.load(file, weights_only=True)[case]["before"]["optimizer"]
    form = {"form": "two_sided" if case in ("AdamW", "momentum") else "gradient"} if file.stem != FIRST else {}
    steps = 2 if case == "SGD-spectral" and file.stem != FIRST else 5 if file.stem == FIRST else 0
    assert saved["bnp"] == {"version": int(file.stem[-1]), "steps": steps} | form
    own = {"bnp_mean", "bnp_variance", "bnp_count", "bnp_mass", "bnp_q2"}
    momentum = {"momentum_buffer"}
    base = {"SGD": set(), "SGD-spectral": momentum, "momentum": momentum, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
    own |= {"bnp_direction"} if case == "SGD-spectral" else set()
    assert [set(saved["state"][i]) for i in (0, 2, 4)] == [own | base[case]] * 3  # the weights
    assert [set(saved["state"].get(i, ())) for i in (1, 3)] == [base[case]] * 2  # the biases
    observations = 2 if case == "SGD-spectral" else 5  # measured at the first and the fourth step, or always
    assert [int(saved["state"][i]["bnp_count"]) for i in (0, 2, 4)] == [
        4 * n * observations for n in (16, 1, 1)
    ]  # samples × positions
