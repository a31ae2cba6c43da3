"""activation_health against loops in NumPy and scipy; what it leaves as it was, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_optim import BNPreconditioner
from bnp_optim.diagnostics import activation_health, step_divergence
from bnp_optim.nn import GammaMeter
from tests.conftest import same, wrap
from tests.diagnostics.nets import closure

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


def rows(values: Tensor, channel: int) -> np.ndarray[Any, Any]:
    """Samples and positions × channels."""
    return np.moveaxis(values.detach().double().numpy(), channel, -1).reshape(-1, values.shape[channel])


def mean_cosine(values: Tensor) -> float:
    """Over all pairs, one by one."""
    flat = values.detach().double().reshape(len(values), -1).numpy()
    pairs = itertools.combinations(flat, 2)
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(1), nn.Linear(80, 6), nn.Tanh(), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
def test_every_number_against_a_slow_reference(norm_mode: str) -> None:
    model = conv_net()
    model.train(norm_mode == "train")
    x, y = torch.randn(9, 2, 6, 6) + 0.5, torch.randint(3, (9,))
    found = activation_health(model, (closure(model, x, y), 9), layers=[nn.Conv2d, "1", model[2], nn.Linear, nn.Tanh])
    assert [r.name for r in found.layers] == ["0", "1", "2", "4", "5", "6"]
    outputs, value = {}, x
    for name, module in model.named_children():
        outputs[name] = value = module(value)
    loss = F.cross_entropy(value, y)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    named = dict(zip([n for n, _ in model.named_parameters()], gradient, strict=True))
    for record in found.layers:
        table = rows(outputs[record.name], 1)
        mean, std = np.abs(table.mean(0)).mean(), table.std(0).mean()
        assert record.mean == pytest.approx(mean, rel=1e-4, abs=1e-7)
        assert record.std == pytest.approx(std, rel=1e-5)
        assert record.mean_to_std == pytest.approx(mean / std, rel=1e-4, abs=1e-6)
        assert record.cosine == pytest.approx(mean_cosine(outputs[record.name]), rel=1e-4, abs=1e-6)
        assert (record.num_samples, record.num_channels) == (9, table.shape[1])
        weight = named.get(f"{record.name}.weight")
        expected = math.nan if weight is None else plain_kurtosis(weight)
        assert record.gradient_kurtosis == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.logit_cosine == pytest.approx(mean_cosine(value), rel=1e-5)
    everything = torch.cat([g.reshape(-1) for g in gradient])
    assert found.gradient_kurtosis == pytest.approx(plain_kurtosis(everything), rel=1e-4)
    known = [plain_kurtosis(named[f"{name}.weight"]) for name in ("0", "1", "4", "6")]
    assert found.median_kurtosis == pytest.approx(np.median(known), rel=1e-4)
    assert found.num_samples == 9


def plain_kurtosis(values: Tensor) -> float:
    """Not the excess over a Gaussian's 3."""
    return float(stats.kurtosis(values.double().flatten().numpy(), fisher=False))


def test_batches_are_one_sample_of_moments() -> None:
    """Channel moments and the gradient are those of all batches together; cosines are of pairs within one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(12, 4) * 2 + 1, torch.randint(3, (12,))
    whole = activation_health(model, (closure(model, x, y), 12))
    parts = [(closure(model, a, b), len(a)) for a, b in zip(x.split([7, 3, 2]), y.split([7, 3, 2]), strict=True)]
    found = activation_health(model, parts)
    for one, other in zip(found.layers, whole.layers, strict=True):
        for key in ("num_samples", "num_channels", "mean", "std", "mean_to_std", "gradient_kurtosis"):
            assert getattr(one, key) == pytest.approx(getattr(other, key), rel=1e-4), key
    for key in ("loss", "gradient_kurtosis", "median_kurtosis", "num_samples"):
        assert getattr(found, key) == pytest.approx(getattr(whole, key), rel=1e-4), key
    logits = [model(part) for part in x.split([7, 3, 2])]
    expected = sum(mean_cosine(part) * len(part) * (len(part) - 1) for part in logits) / (42 + 6 + 2)
    assert found.logit_cosine == pytest.approx(expected, rel=1e-5)


def test_sequences_attention_and_recurrent_layers() -> None:
    """Channels are last there, and samples second where batches are."""
    lstm, attention = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
    head = nn.Linear(4, 2)
    model = nn.ModuleDict({"lstm": lstm, "attention": attention, "head": head})
    x = torch.randn(7, 5, 3)  # 7 positions, 5 samples

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        hidden = lstm(x)[0]
        seen = hidden.transpose(0, 1)
        mixed = attention(seen, seen, seen)[0]
        return seen, mixed, head(mixed)

    found = activation_health(model, lambda: outputs()[2].square().mean())
    assert [r.name for r in found.layers] == ["lstm", "attention", "head"]
    for record, value in zip(found.layers, outputs(), strict=True):
        table = rows(value, 2)
        assert record.num_samples == 5
        assert record.std == pytest.approx(table.std(0).mean(), rel=1e-5)
        assert record.mean == pytest.approx(np.abs(table.mean(0)).mean(), rel=1e-4)
        assert record.cosine == pytest.approx(mean_cosine(value), rel=1e-4)
    # a closure that returns only the loss: the last layer's
    assert found.logit_cosine == found.layers[-1].cosine
    assert found.num_samples is None and math.isnan(found.to_dict()["num_samples"])


def test_tiny_gradients_and_constant_ones() -> None:
    """Fourth powers of 1e-15 are zero in float32."""
    model = nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6)
    small, large = (activation_health(model, lambda s=s: s * model(x).square().mean()) for s in (1e-15, 1.0))
    assert small.gradient_kurtosis == pytest.approx(large.gradient_kurtosis, rel=1e-4)
    constant = activation_health(nn.Sequential(model), lambda: model.weight.sum() + 0 * model(x).sum())
    assert math.isnan(constant.gradient_kurtosis) and math.isnan(constant.median_kurtosis)


class Busy(nn.Module):
    """Draws random numbers, moves its buffers, counts, and has gradients that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
        self.calls: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(float(torch.rand(())))
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_nothing_changes(base: Any, fails: bool) -> None:
    """Not the model, its gradients and the random numbers; nor BNP's statistics, also not at the next step."""
    runs = []
    for looks in (False, True):
        torch.manual_seed(3)
        model = Busy()
        model.net[4].eval()
        optimizer = BNPreconditioner(base(model.parameters(), lr=0.1), model)
        x, y = torch.randn(8, 4) + 1, torch.randint(3, (8,))
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if looks and step:
                look(model, optimizer, x, y, fails)
            optimizer.step()
        runs.append(
            {
                "state": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "grad": [p.grad for p in model.parameters()],
                "calls": model.calls,
                "random": torch.get_rng_state(),
                "modes": [m.training for m in model.modules()],
                "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            }
        )
    for key, expected in runs[0].items():
        assert same(runs[1][key], expected), key


def look(model: nn.Module, optimizer: BNPreconditioner, x: Tensor, y: Tensor, fails: bool) -> None:
    calls = itertools.count()

    def loss() -> Tensor:
        model.train()
        if fails and next(calls) == 2:
            raise KeyError("in the middle")
        return F.cross_entropy(model(x), y)

    memory = [p.data_ptr() for p in model.parameters()]
    if fails:
        with pytest.raises(KeyError):
            activation_health(model, [loss] * 3)
        calls = itertools.count()
        with pytest.raises(KeyError):
            step_divergence(model, loss, preconditioner=optimizer)
    else:
        activation_health(model, loss, layers=["net", nn.Linear])
        step_divergence(model, loss, preconditioner=optimizer)
    assert memory == [p.data_ptr() for p in model.parameters()]


def test_a_graph_from_before_still_goes_backward() -> None:
    """Between forward and backward: autograd finds its tensors as it has saved them."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    loss = F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    step_divergence(model, closure(model, x, y))
    activation_health(model, closure(model, x, y))
    assert same(torch.autograd.grad(loss, list(model.parameters())), expected)


BATCH = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.ReLU(), {}, "model is a ReLU without a layer that BNP knows"),
        (lambda: nn.Linear(4, 2), {"layers": ["head"]}, "layers has 'head', which fits no module of the model"),
        (lambda: nn.Linear(4, 2), {"layers": []}, "layers is empty"),
        (lambda: nn.Linear(4, 2), {"layers": [nn.Conv2d]}, "Conv2d'>, which fits no module"),
        (
            lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)),
            {},
            "closures gave one sample to BatchNorm1d '1' in training mode, whose variance is zero: give batches of two",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(2)), {"layers": ["0"]}, "model has no values for '0.weight' yet"),
    ],
)
def test_models_and_layers_that_cannot_be(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        activation_health(model, lambda: model(BATCH).sum(), **options)


def test_a_sample_in_evaluation_mode_is_welcome() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).eval()
    found = activation_health(model, lambda: model(BATCH).sum())
    assert found.layers[0].num_samples == 1
    assert found.layers[0].std == 0 and math.isnan(found.layers[0].mean_to_std) and math.isnan(found.layers[0].cosine)


@pytest.mark.parametrize("layers", ["0", nn.Linear, [3], nn.ReLU()])
def test_layers_of_the_wrong_kind(layers: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"layers (is|has) .*must be"):
        activation_health(model, lambda: model(BATCH).sum(), layers=layers)


def test_closures_that_leave_the_model_alone() -> None:
    model, other = nn.Sequential(nn.Linear(4, 2)), nn.Linear(4, 2)
    with pytest.raises(ValueError, match="closures called none of the 1 layers"):
        activation_health(model, lambda: other(BATCH).sum())
    with pytest.raises(ValueError, match="loss does not require grad"):
        activation_health(model, lambda: torch.ones(()))
    with pytest.raises(TypeError, match="model is a function"):
        step_divergence(closure, lambda: torch.ones(()), params=model.parameters())


def test_meters_of_gamma_decay_measure_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    meter = GammaMeter("relu", interval=1)
    meter.attach(model[0])
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model(x)
    before = copy.deepcopy(meter.state_dict())
    activation_health(model, closure(model, 3 * x, y))
    step_divergence(model, closure(model, 3 * x, y), step_sizes=[0.1])
    assert meter.averages is not None and before["averages"] is not None
    assert torch.equal(meter.averages, before["averages"])
    assert meter.state_dict()["calls"] == 1


def test_figures() -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    from matplotlib.figure import Figure

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = wrap(model)
    batch = closure(model, torch.randn(6, 4), torch.randint(3, (6,)))
    F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    optimizer.step()
    health = activation_health(model, batch)
    axes = health.plot(Figure().add_subplot())
    assert [line.get_ydata().tolist() for line in axes.lines][1] == [x.std for x in health.layers]
    steps = step_divergence(model, batch, preconditioner=optimizer, step_sizes=[0.1, 1.0])
    axes = steps.plot(Figure().add_subplot())
    assert [tuple(line.get_ydata()) for line in axes.lines][:2] == list(steps.relative_losses.values())


def test_a_compiled_model() -> None:
    """Runs as it was written, and goes by its own names."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    compiled: Any = torch.compile(model, backend="eager")
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    compiled(x)
    assert activation_health(compiled, closure(compiled, x, y)) == activation_health(model, closure(model, x, y))
    steps = [step_divergence(m, closure(m, x, y)).relative_losses for m in (compiled, model)]
    assert steps[0] == steps[1]
    torch.compiler.reset()
