"""Several processes: for now a warning, since unshared statistics let the ranks drift apart."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import inputs, mlp, train, wrap


def test_unshared_statistics_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = mlp()
    optimizer = wrap(model)
    with pytest.warns(UserWarning, match="2 processes train together") as caught:
        train(model, optimizer, inputs(3))
    assert len(caught) == 1
