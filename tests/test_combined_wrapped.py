"""BNPreconditioner around a CombinedOptimizer: what ties a weight to its bias, though two optimizers step them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW

from bnp_optim import BNPreconditioner, CombinedOptimizer
from tests.conftest import backward, inputs, mlp, same, takes, train, weights
from tests.test_bases import SignSGD
from tests.test_combined import apart, combined


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGD, {"momentum": 0.9, "weight_decay": 0.1}), (AdamW, {"weight_decay": 0.1}), (Adam, {"weight_decay": 0.1})],
    ids=["SGD", "AdamW", "Adam"],
)
@pytest.mark.parametrize("step_scale", ["trace", "common", "spectral", None])
def test_two_optimizers_of_one_kind_are_the_one(kind: Any, options: dict[str, Any], step_scale: Any) -> None:
    """Weights in one, biases in the other: bitwise the wrapped optimizer that has them all."""
    model, expected = mlp(), mlp()
    parts = CombinedOptimizer([kind(share, lr=0.05, **options) for share in apart(model)])
    optimizer = BNPreconditioner(parts, model, step_scale=step_scale)
    reference = BNPreconditioner(kind(expected.parameters(), lr=0.05, **options), expected, step_scale=step_scale)
    train(model, optimizer, inputs(6))
    train(expected, reference, inputs(6))
    assert same(weights(model), weights(expected))
    assert {row.why for row in optimizer.coverage()} == {"P", "P, with 0.weight", "P, with 2.weight"}


@pytest.mark.skipif(not takes("Adam", "decoupled_weight_decay"), reason="this torch's Adam has no decoupled decay")
def test_weight_decay_is_that_of_each_parameters_optimizer() -> None:
    """Adam's L2 on the weights, AdamW's own on the biases: as Adam with one flag per group."""
    results = []
    for together in (True, False):
        model = mlp()
        weights_, biases = apart(model)
        common: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3}
        base = (
            Adam([{"params": weights_}, {"params": biases, "decoupled_weight_decay": True}], **common)
            if together
            else CombinedOptimizer([Adam(weights_, **common), AdamW(biases, **common)])
        )
        train(model, BNPreconditioner(base, model), inputs(5))
        results.append(weights(model))
    assert same(*results)


def test_one_adaptive_part_makes_it_two_sided() -> None:
    model = mlp()
    matrices, rest = apart(model)
    assert "mode='two_sided'" in repr(BNPreconditioner(combined(model), model))
    plain = CombinedOptimizer([SGD(matrices, lr=0.1), SGD(rest, lr=0.1)])
    assert "mode='gradient'" in repr(BNPreconditioner(plain, model))
    assert "mode='two_sided'" in repr(BNPreconditioner(CombinedOptimizer([combined(model)]), model))  # they nest


def test_sgd_beside_an_adaptive_optimizer_takes_the_steps_it_takes_alone() -> None:
    """Without momentum both forms are the same, here to rounding."""
    model, expected = mlp().double(), mlp().double()
    parts = CombinedOptimizer([SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters(), lr=0.0)])
    optimizer = BNPreconditioner(parts, model)
    reference = BNPreconditioner(SGD(expected[0].parameters(), lr=0.1), expected)
    data = [x.double() for x in inputs(6)]
    train(model, optimizer, data)
    train(expected, reference, data)
    for name, value in weights(expected).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_an_unknown_part_finds_its_parameters_in_place_and_is_named() -> None:
    model = mlp()
    matrices, rest = apart(model)
    unknown = SignSGD(rest, weight_decay=0.1)
    with pytest.warns(UserWarning, match="SignSGD is no optimizer of torch.optim: how its weight_decay"):
        optimizer = BNPreconditioner(CombinedOptimizer([AdamW(matrices), unknown]), model)
    train(model, optimizer, inputs(1))
    before = [p.detach().clone() for p in rest]
    train(model, optimizer, inputs(1, seed=2))
    assert all(torch.equal(w, seen) for w, (seen, _) in zip(before, unknown.seen, strict=True))
    with pytest.warns(UserWarning, match="mode='gradient' feeds P Pᵀ g to AdamW"):
        BNPreconditioner(CombinedOptimizer([AdamW(matrices), SGD(rest)]), model, mode="gradient")


def test_statistics_travel_with_it() -> None:
    def start() -> Any:
        model = mlp()
        return model, BNPreconditioner(combined(model), model)

    model, optimizer = start()
    train(model, optimizer, inputs(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for fresh, resumed in (start(), pickle.loads(pickle.dumps((model, optimizer)))):
        fresh.load_state_dict(saved[0])
        resumed.load_state_dict(copy.deepcopy(saved[1]))
        assert same(resumed.state_dict(), saved[1])
        train(fresh, resumed, inputs(3, seed=2))
        results = weights(fresh), resumed.state_dict()
    train(model, optimizer, inputs(3, seed=2))
    assert same(results, (weights(model), optimizer.state_dict()))
    assert saved[1]["state"][0]["bnp_count"] == 32  # the first layer's weight is number 0 here, too


def test_a_group_added_to_a_wrapped_combination_is_preconditioned() -> None:
    model = mlp()
    parts = CombinedOptimizer([SGD([model[0].weight], lr=0.1), AdamW([model[0].bias], lr=0.1)])
    optimizer = BNPreconditioner(parts, model)
    optimizer.add_param_group({"params": [model[2].weight], "optimizer": 0})
    optimizer.add_param_group({"params": [model[2].bias]})
    backward(model, inputs(1)[0])
    optimizer.step()
    assert [len(part.param_groups) for part in parts.optimizers] == [2, 2]
    assert len(optimizer.coverage().preconditioned) == 4


def test_a_subclass_with_a_step_of_its_own_is_an_optimizer_of_unknown_class() -> None:
    class Twice(CombinedOptimizer):
        def step(self, closure: Any = None) -> Any:
            super().step()
            return super().step()

    model = mlp()
    optimizer = BNPreconditioner(Twice(combined(model, weight_decay=0.0).optimizers), model)
    train(model, optimizer, inputs(2))
    assert int(optimizer.base_optimizer.optimizers[1].state[model[0].bias]["step"]) == 4  # type: ignore[attr-defined]


def test_torch_distributed_checkpoint_keeps_state_and_statistics() -> None:
    def start() -> Any:
        model = mlp()
        return model, BNPreconditioner(combined(model), model)

    model, optimizer = start()
    train(model, optimizer, inputs(4))
    optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    fresh, resumed = start()
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, resumed, saved)
    assert resumed.statistics["0"].count == 32
    for m, o in ((model, optimizer), (fresh, resumed)):
        train(m, o, inputs(3, seed=2))
    assert same(weights(fresh), weights(model))
