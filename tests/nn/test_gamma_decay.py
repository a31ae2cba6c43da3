"""ζ against the true batch noise and its formula; the penalty's gradient; what is decayed, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.nn import (
    GammaDecayPenalty,
    GammaMeter,
    PopulationNorm1d,
    PopulationNorm2d,
    convert_batchnorm,
    gamma_decay_coefficient,
)
from bnp_optim.nn.activations import _BY_NAME, following_activations, slope

EXPECTED = {"identity": 0.75, "relu": 0.375}
PRIMITIVES: dict[str, Any] = {"identity": lambda h: h.square() / 2, "relu": lambda h: F.relu(h).square() / 2}


def noise(name: str, batch_size: int, gamma: float = 1.0, samples: int = 2**21) -> float:
    """(mean loss with BN - mean loss with PN)/γ², on the in-batch samples themselves.

    The loss is the paper's, A(h̄) - y·h̄ with A' the activation, and y the net's own mean response A'(h̄) under PN.
    """
    generator = torch.Generator().manual_seed(batch_size)
    x = torch.randn(batch_size, samples // batch_size, generator=generator, dtype=torch.float64)  # each column a batch
    batch = nn.BatchNorm1d(x.shape[1], eps=1e-12, dtype=torch.float64)
    population = nn.BatchNorm1d(x.shape[1], eps=1e-12, dtype=torch.float64).eval()  # mean 0, variance 1
    a, activation = PRIMITIVES[name], _BY_NAME[name]
    with torch.no_grad():
        noisy, clean = gamma * batch(x), gamma * population(x)
        y = activation(clean)
        return float((a(noisy) - y * noisy - a(clean) + y * clean).mean() / gamma**2)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_noise_of_batches_adds(name: str) -> None:
    measured = {m: noise(name, m) for m in (8, 32, 128)}
    assert 32 * measured[32] == pytest.approx(EXPECTED[name], rel=0.05)
    logs = [(math.log(m), math.log(z)) for m, z in measured.items()]
    assert (logs[2][1] - logs[0][1]) / (logs[2][0] - logs[0][0]) == pytest.approx(-1, abs=0.05)
    assert noise(name, 32, gamma=3.0) == pytest.approx(measured[32], rel=1e-6)  # these losses are quadratic in γ


@pytest.mark.parametrize("name", EXPECTED)
def test_the_estimate(name: str) -> None:
    """Measured on PopulationNorm as it trains, and by quadrature."""
    layer, meter = PopulationNorm1d(4, momentum=0.01), GammaMeter(name, interval=1, momentum=0.02)
    untouched = gamma_decay_coefficient(layer, 32, activation=name)
    torch.testing.assert_close(32 * untouched, torch.full((4,), EXPECTED[name]), rtol=1e-4, atol=0)
    meter.attach(layer)
    for _ in range(200):
        layer(torch.randn(256, 4) * torch.tensor([0.1, 1.0, 5.0, 20.0]) + 7)
    estimates = {m: gamma_decay_coefficient(layer, m) for m in (8, 32, 128)}
    torch.testing.assert_close(32 * estimates[32], torch.full((4,), EXPECTED[name]), rtol=0.05, atol=0)
    slopes = (estimates[128].log() - estimates[8].log()) / math.log(16)
    torch.testing.assert_close(slopes, torch.full((4,), -1.0), rtol=0, atol=1e-5)
    assert float(estimates[32].mean()) == pytest.approx(noise(name, 32), rel=0.05)


def test_the_estimate_is_its_formula() -> None:
    """One measurement, float64, heavy tails, any γ and β; smooth activation against its derivative by hand."""
    layer = PopulationNorm1d(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        layer.bias.copy_(torch.tensor([0.3, -1.0, 0.0]))
    GammaMeter(nn.Tanh(), interval=1).attach(layer)
    x = torch.randn(500, 3, dtype=torch.float64) ** 3
    h = layer(x).detach()
    standard = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    rho = standard.pow(4).mean(0) / standard.square().mean(0).square() - 3
    second = 1 - torch.tanh(h).square()
    expected = (rho + 2) / (8 * 16) * (second * standard.square()).mean(0) + second.mean(0) / (2 * 16)
    torch.testing.assert_close(gamma_decay_coefficient(layer, 16), expected, rtol=1e-10, atol=0)
    assert rho.min() > 5


def test_the_quadrature_is_the_integral() -> None:
    layer = PopulationNorm1d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        layer.bias.copy_(torch.tensor([0.3, -1.0, 0.5]))
    layer(torch.randn(10, 3))
    z = torch.randn(400_000, 1, dtype=torch.float64)
    for name in ("tanh", "relu"):
        second = slope(_BY_NAME[name], z * layer.weight.detach() + layer.bias.detach())
        expected = (second * z.square()).mean(0) / (4 * 32) + second.mean(0) / (2 * 32)
        found = gamma_decay_coefficient(layer, 32, activation=name)
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", _BY_NAME)
def test_slopes_by_finite_differences(name: str) -> None:
    x = torch.linspace(-3, 3, 12, dtype=torch.float64)  # no kink on the grid
    f = _BY_NAME[name]
    torch.testing.assert_close(slope(f, x), (f(x + 1e-6) - f(x - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
    inplace = nn.ReLU(inplace=True)
    torch.testing.assert_close(slope(inplace.forward, x), (x > 0).double())


def test_meters_of_layers_without_normalization() -> None:
    """A linear layer's output, by its own running statistics; positions of a Linear's input are samples."""
    layer = nn.Linear(3, 2).double()
    meter = GammaMeter("identity", interval=1, momentum=0.5)
    meter.attach(layer)
    batches = [torch.randn(200, 4, 3, dtype=torch.float64) * 2 + 5 for _ in range(3)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(
        32 * gamma_decay_coefficient(layer, 32), torch.full((2,), 0.75).double(), rtol=0.1, atol=0
    )
    outs = [layer(x).detach().reshape(-1, 2) for x in batches]
    assert meter.population is not None
    # the three calls above measured as well, with the same batches again
    weights = torch.tensor([1.0, 2, 4, 8, 16, 32], dtype=torch.float64) / 63
    mean = sum(w * o.mean(0) for w, o in zip(weights, outs * 2, strict=True))
    variance = sum(w * (o - mean).square().mean(0) for w, o in zip(weights, outs * 2, strict=True))
    torch.testing.assert_close(meter.population[0], mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(meter.population[1], variance, rtol=1e-9, atol=1e-9)


def test_when_a_meter_measures() -> None:
    layer, meter = PopulationNorm1d(2), GammaMeter("relu", interval=3)
    handle = meter.attach(layer)
    for i in range(7):
        layer(torch.randn(4, 2))
        assert meter._measured == i // 3 + 1
    with meter.pause(), meter.pause():
        layer(torch.randn(4, 2))
    layer.eval()
    layer(torch.randn(4, 2))
    assert meter._calls == 7
    layer.train()
    before = gamma_decay_coefficient(layer, 8)
    bad = torch.full((4, 2), math.nan)
    for _ in range(3):
        layer(bad)
    assert torch.equal(gamma_decay_coefficient(layer, 8), before)
    copied = copy.deepcopy(layer)
    assert torch.equal(gamma_decay_coefficient(copied, 8), before)
    other = GammaMeter("relu")
    other.load_state_dict(copy.deepcopy(meter.state_dict()))
    assert torch.equal(other.coefficient(8), before)  # type: ignore[arg-type]
    handle.remove()


# The penalty


def pn_net() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh(),
        nn.Linear(5, 3),
    ).double()  # fmt: skip
    convert_batchnorm(net)
    return net


def free_net(groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=groups), nn.ReLU(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(16, 5),
        nn.Dropout(0.0), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def data() -> Tensor:
    return torch.randn(8, 2, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 3.0]).view(2, 1, 1) + 1


def trained(net: nn.Module, optimizer: Any, penalty: GammaDecayPenalty | None = None, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(data()).square().mean().backward()
        if penalty is not None:
            penalty.add_gradients()
        optimizer.step()


def test_population_norm_is_decayed() -> None:
    net = pn_net()
    penalty = GammaDecayPenalty(net, 16, strength=2.0)
    assert repr(penalty) == "GammaDecayPenalty(2 layers, γ of PopulationNorm, batch_size=16, strength=2)"
    net(data()).sum().backward()
    zeta = penalty.coefficients
    assert list(zeta) == ["1", "5"]
    for name in zeta:
        torch.testing.assert_close(zeta[name], gamma_decay_coefficient(net.get_submodule(name), 16))
    value = penalty()
    expected = 2 * sum((zeta[n] * net.get_submodule(n).weight.square()).sum() for n in zeta)
    torch.testing.assert_close(value, expected)
    # by finite differences, and 2ζγ
    for name in zeta:
        gamma = net.get_submodule(name).weight
        (gradient,) = torch.autograd.grad(penalty(), gamma)
        torch.testing.assert_close(gradient, 4 * zeta[name] * gamma)
        for i in range(len(gamma)):
            with torch.no_grad():
                gamma[i] += 1e-5
                above = penalty().item()
                gamma[i] -= 2e-5
                below = penalty().item()
                gamma[i] += 1e-5
            assert (above - below) / 2e-5 == pytest.approx(float(gradient[i]), rel=1e-6)
    before = [p.grad.clone() for p in net.parameters()]
    added = penalty.add_gradients()
    assert not added.requires_grad and float(added) == pytest.approx(value.item())
    for (name, p), old in zip(net.named_parameters(), before, strict=True):
        decayed = name in ("1.weight", "5.weight")
        torch.testing.assert_close(p.grad - old, 4 * zeta[name[0]] * p.detach() if decayed else torch.zeros_like(p))
    only = net[1].weight
    others = net[5].weight.grad.clone()
    penalty.add_gradients([only])
    assert torch.equal(net[5].weight.grad, others)
    penalty.remove()
    assert not net[1]._forward_hooks


@pytest.mark.parametrize("groups", [1, 2])
def test_nets_free_of_normalization_are_decayed(groups: int) -> None:
    """γ² = Σ w²σ², with the gradient by finite differences; the last layer is left alone."""
    net = free_net(groups)
    optimizer = BNPreconditioner(torch.optim.SGD(net.parameters(), lr=0.01), net)
    penalty = GammaDecayPenalty(net, 16, optimizer=optimizer, interval=1)
    assert repr(penalty).startswith("GammaDecayPenalty(2 layers, implicit γ under BNP")
    assert penalty().item() == 0  # no statistics before the first step
    trained(net, optimizer, penalty)
    zeta, statistics = penalty.coefficients, optimizer.statistics
    assert list(zeta) == ["0", "4"]
    conv, linear = net[0], net[4]
    channels = [j % (2 // groups) + g * (2 // groups) for g in range(groups) for j in range(2 // groups)]
    per_unit = torch.stack([statistics["0"].variance[channels].view(groups, -1)[u * groups // 4] for u in range(4)])
    gamma2 = (conv.weight.square() * per_unit[:, :, None, None]).sum((1, 2, 3))
    expected = (zeta["0"] * gamma2).sum() + (
        zeta["4"] * (linear.weight.square() * statistics["4"].variance).sum(1)
    ).sum()
    torch.testing.assert_close(penalty(), expected)
    for weight in (conv.weight, linear.weight):
        (gradient,) = torch.autograd.grad(penalty(), weight)
        flat = weight.detach().view(-1)
        for i in range(0, len(flat), 7):
            flat[i] += 1e-5
            above = penalty().item()
            flat[i] -= 2e-5
            below = penalty().item()
            flat[i] += 1e-5
            assert (above - below) / 2e-5 == pytest.approx(float(gradient.flatten()[i]), rel=1e-5, abs=1e-12)
    unused = torch.autograd.grad(penalty(), [net[7].weight, conv.bias], allow_unused=True)
    assert unused == (None, None)


def test_under_p_it_is_weight_decay_of_z_at_a_constant_beta() -> None:
    """P Pᵀ of the penalty's gradient is 2ζw/q², and the mean β = b + wᵀμ of the pre-activation stays."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = BNPreconditioner(base, net, var_rel_eps=0.0, var_eps=1e-12, step_scale="fan_in")
    penalty = GammaDecayPenalty(net, 4, optimizer=optimizer, interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 3, dtype=torch.float64) * 4 + 2).square().mean().backward()
        optimizer.step()
    layer, statistics, zeta = net[0], optimizer.statistics["0"], penalty.coefficients["0"]
    weight, beta = layer.weight.detach().clone(), layer.weight @ statistics.mean + layer.bias
    optimizer.zero_grad()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    penalty.add_gradients()
    with optimizer.pause_statistics():
        optimizer.step()
    q2 = 3 / 2  # n/N
    torch.testing.assert_close(layer.weight, weight * (1 - 0.1 * 2 * zeta[:, None] / q2), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer.weight @ statistics.mean + layer.bias, beta, rtol=1e-9, atol=1e-9)


def test_the_implicit_gamma_is_the_standard_deviation() -> None:
    """Of the pre-activation, where inputs are uncorrelated; and ζγ² of the folded net is that of the normalized one."""
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = BNPreconditioner(torch.optim.SGD(net.parameters(), lr=0.0), net)
    penalty = GammaDecayPenalty(net, 32, optimizer=optimizer, interval=1)
    x = [torch.randn(512, 6) * torch.linspace(0.5, 3, 6) + 1 for _ in range(40)]
    for part in x:
        optimizer.zero_grad()
        net(part).square().mean().backward()
        optimizer.step()
    h = net[0](torch.cat(x)).detach()
    normalized = nn.Sequential(PopulationNorm1d(4, momentum=0.02), nn.ReLU())
    with torch.no_grad():
        normalized[0].weight.copy_(h.std(0))
        normalized[0].bias.copy_(h.mean(0))
    explicit = GammaDecayPenalty(normalized, 32, interval=1)
    for part in h.split(512):
        normalized(part)
    torch.testing.assert_close(penalty(), explicit(), rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", ["pn", "free"])
def test_in_the_loss_it_is_the_same(kind: str) -> None:
    after = []
    for in_loss in (True, False):
        torch.manual_seed(3)
        net = pn_net() if kind == "pn" else free_net()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
        if kind == "free":
            optimizer = BNPreconditioner(optimizer, net)
        penalty = GammaDecayPenalty(net, 4, optimizer=optimizer if kind == "free" else None)
        for _ in range(4):
            optimizer.zero_grad()
            loss = net(data()).square().mean()
            (loss + penalty() if in_loss else loss).backward()
            if not in_loss:
                penalty.add_gradients()
            optimizer.step()
        after.append(list(net.parameters()))
    for p, q in zip(*after, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_compiled_nets_fall_back_on_gaussian_pre_activations() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    convert_batchnorm(net)
    penalty = GammaDecayPenalty(net, 32)
    torch.compile(net, backend="aot_eager")(torch.randn(8, 3))
    assert penalty.coefficients == {}
    with pytest.warns(UserWarning, match="'1' ran, but nothing of it was measured"):
        value = penalty()
    assert value.item() == pytest.approx(4 * 0.375 / 32, rel=1e-3)


def test_what_follows_a_layer() -> None:
    norms = [PopulationNorm2d(3) for _ in range(4)]
    relu, gelu = nn.ReLU(), nn.GELU()
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 3, 1), norms[0]),
        relu,
        norms[1],
        nn.Dropout(),
        gelu,
        norms[2],
        nn.Softmax(1),
        norms[3],
    )
    assert following_activations(net) == {norms[0]: relu, norms[1]: gelu}
    with pytest.raises(ValueError, match=re.escape("activation is not given for '5', '7'")):
        GammaDecayPenalty(net, 8)
    penalty = GammaDecayPenalty(net, 8, activation="relu")
    assert list(penalty.meters) == ["0.1", "2", "5", "7"]
    told = GammaDecayPenalty(net, 8, activation={"5": torch.tanh, "7": "identity", "0.1": nn.Tanh()})
    assert told.meters["5"].activation is torch.tanh


def test_bad_arguments() -> None:
    net, free = pn_net(), free_net()
    optimizer = BNPreconditioner(torch.optim.SGD(free.parameters(), lr=0.1), free)
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    cases: list[tuple[Any, str]] = [
        (lambda: GammaDecayPenalty("net", 8), "model must be a torch.nn.Module, got str"),
        (lambda: GammaDecayPenalty(net, 1), "batch_size is 1, it must be at least 2"),
        (lambda: GammaDecayPenalty(net, math.nan), "batch_size is nan"),
        (lambda: GammaDecayPenalty(net, 8, strength=-1), "strength is -1"),
        (lambda: GammaDecayPenalty(net, 8, interval=0), "interval is 0"),
        (lambda: GammaDecayPenalty(plain, 8), "neither PopulationNorm"),
        (lambda: GammaDecayPenalty(PopulationNorm1d(2, affine=False), 8), "neither PopulationNorm layers with γ"),
        (lambda: GammaDecayPenalty(free, 8, optimizer=torch.optim.SGD(free.parameters())), "a BNPreconditioner"),
        (lambda: GammaDecayPenalty(net, 8, activation={"9": "relu"}), "activation names '9', which is no layer"),
        (lambda: GammaDecayPenalty(net, 8, activation="swoosh"), "activation is 'swoosh', it must be one of"),
        (lambda: GammaDecayPenalty(net, 8, activation={"1": nn.ReLU}), "it must be a name such as 'relu', a module"),
        (lambda: GammaDecayPenalty(free, 8, optimizer=optimizer, activation="relu"), "it must be said which layers"),
        (lambda: gamma_decay_coefficient("layer", 8), "layer must be a torch.nn.Module, got str"),
        (lambda: gamma_decay_coefficient(nn.Linear(2, 2), 8), "layer Linear is no normalization and was not measured"),
        (lambda: gamma_decay_coefficient(PopulationNorm1d(2), 8), "activation is None and the layer was not measured"),
        (lambda: gamma_decay_coefficient(PopulationNorm1d(2), 0, activation="relu"), "batch_size is 0"),
        (lambda: GammaMeter("relu", momentum=0), "momentum is 0"),
        (lambda: slope(lambda h: h.sum(), torch.ones(2, 2)), r"makes \(\) of \(2, 2\): it must be elementwise"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.fc(x)))  # type: ignore[no-any-return]

    model = Functional()
    bnp = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=r"no activation module follows a layer in an nn\.Sequential"):
        GammaDecayPenalty(model, 8, optimizer=bnp)
    assert list(GammaDecayPenalty(model, 8, optimizer=bnp, activation={"fc": "relu"}).meters) == ["fc"]
