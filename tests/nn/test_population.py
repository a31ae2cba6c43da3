"""PopulationNorm against a slow NumPy recursion and against BatchNorm; conversion there and back."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_optim.nn import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d, convert_batchnorm

SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    PopulationNorm1d: (), PopulationNorm2d: (3, 2), PopulationNorm3d: (2, 3, 2)
}  # fmt: skip
CLASSES = list(SHAPES)
BATCH = {PopulationNorm1d: nn.BatchNorm1d, PopulationNorm2d: nn.BatchNorm2d, PopulationNorm3d: nn.BatchNorm3d}


def stream(shape: tuple[int, ...], batches: int, batch: int) -> list[Tensor]:
    scale = torch.tensor([1.0, 5.0, 0.1, 2.0], dtype=torch.float64).view(4, *(1 for _ in shape))
    return [torch.randn(batch, 4, *shape, dtype=torch.float64) * scale + 3 for _ in range(batches)]


def weighted_moments(batches: list[Tensor], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all samples together, those of batch i with weight ``weights[i]`` in all."""
    columns = [x.movedim(1, -1).reshape(-1, 4).numpy() for x in batches]
    mean = sum(w * c.mean(0) for w, c in zip(weights, columns, strict=True))
    return mean, sum(w * ((c - mean) ** 2).mean(0) for w, c in zip(weights, columns, strict=True))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
def test_statistics_are_those_of_all_samples_weighted(kind: Any, batch: int, momentum: float | None) -> None:
    """Independent of the recursion: explicit weights, all samples at once."""
    layer = kind(4, momentum=momentum, dtype=torch.float64)
    assert layer.bias is not None and layer.weight.dtype is torch.float64
    batches = stream(SHAPES[kind], 6, batch)
    for t, x in enumerate(batches, start=1):
        out = layer(x)
        decay = 1.0 if momentum is None else 1 - momentum
        weights = np.array([decay ** (t - i) for i in range(1, t + 1)])
        mean, variance = weighted_moments(batches[:t], weights / weights.sum())
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, variance, rtol=1e-9, atol=1e-14)
        shape = (4, *(1 for _ in SHAPES[kind]))
        expected = (x - torch.tensor(mean).view(shape)) / torch.tensor(variance + 1e-5).sqrt().view(shape)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        if batch == 1 and momentum == 0.3 and not SHAPES[kind]:
            assert float(out.detach().abs().max()) <= math.sqrt(0.7 / 0.3)
    assert int(layer.num_batches_tracked) == 6


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_take_the_statistics_as_constants(kind: Any, affine: bool) -> None:
    layer = kind(4, affine=affine).double()
    for x in stream(SHAPES[kind], 3, 5):
        layer(x)
    x = stream(SHAPES[kind], 1, 5)[0].requires_grad_()
    frozen = copy.deepcopy(layer).eval()
    y = layer(x)
    target = torch.randn_like(y)
    got = torch.autograd.grad((y * target).sum(), [x, *layer.parameters()])
    frozen.running_mean.copy_(layer.running_mean)
    frozen.running_var.copy_(layer.running_var)
    assert torch.equal(frozen(x), y)
    want = torch.autograd.grad((frozen(x) * target).sum(), [x, *frozen.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(frozen, (x,))


def test_the_first_batch_is_normalized_as_batchnorm_would() -> None:
    x = torch.randn(8, 4, 3) * 7 + 100
    torch.testing.assert_close(PopulationNorm1d(4)(x), nn.BatchNorm1d(4)(x), rtol=1e-4, atol=1e-4)
    alone = PopulationNorm1d(4).double()(torch.randn(1, 4, dtype=torch.float64))  # is the mean
    torch.testing.assert_close(alone, torch.zeros_like(alone), rtol=0, atol=1e-9)


def test_the_mode_decides() -> None:
    layer = PopulationNorm1d(4)
    with torch.no_grad():
        layer(torch.randn(8, 4) + 1)
    assert int(layer.num_batches_tracked) == 1
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.eval()
    layer(torch.randn(8, 4) * 9)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_that_is_not_finite_leaves_the_statistics(bad: float, first: bool) -> None:
    layer = PopulationNorm1d(4)
    if not first:
        layer(torch.randn(8, 4))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(8, 4)
    x[3, 2] = bad
    assert not layer(x).isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer(torch.randn(8, 4)).isfinite().all()
    layer(torch.randn(0, 4))
    assert int(layer.num_batches_tracked) == 2 - first


def test_two_forwards_before_a_backward() -> None:
    layer, x = PopulationNorm1d(4), torch.randn(8, 4, requires_grad=True)
    (layer(x) * layer(x + 1)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_half_precision_and_autocast() -> None:
    x = torch.randn(64, 4, 5) * 3 + 20
    layer = PopulationNorm1d(4)
    expected = layer(x)
    reduced = PopulationNorm1d(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = reduced(x.bfloat16())
    assert out.dtype is torch.bfloat16 and reduced.running_var.dtype is torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(reduced.running_var, layer.running_var, rtol=0.02, atol=0)
    half = PopulationNorm1d(4).bfloat16()
    assert half(x.bfloat16()).dtype is half.running_mean.dtype is torch.bfloat16


def test_compiled_is_eager() -> None:
    eager = PopulationNorm1d(4)
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True, backend="aot_eager")
    for batch in (8, 5, 1):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(compiled_layer.state_dict()), dict(eager.state_dict()), rtol=1e-5, atol=1e-6)


def test_weights_of_batchnorm_load() -> None:
    batch, population = nn.BatchNorm2d(4), PopulationNorm2d(4)
    batch(torch.randn(8, 4, 2, 2))
    population.load_state_dict(batch.state_dict())
    assert torch.equal(population.running_var, batch.running_var)
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(population.eval()(x), batch.eval()(x))
    copied = copy.deepcopy(population)
    assert torch.equal(copied(x), population(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features is 0"),
        ({"num_features": 2.5}, "num_features is 2.5"),
        ({"eps": 0}, "eps is 0"),
        ({"momentum": 0.0}, r"momentum is 0.0, it must be in \(0, 1\]"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"track_running_stats": False}, "track_running_stats is False"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PopulationNorm1d(**({"num_features": 4} | options))


def test_bad_input() -> None:
    for kind, shape in ((PopulationNorm1d, (2, 4, 1, 1)), (PopulationNorm2d, (2, 4)), (PopulationNorm3d, (2, 4))):
        with pytest.raises(ValueError, match="expected"):
            kind(4)(torch.randn(shape))


# Conversion


def net() -> nn.Sequential:
    inner = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, affine=False))
    return nn.Sequential(nn.Linear(4, 3), inner, nn.BatchNorm1d(3, eps=1e-3, momentum=0.01).double(), nn.ReLU())


def snapshot(model: nn.Module) -> list[Any]:
    modules = [(name, type(m), m.training, m.extra_repr()) for name, m in model.named_modules()]
    tensors = [(k, v.clone(), v.dtype, v.device) for k, v in model.state_dict(keep_vars=True).items()]
    return [modules, tensors, [id(p) for p in model.parameters()]]


def same(a: list[Any], b: list[Any]) -> bool:
    tensors = all(x[0] == y[0] and torch.equal(x[1], y[1]) and x[2:] == y[2:] for x, y in zip(a[1], b[1], strict=True))
    return a[0] == b[0] and tensors and a[2] == b[2]


def test_there_and_back_is_bitwise() -> None:
    model = net()
    model[1](torch.randn(8, 3))
    model[2].eval()
    calls: list[int] = []
    model[1][0].register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    assert convert_batchnorm(model) is model
    kinds = [type(m) for m in model.modules() if m in (model[1][0], model[1][1], model[2])]
    assert kinds == [PopulationNorm1d] * 3
    assert not model[2].training and model[2].weight.dtype is torch.float64
    between = snapshot(model)
    assert same(between, snapshot(convert_batchnorm(model)))  # idempotent
    assert between[1][0][0] == before[1][0][0] and between[2] == before[2]
    model[1](torch.randn(1, 3))
    assert calls == [1]
    model[1][0].load_state_dict({k.removeprefix("1.0."): v for k, v, *_ in before[1] if k.startswith("1.0.")})
    model[1][1].load_state_dict({k.removeprefix("1.1."): v for k, v, *_ in before[1] if k.startswith("1.1.")})
    assert same(before, snapshot(convert_batchnorm(model, to="batch")))
    assert same(before, snapshot(convert_batchnorm(model, to="batch")))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_normalization_itself(kind: Any) -> None:
    layer = BATCH[kind](4)
    layer(torch.randn(6, 4, *SHAPES[kind]))
    x = torch.randn(6, 4, *SHAPES[kind])
    expected = layer.eval()(x)
    converted = convert_batchnorm(layer)
    assert type(converted) is kind
    assert torch.equal(converted(x), expected)
    assert converted.train()(x[:1]).isfinite().all()


def test_what_is_not_converted() -> None:
    class Mine(nn.BatchNorm1d):
        pass

    class Other(PopulationNorm1d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(3), Mine(3), nn.SyncBatchNorm(3), Other(3))
    with pytest.warns(UserWarning, match=r"left alone what is no plain BatchNorm: '1' \(Mine\), '2' \(SyncBatchNorm\)"):
        convert_batchnorm(model)
    assert [type(m) for m in model] == [PopulationNorm1d, Mine, nn.SyncBatchNorm, Other]
    with pytest.warns(UserWarning, match=r"no plain PopulationNorm: '3' \(Other\)"):
        convert_batchnorm(model, to="batch")
    assert [type(m) for m in model] == [nn.BatchNorm1d, Mine, nn.SyncBatchNorm, Other]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_batchnorm(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "'1' has track_running_stats=False"),
        (nn.BatchNorm1d(3, momentum=0.0), "'1' has momentum 0"),
        (nn.LazyBatchNorm1d(), "'1' is a LazyBatchNorm1d without weights yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_errors_come_before_any_change(bad: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), bad)
    with pytest.raises(ValueError, match=message):
        convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="to is 'pn'"):
        convert_batchnorm(model, to="pn")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        convert_batchnorm("model")  # type: ignore[arg-type]
