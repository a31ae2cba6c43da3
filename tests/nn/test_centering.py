"""OutputCentering: what is subtracted when, its gradient, and λ_max of wide nets."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim.nn import OutputCentering


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 2, 4), (2, 3, 1, 2, 3)])
def test_the_batch_in_training_and_the_running_mean_in_evaluation(shape: tuple[int, ...]) -> None:
    layer = OutputCentering(3, momentum=0.25).double()
    x, y = torch.randn(shape, dtype=torch.float64) + 4, torch.randn(shape, dtype=torch.float64) - 2
    dims = (0, *range(2, len(shape)))
    means = [t.mean(dims) for t in (x, y)]
    wide = [m.view(3, *(1 for _ in shape[2:])) for m in means]
    torch.testing.assert_close(layer(x), x - wide[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_mean, means[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(layer(y), y - wide[1], rtol=1e-12, atol=1e-12)
    running = (0.75 * means[0] + means[1]) / 1.75
    torch.testing.assert_close(layer.running_mean, running, rtol=1e-12, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(layer(x), x - (0.75 * wide[0] + wide[1]) / 1.75, rtol=1e-12, atol=1e-12)
    assert int(layer.num_batches_tracked) == 2


def test_one_sample_and_online_by_the_mean_of_those_before() -> None:
    samples = torch.randn(5, 3, dtype=torch.float64)
    for online, layers in ((False, OutputCentering(3, momentum=None)), (True, OutputCentering(3, None, online=True))):
        layer = layers.double()
        for t, x in enumerate(samples):
            before = samples[:t].mean(0) if t else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(layer(x[None]), x[None] - before, rtol=1e-12, atol=1e-12)
        assert (layer(samples) - samples).std(0).max() < 1e-12 if online else True
        assert "online=True" in repr(layer) or not online


def test_one_sample_with_positions_keeps_its_content() -> None:
    layer = OutputCentering(3)
    x = torch.randn(1, 3, 5)
    assert torch.equal(layer(x), x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2)))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("online", [False, True])
def test_gradients_are_those_of_the_function(batch: int, online: bool) -> None:
    """Of what is subtracted too, by finite differences; the buffers at each call what they were."""
    start = OutputCentering(3, online=online).double()
    start(torch.randn(4, 3, 2, dtype=torch.float64))

    def function(x: Tensor) -> Any:
        return copy.deepcopy(start)(x)

    x = torch.randn(batch, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    (ones,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(ones, torch.full_like(x, float(batch == 1 or online)), atol=1e-12, rtol=0)


def test_modes_copies_and_state() -> None:
    layer = OutputCentering(3)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 1
    copied, loaded = copy.deepcopy(layer), OutputCentering(3)
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3)
    layer.eval()
    assert torch.equal(copied.eval()(x), layer(x)) and torch.equal(loaded.eval()(x), layer(x))
    assert torch.equal(layer.running_mean, copied.running_mean)
    layer.train()
    bad = x.clone()
    bad[1, 1] = math.nan
    before = copy.deepcopy(layer.state_dict())
    layer(bad)
    layer(torch.randn(0, 3))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_autocast_and_double() -> None:
    layer = OutputCentering(3)
    x = torch.randn(512, 3) + 40
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype is torch.bfloat16 and layer.running_mean.dtype is torch.float32
    torch.testing.assert_close(layer.running_mean, x.bfloat16().float().mean(0), rtol=1e-6, atol=0)
    assert OutputCentering(3).double()(x.double()).dtype is torch.float64


def test_compiled_is_eager() -> None:
    eager = OutputCentering(3)
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True, backend="aot_eager")
    for batch in (8, 5, 1):
        x = torch.randn(batch, 3)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(compiled_layer.state_dict()), dict(eager.state_dict()), rtol=1e-5, atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_features is 0"):
        OutputCentering(0)
    with pytest.raises(ValueError, match="momentum is 2"):
        OutputCentering(3, momentum=2)
    with pytest.raises(TypeError, match="num_features is '3'"):
        OutputCentering("3")  # type: ignore[arg-type]
    for shape in ((3,), (2, 4), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"it must be \(N, 3\) or \(N, 3, \*\)"):
            OutputCentering(3)(torch.randn(shape))


# λ_max of the Fisher information of wide nets

CASES = {"tanh": (torch.tanh, lambda h: 1 - h.square(), 3.0, 0.64), "relu": (torch.relu, torch.sign, 2.0, 0.1)}
OUTPUTS = 2


def kernel(activation: str, width: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs (T, C) of an MLP M-M-M-C, and JJᵀ (T·C, T·C), layer by layer: (δδᵀ) ∘ (hhᵀ + 1)."""
    generator = torch.Generator().manual_seed(seed)
    phi, derivative, w2, b2 = CASES[activation]
    widths = (width, width, width, OUTPUTS)
    h = torch.randn(samples, width, generator=generator)
    hidden, weights = [h], []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        weights.append(torch.randn(n_out, n_in, generator=generator) * (w2 / n_in) ** 0.5)
        h = h @ weights[-1].T + torch.randn(n_out, generator=generator) * b2**0.5
        if i < 2:
            h = phi(h)
            hidden.append(h)
    total = torch.zeros(samples, OUTPUTS, samples, OUTPUTS)
    delta = torch.eye(OUTPUTS).expand(samples, OUTPUTS, OUTPUTS)  # of (sample, output) by unit
    for i in (2, 1, 0):
        flat = delta.reshape(samples * OUTPUTS, -1)
        gram = (flat @ flat.T).view(samples, OUTPUTS, samples, OUTPUTS)
        total += gram * (hidden[i] @ hidden[i].T + 1)[:, None, :, None]
        if i:
            delta = (delta @ weights[i]) * derivative(hidden[i])[:, None, :]
    return h, total.view(samples * OUTPUTS, -1)


def lambda_max(outputs: Tensor, gram: Tensor, layer: nn.Module) -> float:
    """Of F = JᵀJ/T with ``layer`` behind the outputs: A JJᵀ Aᵀ/T, A applied by the layer's own backward pass."""
    leaf = outputs.clone().requires_grad_()
    out = layer(leaf)
    for _ in range(2):
        rows = gram.view(-1, *outputs.shape)
        (back,) = torch.autograd.grad(out, leaf, rows, is_grads_batched=True, retain_graph=True)
        gram = back.reshape(len(gram), -1).T
    return float(torch.linalg.eigvalsh(gram / len(outputs))[-1])


@pytest.mark.parametrize("activation", CASES)
def test_lambda_max_stays_where_it_was_when_the_width_grows(activation: str) -> None:
    """T = M; the plain net's grows about as M."""
    found = {}
    for width in (200, 800):
        outputs, gram = kernel(activation, width, width, seed=0)
        found[width] = [lambda_max(outputs, gram, layer) for layer in (nn.Identity(), OutputCentering(OUTPUTS))]
    plain, centered = (found[800][i] / found[200][i] for i in (0, 1))
    assert 3.2 <= plain <= 4.6
    assert 0.8 <= centered <= 1.3
    assert found[800][0] > 15 * found[800][1]


def test_the_kernel_is_that_of_autograd() -> None:
    outputs, gram = kernel("tanh", 6, 4, seed=1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, generator=generator)
    parameters = []
    for n_in, n_out in ((6, 6), (6, 6), (6, OUTPUTS)):
        parameters.append(torch.randn(n_out, n_in, generator=generator) * (3.0 / n_in) ** 0.5)
        parameters.append(torch.randn(n_out, generator=generator) * 0.8)

    def f(*p: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]) @ p[4].T + p[5]

    torch.testing.assert_close(f(*parameters), outputs)
    blocks = torch.autograd.functional.jacobian(f, tuple(parameters))
    jacobian = torch.cat([b.reshape(4 * OUTPUTS, -1) for b in blocks], 1)
    torch.testing.assert_close(jacobian @ jacobian.T, gram, rtol=1e-4, atol=1e-4)
