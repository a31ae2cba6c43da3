"""Bad arguments are refused at the door, by a message that says what to do, before anything is attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnp_optim import BNPreconditioner
from tests.conftest import mlp


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stat_decay", "0.9"),
        ("stat_decay", None),
        ("var_rel_eps", "1e-2"),
        ("var_eps", None),
        ("skip", 3),
        ("skip", None),
    ],
)
def test_a_value_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    model = mlp()
    with pytest.raises((TypeError, ValueError), match=name):
        BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model, **{name: value})
    assert all(not m._forward_hooks for m in model.modules())


def test_a_generator_of_skip_rules_is_not_used_up_by_the_check() -> None:
    model = mlp()
    optimizer = BNPreconditioner(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        skip=(name for name in ["0"]),  # type: ignore[arg-type]
    )
    assert list(optimizer.statistics) == ["2"]
