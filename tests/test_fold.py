"""fold_normalization: afterwards the model computes what normalizing each layer's input would make it compute."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner, fold_normalization

EPS = 1e-4
ROOT = Path(__file__).parent.parent


def raw(n: int, features: int, seed: int = 0) -> torch.Tensor:
    """Features far from 0, on scales that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.arange(-1, features - 1, dtype=torch.float64)
    return (torch.randn(n, features, dtype=torch.float64, generator=generator) + 3) * scale


def test_an_mlp_computes_what_normalized_inputs_would_make_it_compute() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, new = raw(50, 4), raw(5, 4, seed=1)
    a, b = x.numpy(), new.numpy()
    for i in (0, 3):  # NumPy: statistics of the batch, the same map for new samples
        w, bias = model[i].weight.detach().numpy().copy(), model[i].bias.detach().numpy().copy()
        mean, std = a.mean(0), np.sqrt(a.var(0) + EPS)
        a, b = ((v - mean) / std @ w.T + bias for v in (a, b))
        if i == 0:
            a, b = np.tanh(a), np.tanh(b)
    assert fold_normalization(model, x) == ["0", "3"]
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    np.testing.assert_allclose(model(x).detach().numpy(), a, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model(new).detach().numpy(), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_does_too_where_nothing_is_padded(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    before = copy.deepcopy(conv)
    x = raw(8, 4)[:, :, None, None] * (1 + torch.rand(8, 4, 5, 5, dtype=torch.float64))
    fold_normalization(conv, x)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(conv(x), before((x - mean) / (var + EPS).sqrt()), rtol=1e-9, atol=1e-9)


def test_without_a_bias_the_metric_is_that_of_the_rank_one_form() -> None:
    """P with P Pᵀ = (μμᵀ + diag σ̃²)⁻¹ and P = diag(1/σ̃) S, S symmetric and positive."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    x = raw(50, 4)
    fold_normalization(layer, x)
    mean, var = x.mean(0), x.var(0, correction=0) + EPS
    p = layer.weight.detach().t()  # rows of the weight are Pz, z the rows of I
    metric = torch.outer(mean, mean) + torch.diag(var)
    torch.testing.assert_close(p @ p.t() @ metric, torch.eye(4, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(var.sqrt()[:, None] * p, (var.sqrt()[:, None] * p).t(), rtol=1e-8, atol=1e-12)


def test_tied_weights_and_repeated_calls_change_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    model = Twice()
    single = copy.deepcopy(model.layer)
    x = raw(20, 3).float()
    assert fold_normalization(model, x) == ["layer"]
    fold_normalization(single, x)
    torch.testing.assert_close(model.layer.weight, single.weight)


def test_only_the_named_layers_change_and_none_without_a_rule() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    before = copy.deepcopy(model.state_dict())
    assert fold_normalization(model, (raw(10, 3),), layers=["0"]) == ["0"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("inputs", "options", "match"),
    [
        (raw(1, 3), {}, "'0' saw one observation: inputs must have two samples"),
        (torch.full((4, 3), torch.inf, dtype=torch.float64), {}, "input of layer '0' is not finite: check inputs"),
        (raw(9, 3), {"layers": ["1"]}, r"layers has \['1'\].*choose from \['0', '2'\]"),
        (raw(9, 3), {"var_eps": 0.0}, "var_eps is 0.0"),
        (raw(9, 3), {"var_rel_eps": -1.0}, "var_rel_eps is -1.0"),
    ],
)
def test_refusals_leave_the_model_as_it_was(inputs: torch.Tensor, options: dict[str, object], match: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        fold_normalization(model, inputs, **options)  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_an_error_in_a_later_layer_takes_the_earlier_ones_back() -> None:
    class Shrinks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:1]

    model = nn.Sequential(nn.Linear(3, 4), Shrinks(), nn.Linear(4, 2)).double().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'2' saw one observation"):
        fold_normalization(model, raw(9, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


def test_raw_features_no_longer_need_thousands_of_steps() -> None:
    torch.manual_seed(0)
    x = raw(200, 5).float()
    y = (torch.argsort(torch.argsort(x[:, 0] / x[:, 0].std() + x[:, 4] / x[:, 4].std())) >= 100).long()
    losses = []
    for fold in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
        if fold:
            fold_normalization(model, x[:20])
        optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
        for i in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            optimizer.step()
        losses.append(nn.functional.cross_entropy(model(x), y).item())
    assert losses[1] < 0.45 < losses[0] / 2, losses


def test_the_documented_example_starts_from_moderate_outputs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), flags=re.S)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(code, scope)
    hidden = scope["model"][0](scope["first"])
    torch.testing.assert_close(hidden.mean(0), _initial_bias(), rtol=1e-4, atol=1e-4)  # Linear's own, after centring
    assert hidden.std() < 1.5 and "BNPreconditioner(SGD" in repr(scope["optimizer"])


def _initial_bias() -> torch.Tensor:
    torch.manual_seed(0)
    return nn.Linear(4, 32).bias.detach()


def folded_run(base: type[torch.optim.Optimizer], units: torch.Tensor, steps: int = 40, **options: Any) -> torch.Tensor:
    """Predictions after training from a fold, on inputs in the given ``units``, one sample per step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = raw(steps + 20, 3) * units
    fold_normalization(model, x[:20], var_eps=1e-30)
    optimizer = BNPreconditioner(base(model.parameters(), lr=0.03), model, var_eps=1e-30, **options)
    for i in range(20, len(x)):
        optimizer.zero_grad()
        (model(x[i : i + 1]) - x[i, 0] / units[0]).square().sum().backward()
        optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_after_a_fold_training_does_not_depend_on_the_units_of_the_inputs(base: Any) -> None:
    one, other = torch.ones(3, dtype=torch.float64), torch.tensor([1e3, 1e-2, 7.0], dtype=torch.float64)
    torch.testing.assert_close(folded_run(base, one), folded_run(base, other), rtol=1e-6, atol=1e-8)


def test_floors_are_in_the_units_of_the_fold() -> None:
    """σ̃² = σ² + ε1 max_k(σ_k²/u_k) u + ε2, in NumPy; a layer that was not folded keeps ε1 max(σ²)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    before, batch = raw(30, 3), raw(10, 3, seed=1)
    fold_normalization(model, before, layers=["0"])
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0), model, step_scale=None)
    hidden = model[0](batch).detach().numpy()
    model(batch).square().sum().backward()
    gradients = [m.weight.grad.numpy().copy() for m in model]
    biases = [m.bias.grad.numpy().copy() for m in model]
    optimizer.step()
    for i, a in enumerate((batch.numpy(), hidden)):
        variance = a.var(0)
        u = before.numpy().var(0) + EPS if i == 0 else np.ones(4)
        floored = variance + 1e-2 * (variance / u).max() * u + EPS
        expected = (gradients[i] - np.outer(biases[i], a.mean(0))) / floored
        np.testing.assert_allclose(model[i].weight.grad.numpy(), expected, rtol=1e-9)


def test_units_travel_with_copies_and_checkpoints_and_not_with_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    plain = copy.deepcopy(model)
    fold_normalization(model, raw(30, 3))
    assert list(model.state_dict()) == list(plain.state_dict())
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.01), model)

    def train(net: nn.Module, around: BNPreconditioner, seed: int) -> None:
        around.zero_grad()
        net(raw(5, 3, seed)).square().sum().mul(1e-6).backward()
        around.step()

    train(model, optimizer, 1)
    plain.load_state_dict(model.state_dict())  # never folded
    resumed = BNPreconditioner(torch.optim.SGD(plain.parameters(), lr=0.01), plain)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, around = copy.deepcopy((model, optimizer))
    for net, opt in ((model, optimizer), (plain, resumed), (copied, around)):
        train(net, opt, 2)
        opt.rescan()
        train(net, opt, 3)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model.parameters(), strict=True))

    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["state"][0]["bnp_units"] = torch.ones(2)
    with pytest.raises(ValueError, match="bnp_units of shape"):
        resumed.load_state_dict(damaged)


def test_units_that_a_cast_has_ruined_are_not_used() -> None:
    model = nn.Linear(3, 2)
    fold_normalization(model, torch.randn(20, 3) * torch.tensor([1.0, 1.0, 1e4]))
    model.half().float()  # 1e8 is infinite in between
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=1e-3), model)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert "bnp_units" not in optimizer.state_dict()["state"].get(0, {})
    assert model.weight.isfinite().all()


def test_a_deep_net_that_loses_its_signal_no_longer_does() -> None:
    """PyTorch's weights have a variance of 1/(3·fan_in): with a ReLU the signal's variance falls ninefold a layer."""
    torch.manual_seed(0)
    widths = (3, 16, 16, 32, 32, 64)
    net = nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())))
    images = torch.randn(256, 3, 8, 8)

    def spreads() -> list[float]:  # of what a layer puts out, over the samples
        found, x = [], images
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                found.append(float(x.std(0).square().mean().sqrt()))
        return found

    with torch.no_grad():
        before = spreads()
        fold_normalization(net, images)
        after = spreads()
    assert before[-1] < 0.02 * before[0]
    for spread in after:
        assert 0.45 < spread < 0.6  # √(1/3) = .58, less where padding is zero
