"""Layers' condition numbers against numpy, P per layer type, and hooks that leave nothing behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import BNPCoordinates, layer_conditioning
from tests.conftest import same, weights
from tests.curvature.problems import mlp as net


def data(samples: int = 40, features: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.1, 3, features) + 2
    x[:, 1] = 0.75  # constant
    return x, torch.randint(0, 3, (samples,), generator=generator)


def kappa(m: np.ndarray, share: float = 1.0) -> float:
    values = np.linalg.eigvalsh(m)[::-1]
    return float(values[0] / values[math.ceil(share * len(values)) - 1])


def test_the_input_against_numpy() -> None:
    x, y = data()
    model = net((5, 4, 3))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0), model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    batches = [
        (lambda: F.cross_entropy(model(x[:15]), y[:15]), 15),
        (lambda: F.cross_entropy(model(x[15:]), y[15:]), 25),
    ]
    found = layer_conditioning(model, batches, preconditioner=optimizer, share=0.5)
    assert list(found) == ["0", "2"]
    first = found["0"]
    assert (first.num_observations, first.num_features, first.num_varying, first.bias) == (40, 5, 4, True)
    a = np.concatenate([np.ones((40, 1)), x.numpy()[:, [0, 2, 3, 4]]], 1)
    moment = a.T @ a / 40
    assert first.lambda_max == pytest.approx(np.linalg.eigvalsh(moment).max(), rel=1e-12)
    assert first.kappa == pytest.approx(kappa(moment), rel=1e-9)
    assert first.kappa_p == pytest.approx(kappa(moment, 0.5), rel=1e-9)
    s = optimizer.statistics["0"]
    mean, variance = s.mean.numpy(), s.variance.numpy()
    sigma = np.sqrt(variance + 1e-2 * variance.max() + 1e-4)
    z = np.concatenate([np.ones((40, 1)), ((x.numpy() - mean) / sigma)[:, [0, 2, 3, 4]]], 1)
    after = z.T @ z / 40
    assert first.kappa_preconditioned == pytest.approx(kappa(after), rel=1e-6)
    assert first.kappa_p_preconditioned == pytest.approx(kappa(after, 0.5), rel=1e-6)
    q2 = float(optimizer._tracker.factors(optimizer._tracker.layers[0]).q2)
    assert first.lambda_max_preconditioned == pytest.approx(np.linalg.eigvalsh(after).max() / q2, rel=1e-6)
    assert first.kappa > 20 * first.kappa_preconditioned


def test_the_output_gradient_against_numpy() -> None:
    x, y = data()
    model = net((5, 4, 3))
    outputs = model(x).detach().numpy()
    g = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True) - np.eye(3)[y.numpy()]
    last = layer_conditioning(model, (lambda: F.cross_entropy(model(x), y), 40), share=0.6)["2"]
    values = np.linalg.eigvalsh(g.T @ g / 40)[::-1]
    assert last.lambda_max_gradient == pytest.approx(values[0], rel=1e-9)
    assert last.kappa_p_gradient == pytest.approx(values[0] / values[1], rel=1e-9)
    assert last.kappa_gradient == math.inf  # behind a softmax, gradients sum to zero
    assert math.isnan(last.kappa_preconditioned)
    finite = layer_conditioning(model, lambda: F.cross_entropy(model(x), y), epsilon=1e-3)["2"]
    assert finite.kappa_gradient == pytest.approx(1001, rel=1e-9)  # epsilon's own number
    assert finite.epsilon == 1e-3
    assert set(finite.to_dict()) == set(finite.__dataclass_fields__) - {"name"}
    assert all(isinstance(v, float) for v in finite.to_dict().values())


def test_in_place_activations_and_checkpoints_do_not_mislead() -> None:
    x, y = data()
    plain = net((5, 4, 3))
    plain[1] = nn.ReLU()
    inplace = net((5, 4, 3))
    inplace[1] = nn.ReLU(inplace=True)
    a, b = (layer_conditioning(m, lambda m=m: F.cross_entropy(m(x), y)) for m in (plain, inplace))
    c = layer_conditioning(plain, lambda: F.cross_entropy(checkpoint(plain, x, use_reentrant=False), y))
    for one, other in zip(a.values(), b.values(), strict=True):
        assert one.to_dict() == pytest.approx(other.to_dict(), rel=1e-12, nan_ok=True)
    assert [v.num_observations for v in c.values()] == [40, 40]
    assert [v.kappa for v in c.values()] == [v.kappa for v in a.values()]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_by_channel(groups: int, bias: bool) -> None:
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([1.0, 2, 3, 4])[:, None, None] + torch.tensor([1.0, 0, -5, 2])[:, None, None]
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups, bias=bias)).double()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0), model)

    def loss() -> Tensor:
        return model(x).square().mean()

    loss().backward()
    optimizer.step()
    found = layer_conditioning(model, (loss, 6), preconditioner=optimizer)["0"]
    assert (found.num_observations, found.num_features, found.bias) == (150, 4, bias)
    rows = x.movedim(1, -1).reshape(-1, 4).numpy()
    raw = []
    for part in np.split(rows, groups, 1):
        a = np.concatenate([np.ones((150, 1)), part], 1) if bias else part
        raw.append(kappa(a.T @ a / 150))
    assert found.kappa == pytest.approx(max(raw), rel=1e-9)
    assert found.kappa_preconditioned < 2  # independent channels: all but perfect
    outputs = model(x).detach()
    g = (2 * outputs / outputs.numel() * 6).movedim(1, -1).reshape(-1, 6).numpy()
    largest = max(np.linalg.eigvalsh(part.T @ part / 6).max() for part in np.split(g, groups, 1))
    assert found.lambda_max_gradient == pytest.approx(largest, rel=1e-9)


def test_hooks_go_and_nothing_changes_even_after_an_error() -> None:
    x, y = data()
    model = net((5, 4, 3))
    before = weights(model)

    def fails() -> Tensor:
        model(x)
        raise KeyError("lost")

    layer_conditioning(model, lambda: F.cross_entropy(model(x), y))
    with pytest.raises(KeyError):
        layer_conditioning(model, fails)
    assert not any(m._forward_hooks for m in model.modules())
    assert same(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_layers_without_statistics_and_wrong_arguments() -> None:
    x, y = data()
    model = net((5, 4, 3))
    never = nn.ModuleList([model, nn.Linear(2, 2).double()])
    optimizer = BNPreconditioner(torch.optim.SGD(never.parameters(), lr=0.1), never)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    found = layer_conditioning(never, loss, preconditioner=optimizer)
    assert list(found) == ["0.0", "0.2"]  # what no closure calls is left out
    assert math.isnan(found["0.0"].kappa_preconditioned)
    with pytest.raises(ValueError, match=r"share is 0, it must be in \(0, 1\]"):
        layer_conditioning(model, loss, share=0)
    with pytest.raises(ValueError, match="epsilon is -1, it must be at least 0"):
        layer_conditioning(model, loss, epsilon=-1)


def adjoint(params: list[Tensor], optimizer: BNPreconditioner) -> BNPCoordinates:
    """The coordinates, after a check that to_z is from_z's transpose."""
    s = BNPCoordinates(params, optimizer)
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in range(2))
    left = sum(float((a * b).sum()) for a, b in zip(s.from_z(u), v, strict=True))
    right = sum(float((a * b).sum()) for a, b in zip(u, s.to_z(v), strict=True))
    assert left == pytest.approx(right, rel=1e-9)
    return s


@pytest.mark.parametrize("groups", [1, 2])
def test_p_is_the_optimizers_own(groups: int) -> None:
    """One step of BNP-SGD moves the parameters by -lr P Pᵀg: convolutions, layers without bias, channels last."""
    model: Any = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3, bias=False))
    model = model.double().to(memory_format=torch.channels_last)
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.5), model)
    x = torch.randn(7, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    model(x).square().mean().backward()
    params = list(model.parameters())
    gradients = [p.grad.clone() for p in params]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    s = adjoint(params, optimizer)
    for moved, p, b in zip(s.from_z(s.to_z(gradients)), params, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.5 * moved, rtol=1e-9, atol=1e-12)


def test_what_takes_no_part_is_left_alone() -> None:
    x, y = data()
    model = net((5, 4, 3))
    norm = nn.LayerNorm(3).double()
    whole = nn.Sequential(model, norm)
    model[2].bias.requires_grad_(False)
    optimizer = BNPreconditioner(torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.1), whole)
    params = [p for p in whole.parameters() if p.requires_grad]
    fresh = [torch.ones_like(p) for p in params]
    before = adjoint(params, optimizer)  # no statistics yet: the identity
    assert before.num_preconditioned == 0
    assert same(before.from_z(fresh), fresh)
    F.cross_entropy(whole(x), y).backward()
    optimizer.step()
    now = adjoint(params, optimizer)
    assert now.num_preconditioned == 20 + 4 + 12  # the second layer's weight by the rank-one P
    moved = now.from_z(fresh)
    assert not torch.equal(moved[0], fresh[0])
    assert not torch.equal(moved[2], fresh[2])
    assert torch.equal(moved[3], fresh[3])  # LayerNorm's
    alone = adjoint([model[0].weight], optimizer)  # its bias is not among the parameters
    assert not torch.equal(alone.from_z(fresh[:1])[0], moved[0])
    kept = adjoint([model[0].bias], optimizer)
    assert kept.num_preconditioned == 0
    # later steps do not change these coordinates
    F.cross_entropy(whole(3 * x), y).backward()
    optimizer.step()
    assert same(now.from_z(fresh), moved)
