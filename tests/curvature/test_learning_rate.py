"""The stable rates, against optimizers that run a little below and a little above them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import (
    AdamCoordinates,
    BNPCoordinates,
    HessianOperator,
    PreconditionedOperator,
    coordinates_of,
    estimate_conditioning,
    max_learning_rate,
)


def quadratic() -> tuple[Tensor, nn.Parameter]:
    """½ wᵀHw, with condition number 20, and where to start."""
    generator = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    h = q @ torch.diag(torch.linspace(0.2, 4, 6, dtype=torch.float64)) @ q.T
    return h, nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))


def grows(optimizer: Any, loss: Any, w: nn.Parameter, rate: float, steps: int = 3000) -> bool:
    """Whether the loss explodes at that rate; otherwise it must have vanished."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    first = float(loss().detach())
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        if float(value.detach()) > 1e6 * first:
            return True
        value.backward()
        optimizer.step()
    assert float(loss().detach()) < 1e-3 * first
    return False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 3.8),
        ({"momentum": 0.5}, 3.0),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
        ({"momentum": 0.9, "dampening": 0.5}, 7.6),
    ],
)
def test_sgd(options: dict[str, Any], expected: float) -> None:
    for side in (0.98, 1.02):
        h, w = quadratic()
        optimizer = torch.optim.SGD([w], lr=1.0, **options)

        def loss(h: Tensor = h, w: nn.Parameter = w) -> Tensor:
            return 0.5 * w @ h @ w

        report = estimate_conditioning(loss, [w], num_probes=0, tolerance=1e-9)
        assert report.lambda_max == pytest.approx(4, rel=1e-9)
        assert report.max_learning_rate == pytest.approx(0.5, rel=1e-9)
        bound = max_learning_rate(report.lambda_max, optimizer)
        assert bound == pytest.approx(expected / 4, rel=1e-9)
        assert grows(optimizer, loss, w, side * bound) == (side > 1)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam(amsgrad: bool) -> None:
    """With β₂ so near 1 that its diagonal stays: (2+2β₁)/((1-β₁)λ_max) of D^(-1/2) H D^(-1/2)."""
    for side in (0.98, 1.02):
        h, w = quadratic()
        optimizer = torch.optim.Adam([w], betas=(0.8, 1 - 1e-15), eps=0.01, amsgrad=amsgrad)
        second = torch.linspace(0.1, 3, 6, dtype=torch.float64)
        optimizer.state[w] = {"step": torch.tensor(1e18), "exp_avg": torch.zeros_like(w), "exp_avg_sq": second}
        if amsgrad:
            optimizer.state[w]["max_exp_avg_sq"] = second.clone()

        def loss(h: Tensor = h, w: nn.Parameter = w) -> Tensor:
            return 0.5 * w @ h @ w

        coordinates = coordinates_of(optimizer, [w])
        report = estimate_conditioning(loss, [w], preconditioner=coordinates, num_probes=0, tolerance=1e-9)
        scale = (second.sqrt() + 0.01).rsqrt()
        assert report.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(scale[:, None] * h * scale).max()))
        assert report.coordinates == "Adam's diagonal"
        bound = max_learning_rate(report.lambda_max, optimizer)
        assert bound == pytest.approx(2 * 1.8 / 0.2 / report.lambda_max)
        assert grows(optimizer, loss, w, side * bound) == (side > 1)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_bnp(options: dict[str, Any]) -> None:
    """2/λ_max of PᵀHP is where BNP-SGD diverges, and not 2/λ_max of H."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x * torch.tensor([0.1, 1, 3, 1]) + torch.tensor([1.0, -2, 0, 0.5])
    for side in (0.98, 1.02):
        model = nn.Linear(4, 1).double()
        optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0, **options), model)

        def loss(model: nn.Module = model) -> Tensor:
            return model(x).square().mean()

        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.remove_hooks()
        plain = estimate_conditioning((loss, 40), model.parameters(), num_probes=0, tolerance=1e-9)
        report = estimate_conditioning(
            (loss, 40), model.parameters(), preconditioner=optimizer, num_probes=0, tolerance=1e-9
        )
        bound = max_learning_rate(report.lambda_max, optimizer)
        assert bound == pytest.approx(2 * (1 + options.get("momentum", 0)) / report.lambda_max)
        assert not 0.5 < bound / max_learning_rate(plain.lambda_max, optimizer) < 2
        optimizer.base_optimizer.state.clear()
        assert grows(optimizer, loss, model.weight, side * bound) == (side > 1)


def test_coordinates_of_wrapped_adam() -> None:
    x = torch.randn(30, 4, dtype=torch.float64) + 1
    model = nn.Linear(4, 2).double()
    optimizer = BNPreconditioner(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    params = list(model.parameters())
    first, second = coordinates_of(optimizer, params)
    assert isinstance(first, BNPCoordinates)
    assert isinstance(second, AdamCoordinates)
    assert first.description == "BNP's P on 10 of 10 parameters"
    with optimizer.pause_statistics():
        h = HessianOperator(lambda: model(x).square().mean(), params)
        both = PreconditionedOperator(h, [first, second])
        bnp = PreconditionedOperator(h, first)
        eye = torch.eye(10, dtype=torch.float64)
        inner, outer = (torch.stack([f(e) for e in eye]) for f in (bnp, both))
    scale = torch.cat(
        [((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8).rsqrt().reshape(-1) for p in params]
    )
    torch.testing.assert_close(outer, scale[:, None] * inner * scale, rtol=1e-9, atol=1e-9)
    assert coordinates_of(torch.optim.SGD(params, lr=0.1), params) == []
    with pytest.warns(UserWarning, match="BNPreconditioner"):
        wrong = BNPreconditioner(torch.optim.Adam(model.parameters()), model, mode="gradient")
    with pytest.raises(ValueError, match="use mode='two_sided'"):
        coordinates_of(wrong, params)
    with pytest.raises(ValueError, match="let it make a step first"):
        coordinates_of(torch.optim.Adam(params), params)
    with pytest.raises(TypeError, match="optimizer is a RMSprop"):
        coordinates_of(torch.optim.RMSprop(params), params)


def test_kinds_and_groups() -> None:
    assert max_learning_rate(4.0) == 0.5
    assert max_learning_rate(4.0, momentum=0.5) == 0.75
    assert max_learning_rate(4.0, "adam") == pytest.approx(3.8 / 0.1 / 4)
    assert max_learning_rate(4.0, "adam", betas=(0.5, 0.9)) == pytest.approx(3 / 0.5 / 4)
    assert max_learning_rate(0.0) == max_learning_rate(-1.0) == math.inf
    assert math.isnan(max_learning_rate(math.nan))
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [a], "momentum": 0.9}, {"params": [b], "momentum": 0.5}]
    assert max_learning_rate(1.0, torch.optim.SGD(groups, lr=1.0)) == pytest.approx(3.0)
    assert max_learning_rate(1.0, torch.optim.SGD(groups, lr=1.0), momentum=0.0) == 2.0
    with pytest.raises(TypeError, match="optimizer is a RMSprop, it must be SGD, Adam or AdamW"):
        max_learning_rate(1.0, torch.optim.RMSprop([a]))
    with pytest.raises(ValueError, match="optimizer is 'lion'"):
        max_learning_rate(1.0, "lion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum is 1.0, it must be in \[0, 1\)"):
        max_learning_rate(1.0, momentum=1.0)
