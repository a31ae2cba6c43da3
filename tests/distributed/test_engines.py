"""Engines that cannot work are refused at the door, by what can be seen of them."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.conftest import mlp, same, weights, wrap


def from_package(package: str, name: str, *bases: type) -> Any:
    """A class as if it came from ``package``, which need not be installed."""
    return types.new_class(name, bases, exec_body=lambda body: body.update(__module__=package))


def test_deepspeed_is_refused_wherever_it_shows() -> None:
    model = mlp()
    engine = from_package("deepspeed.runtime.engine", "DeepSpeedEngine", nn.Module)()
    engine.module = model
    with pytest.raises(TypeError, match=r"DeepSpeed.*fully_shard or DistributedDataParallel"):
        wrap(engine)
    zero = from_package("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")()
    with pytest.raises(TypeError, match="DeepSpeed"):
        BNPreconditioner(zero, model)
    model[0].weight.ds_id = 0  # what stage 3 puts on each parameter
    with pytest.raises(TypeError, match="DeepSpeed"):
        wrap(model)


def test_a_package_with_a_longer_name_is_another_one() -> None:
    model = from_package("deepspeedometer.models", "Net", nn.Sequential)(nn.Linear(4, 3))
    assert wrap(model).coverage().preconditioned == ("0.weight", "0.bias")


def test_optimizers_inside_backward_are_refused() -> None:
    optim = pytest.importorskip("torch.distributed.optim")
    model = mlp()
    optim._apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(TypeError, match=r"stepped inside backward.*after backward"):
        wrap(model)


def test_a_step_by_a_hook_is_refused() -> None:
    model = mlp()
    optimizer = wrap(model)
    before = weights(model)
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match=r"step\(\) was called inside backward.*after backward"):
        model(torch.ones(2, 4)).sum().backward()
    assert same(weights(model), before)
    handle.remove()
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert int(optimizer.statistics["0"].count) == 2


def test_what_is_no_process_group_is_refused() -> None:
    with pytest.raises(TypeError, match="process_group is 'gloo'"):
        wrap(mlp(), process_group="gloo")
