"""Random layers, inputs and options: one wrapped step is the dense P Pᵀ g of the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.cases import LayerCase
from tests.reference.numpy_bnp import ReferenceBNP

TOLERANCE = 1e-9  # relative to the largest gradient entry, raw or preconditioned
CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

exactly_so = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
options = st.fixed_dictionaries(
    {
        "stat_decay": st.sampled_from([0.0, 0.5, 0.99]),
        "var_rel_eps": st.sampled_from([0.0, 1e-2, 0.5]),
        "var_eps": st.sampled_from([1e-4, 1e-2]),
        "step_scale": st.sampled_from(["trace", "common", "spectral", "fan_in", None]),
        "debias": st.booleans(),
        "variance": st.sampled_from(["total", "batch"]),
    }
)


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution, and the shape of one sample that it takes."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = each(0, 2)
    if padding == "same":
        stride = (1,) * dims
        # an even kernel is padded unevenly, which the reference does not know
        kernel = tuple(k | 1 for k in kernel)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    # large enough for the kernel without padding, and for any padding mode with it
    size = [max(r, 3 if dims == 3 else 4) + draw(st.integers(0, 1)) for r in reach]
    layer = CONV[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
    )
    return layer, (layer.in_channels, *size)  # type: ignore[return-value]


@st.composite
def transposed(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """A transposed convolution, and the shape of one sample that it takes."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, size = each(1, 3), each(1, 3), each(1, 2), each(2, 3)
    layer = TRANSPOSED[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        # an output must be left
        tuple(draw(st.integers(0, min(1, d * (k - 1)))) for d, k in zip(dilation, kernel, strict=True)),
        tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
        groups,
        draw(st.booleans()),
        dilation,
        dtype=torch.float64,
    )
    return layer, (layer.in_channels, *size)  # type: ignore[return-value]


def check(layer: nn.Module, batches: list[Tensor], choice: dict[str, Any]) -> None:
    """Steps of SGD with rate 0.1: gradients, and the parameters after them, against the reference."""
    reference_layer = LayerCase("random", lambda: layer, lambda n: (n,)).reference_layer()
    optimizer = BNPreconditioner(torch.optim.SGD(layer.parameters(), lr=0.1), layer, **choice)
    direction = None
    if choice["step_scale"] == "spectral":
        found = optimizer._tracker.snapshot(optimizer._tracker.layers[0])["direction"].numpy()
        direction = found if reference_layer.bias else found[:, 1:]
    reference = ReferenceBNP(reference_layer, direction=direction, **choice)
    parameters = list(layer.parameters())
    for x in batches:
        optimizer.zero_grad()
        y = layer(x)
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        raw = [p.grad.numpy().copy() for p in parameters]
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        reference.observe(x.numpy())
        reference.commit()
        if x.numel() == 0 and reference.steps == 0:
            expected = raw  # nothing was seen yet: passes through
        else:
            mapped = reference.gradient_form(raw[0], raw[1] if len(raw) > 1 else None)
            expected = [g for g in mapped if g is not None]
        scale = max(np.abs(g).max() for g in [*raw, *expected]) or 1.0
        for p, w, g in zip(parameters, before, expected, strict=True):
            assert np.abs(p.grad.numpy() - g).max() <= TOLERANCE * scale
            assert torch.equal(p.detach(), w.sub(p.grad, alpha=0.1))
        statistics = optimizer.statistics[""]
        np.testing.assert_allclose(statistics.mean.numpy(), reference.mean, rtol=1e-9, atol=1e-12)
        if reference.steps:
            np.testing.assert_allclose(statistics.variance.numpy(), reference.variance, rtol=1e-9, atol=1e-12)


def batch(shape: tuple[int, ...], seed: int, step: int, channel_dim: int) -> Tensor:
    """Off-centre channels in different scales."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    channels = shape[channel_dim]
    view = [channels if d % len(shape) == channel_dim % len(shape) else 1 for d in range(len(shape))]
    scale = torch.linspace(0.5, 2, channels, dtype=torch.float64).view(view)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 1.5) * scale


@exactly_so
@given(
    lead=st.one_of(
        st.just(()), st.tuples(st.integers(1, 3)), st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)
    ),
    features=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    choice=options,
)
def test_linear(
    lead: tuple[int, ...], features: tuple[int, int], bias: bool, seed: int, choice: dict[str, Any]
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(*features, bias=bias, dtype=torch.float64)
    check(layer, [batch((*lead, features[0]), seed, step, -1) for step in range(2)], choice)


@exactly_so
@given(
    case=st.one_of(convolutions(), transposed()),
    size=st.one_of(st.none(), st.integers(1, 3)),
    seed=st.integers(0, 99),
    choice=options,
)
def test_convolutions(
    case: tuple[nn.Module, tuple[int, ...]], size: int | None, seed: int, choice: dict[str, Any]
) -> None:
    """``size`` None: one sample without a batch dimension."""
    layer, sample = case
    shape = sample if size is None else (size, *sample)
    torch.manual_seed(seed)
    layer.reset_parameters()  # type: ignore[operator]
    check(layer, [batch(shape, seed, step, -len(sample)) for step in range(2)], choice)
