"""torch's own checks of distributed state dicts, on the wrapper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict

from bnp_optim import BNPreconditioner
from tests.conftest import inputs, mlp, train

pytest.importorskip("expecttest", reason="torch's own test utilities need it")
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.distributed.common_state_dict import VerifyStateDictMixin

BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Verify(TestCase, VerifyStateDictMixin):  # type: ignore[misc]
    def runTest(self) -> None: ...


@pytest.mark.parametrize("scale", ["trace", "spectral"])
@pytest.mark.parametrize("base", BASES)
def test_verify_state_dict_mixin(base: str, scale: Any) -> None:
    def start() -> Any:
        model = mlp()
        return model, BNPreconditioner(BASES[base](model.parameters()), model, step_scale=scale)

    model, optimizer = start()
    train(model, optimizer, inputs(5))
    optimizer.zero_grad()
    verify = Verify()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    verify._verify_msd(model.state_dict(), model_state)
    verify._verify_osd(model, optimizer, optimizer.state_dict(), optimizer_state)
    fresh_model, fresh = start()
    verify._verify_osd_by_load(fresh_model, optimizer, fresh, copy.deepcopy(optimizer_state))
