"""The wrapper is an optimizer like any other: its objects, hooks, closures, groups and bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp, train, weights


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW], ids=["gradient", "two_sided"])
def test_a_rate_set_by_the_bases_own_step_hook_holds_in_that_step(
    base_class: type[Optimizer],
) -> None:
    """AdamW decays by default: the wrapper then lends it edited copies of its groups."""
    model = mlp()
    base = base_class(model.parameters(), lr=1.0, weight_decay=0.1)  # type: ignore[call-arg]
    optimizer = BNPreconditioner(base, model)

    def freeze(opt: Optimizer, args: Any, kwargs: Any) -> None:
        opt.param_groups[0]["lr"] = 0.0

    base.register_step_pre_hook(freeze)
    before = weights(model)
    backward(model, inputs(1)[0])
    optimizer.step()
    assert base.param_groups[0]["lr"] == 0.0
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_hooks_of_the_base_see_its_own_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = BNPreconditioner(base, model)
    own, seen = list(base.param_groups), []

    def look(opt: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append((len(opt.param_groups) == len(own), opt.param_groups[0]["weight_decay"]))

    base.register_step_pre_hook(look)
    base.register_step_post_hook(look)
    backward(model, inputs(1)[0])
    optimizer.step()
    assert seen == [(True, 0.1), (True, 0.1)]


def test_a_subclass_is_known_whoever_was_built_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch patches ``step`` into the class of the first instance: still the same algorithm."""
    step = torch.optim.Adamax.step
    monkeypatch.setattr(torch.optim.Adamax, "step", getattr(step, "__wrapped__", step))  # as in a fresh process

    class Mine(torch.optim.Adamax):
        pass

    results = []
    for _ in range(2):
        model = mlp()
        train(model, BNPreconditioner(Mine(model.parameters(), lr=0.1, weight_decay=0.1), model), inputs(3))
        results.append(weights(model))
    model = mlp()
    train(
        model,
        BNPreconditioner(torch.optim.Adamax(model.parameters(), lr=0.1, weight_decay=0.1), model),
        inputs(3),
    )
    for name, value in weights(model).items():
        assert torch.equal(value, results[0][name]), name
        assert torch.equal(value, results[1][name]), name


def test_a_group_added_in_the_middle_of_accumulation_loses_no_samples() -> None:
    """Their gradients are in .grad when step() comes."""
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    first, second = inputs(2)
    backward(model, first)
    optimizer.add_param_group({"params": model[2].parameters()})
    backward(model, second)
    optimizer.step()
    assert optimizer.statistics["0"].count == 16
    torch.testing.assert_close(optimizer.statistics["0"].mean, torch.cat([first, second]).mean(0))


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_skipped_by_the_scaler_never_existed(base_class: type[Optimizer], implementation: str) -> None:
    def run(batches: list[tuple[Tensor, float]], scale: float) -> tuple[nn.Module, BNPreconditioner]:
        model = mlp()
        base = base_class(model.parameters(), lr=0.1, **{implementation: True})  # type: ignore[call-arg]
        optimizer = BNPreconditioner(base, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x, factor in batches:
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        return model, optimizer

    a, b, c = inputs(3)
    skipped, first = run([(a, 1), (b, torch.inf), (c, 1)], 1024.0)
    # the scale halves at the skip; powers of two leave no trace
    plain, second = run([(a, 1), (c, 1)], 1024.0)
    assert all(torch.equal(p, q) for p, q in zip(skipped.parameters(), plain.parameters(), strict=True))
    for name, expected in second.statistics.items():
        found = first.statistics[name]
        assert found.count == expected.count == 16
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found.variance, expected.variance)
