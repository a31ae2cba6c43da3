"""One step is the dense P Pᵀ g; the two forms agree for plain SGD; the algebra holds at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.transform import Factors, from_z, precondition, to_z


def random_factors(groups: int, m: int, *, q2: float = 1.7) -> Factors:
    return Factors(
        mean=torch.randn(groups, m, dtype=torch.float64) * 3,
        inv_std=torch.rand(groups, m, dtype=torch.float64) + 0.2,
        q2=torch.tensor(q2, dtype=torch.float64),
        spread=torch.ones((), dtype=torch.float64),
    )


def metric(f: Factors, group: int, bias: bool) -> Tensor:
    """(P Pᵀ)⁻¹ = q² [[1, μᵀ], [μ, μμᵀ + diag σ̃²]], or its lower block without a bias."""
    mu = torch.cat([torch.ones(1, dtype=torch.float64), f.mean[group]])
    full = torch.outer(mu, mu) + torch.diag(torch.cat([torch.zeros(1, dtype=torch.float64), f.inv_std[group] ** -2]))
    return f.q2 * (full if bias else full[1:, 1:])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "rank-one"])
@pytest.mark.parametrize("groups", [1, 3])
def test_precondition_solves_with_the_metric(groups: int, bias: bool) -> None:
    f = random_factors(groups, 6)
    w = torch.randn(groups, 4, 6, dtype=torch.float64)
    b = torch.randn(groups, 4, dtype=torch.float64) if bias else None
    g = w.clone() if b is None else torch.cat([b.unsqueeze(2), w], dim=2)
    expected = torch.stack([torch.linalg.solve(metric(f, k, bias), g[k].T).T for k in range(groups)])
    precondition(w, b, f)
    found = w if b is None else torch.cat([b.unsqueeze(2), w], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "rank-one"])
def test_precondition_is_from_z_of_to_z(bias: bool) -> None:
    f = random_factors(2, 5)
    w = torch.randn(2, 3, 5, dtype=torch.float64)
    b = torch.randn(2, 3, dtype=torch.float64) if bias else None
    w2, b2 = w.clone(), None if b is None else b.clone()
    precondition(w, b, f)
    to_z(w2, b2, f)
    from_z(w2, b2, f)
    torch.testing.assert_close(w2, w, rtol=1e-12, atol=1e-12)
    if b is not None:
        torch.testing.assert_close(b2, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", [precondition, to_z, from_z])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "rank-one"])
def test_zero_mean_and_unit_scale_change_no_bit(transform: Any, bias: bool) -> None:
    f = Factors(torch.zeros(1, 5), torch.ones(1, 5), torch.ones(()), torch.ones(()))
    w, b = torch.randn(1, 4, 5), torch.randn(1, 4) if bias else None
    before = w.clone(), None if b is None else b.clone()
    transform(w, b, f)
    assert torch.equal(w, before[0])
    assert b is None or torch.equal(b, before[1])


def test_one_observation_leaves_the_mean_alone() -> None:
    """With one observation the true G̃_w is zero; float32 rounding must not come back 1/σ̃² times as large."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 7)
    wrapper = BNPreconditioner(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    layer(torch.randn(1, 50) + 1000).square().sum().backward()
    bias_gradient = layer.bias.grad.clone()
    wrapper.step()
    assert torch.count_nonzero(layer.weight.grad) == 0
    torch.testing.assert_close(layer.bias.grad, bias_gradient, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_half_precision_gradients_are_transformed_in_float32(mode: Any, dtype: torch.dtype) -> None:
    """The half-precision result is the float32 one on the same (half-precision) gradient, rounded once."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    half = nn.Linear(6, 4).to(dtype)
    wrappers = [BNPreconditioner(torch.optim.SGD(x.parameters(), lr=0.0), x, mode=mode) for x in (layer, half)]
    for _ in range(3):
        x = (torch.randn(5, 6) + 2).to(dtype)
        layer(x.float()).sum().backward()
        half(x).sum().backward()
        for p, h in zip(layer.parameters(), half.parameters(), strict=True):
            p.grad.copy_(h.grad)
        for wrapper in wrappers:
            wrapper.step()
        for p, h in zip(layer.parameters(), half.parameters(), strict=True):
            assert torch.equal(p.grad.to(dtype), h.grad)
        layer.zero_grad()
        half.zero_grad()


class TestForms:
    """Forms and layouts on whole layers."""

    @pytest.mark.parametrize("step_scale", ["trace", "spectral", "fan_in", None])
    @pytest.mark.parametrize(
        "build",
        [
            lambda: nn.Linear(6, 4),
            lambda: nn.Linear(6, 4, bias=False),
            lambda: nn.Conv2d(6, 4, 3, groups=2),
            lambda: nn.Conv1d(6, 4, 3, bias=False),
        ],
    )
    def test_plain_sgd_does_the_same_in_both_forms(self, build: Any, step_scale: Any) -> None:
        results = []
        for mode in ("gradient", "two_sided"):
            torch.manual_seed(1)
            layer = build().double()
            base = torch.optim.SGD(layer.parameters(), lr=0.3, weight_decay=0.0)
            wrapper = BNPreconditioner(base, layer, mode=mode, step_scale=step_scale)
            generator = torch.Generator().manual_seed(2)
            for _ in range(10):
                shape = {0: (8, 6), 1: (2, 6, 7), 2: (2, 6, 5, 5)}[layer.weight.dim() - 2]
                x = torch.randn(shape, generator=generator, dtype=torch.float64) + 1
                wrapper.zero_grad()
                layer(x).square().mean().backward()
                wrapper.step()
            results.append([p.detach().clone() for p in layer.parameters()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_channels_last_weights_are_transformed_in_place_and_keep_their_layout(self) -> None:
        torch.manual_seed(0)
        plain = nn.Conv2d(3, 4, 3)
        last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        last.load_state_dict(plain.state_dict())
        x = torch.randn(2, 3, 6, 6)
        for mode in ("gradient", "two_sided"):
            for layer in (plain, last):
                wrapper = BNPreconditioner(torch.optim.SGD(layer.parameters(), lr=0.1), layer, mode=mode)
                wrapper.zero_grad()
                layer(x).square().mean().backward()
                if layer is last:
                    layer.weight.grad = layer.weight.grad.contiguous(memory_format=torch.channels_last)
                wrapper.step()
            assert last.weight.grad.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(last.weight.grad, plain.weight.grad, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(last.weight, plain.weight, rtol=1e-5, atol=1e-6)
