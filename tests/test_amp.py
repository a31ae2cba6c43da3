"""Mixed precision: GradScaler with the wrapper is GradScaler with the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from tests.conftest import inputs, mlp, train, weights

IMPLEMENTATIONS = ["fused", "foreach"]
BASES = [torch.optim.SGD, torch.optim.Adam]


def wrapped(base_class: Any, implementation: str) -> tuple[nn.Sequential, BNPreconditioner]:
    model = mlp()
    return model, BNPreconditioner(base_class(model.parameters(), lr=0.1, **{implementation: True}), model)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base_class", BASES)
def test_a_step_skipped_by_the_scaler_never_existed(base_class: type[Optimizer], implementation: str) -> None:
    def run(batches: list[tuple[Tensor, float]], scale: float) -> tuple[nn.Module, BNPreconditioner]:
        model, optimizer = wrapped(base_class, implementation)
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base_class", BASES)
def test_the_scaler_unscales_before_the_step(base_class: type[Optimizer], implementation: str) -> None:
    """A fused base takes the scale itself if the scaler finds the flag; through the wrapper it must not."""
    model, optimizer = wrapped(base_class, implementation)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for x in inputs(4):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    expected, other = wrapped(base_class, implementation)
    train(expected, other, inputs(4))
    for name, value in weights(expected).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert optimizer.statistics["0"].count == 32


def test_unscale_and_clip_come_before_the_preconditioning() -> None:
    model, optimizer = wrapped(torch.optim.SGD, "foreach")
    expected, other = wrapped(torch.optim.SGD, "foreach")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x in inputs(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        expected(x).square().mean().backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(expected.parameters(), 0.05)) and norm > 0.05
        other.step()
    for name, value in weights(expected).items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_under_autocast_are_those_of_float32(dtype: torch.dtype) -> None:
    """The first layer's input is float32 under autocast too, and hooks do not compute in half precision."""
    model, optimizer = wrapped(torch.optim.SGD, "foreach")
    x = inputs(1, batch=64)[0] + 100  # |mean|/std of 100 and more: half precision would keep no digit of the variance
    with torch.autocast("cpu", dtype=dtype):
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    found = optimizer.statistics["0"]
    assert found.mean.dtype == found.variance.dtype == torch.float32
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance, x.double().var(0, correction=0).float(), rtol=1e-4, atol=0)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_keep_float32_statistics(dtype: torch.dtype, base_class: type[Optimizer]) -> None:
    model = mlp().to(dtype)
    options = {"eps": 1e-4} if base_class is torch.optim.AdamW else {}  # the default is 0 in float16, plain or wrapped
    optimizer = BNPreconditioner(base_class(model.parameters(), lr=0.01, **options), model)  # type: ignore[call-arg]
    data = [x.to(dtype) for x in inputs(20)]

    def loss() -> float:
        with torch.no_grad():
            return model(data[0]).float().square().mean().item()

    first = loss()
    train(model, optimizer, data)
    assert loss() < 0.9 * first
    seen = optimizer.statistics["0"]
    assert seen.mean.dtype == seen.variance.dtype == torch.float32
    assert seen.count == 160
    assert {p.dtype for p in model.parameters()} == {dtype}
