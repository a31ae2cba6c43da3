"""Layer types beyond Linear and convolutions, and layers that change: lazy, grown, parametrized, without samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from bnp_optim import BNPreconditioner, LayerAdapter, Rows, Samples, register_layer
from bnp_optim.layers import registry
from tests.conftest import assert_same_weights, hook_count, inputs, mlp, train, weights, wrap
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "gradient": lambda p: torch.optim.SGD(p, lr=0.01),
    "two_sided": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("step_scale", ["trace", "common", "spectral", "fan_in"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3)], ids=str)
def test_bilinear_is_linear_on_the_outer_product(
    shape: tuple[int, ...], bias: bool, mode: Any, step_scale: Any, dtype: torch.dtype, tolerance: float
) -> None:
    layer = nn.Bilinear(3, 2, 4, bias=bias, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    optimizer = BNPreconditioner(BASES[mode](layer.parameters()), layer, mode=mode, step_scale=step_scale)
    direction = None
    if step_scale == "spectral":
        found = optimizer._tracker.snapshot(optimizer._tracker.layers[0])["direction"].double().numpy()
        direction = found if bias else found[:, 1:]
    reference = ReferenceBNP(ReferenceLayer("linear", (4, 6), bias), step_scale=step_scale, direction=direction)
    for step in range(4):
        a = (torch.rand(*shape, 3) + 1 + step).double()
        b = (torch.rand(*shape, 2) - 2).double()
        for each, pair in ((layer, (a.to(dtype), b.to(dtype))), (exact, (a, b))):
            each.zero_grad()
            each(input1=pair[0], input2=pair[1]).sum().backward()
        g_w = exact.weight.grad.numpy().reshape(4, 6)
        g_b = exact.bias.grad.numpy() if bias else None
        products = np.einsum("...i,...j->...ij", a.numpy(), b.numpy())
        reference.observe(products.reshape(*a.shape[:-1], 6))
        reference.commit()
        optimizer.step()
        to = reference.gradient_form if mode == "gradient" else reference.to_z
        expected = to(g_w, g_b)
        scale = max(np.abs(g_w).max(), *(np.abs(e).max() for e in expected if e is not None))
        assert np.abs(layer.weight.grad.double().numpy().reshape(4, 6) - expected[0]).max() <= tolerance * scale
        if bias:
            assert np.abs(layer.bias.grad.double().numpy() - expected[1]).max() <= tolerance * scale


def test_a_transposed_convolution_whose_caller_chooses_the_output_size() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, dtype=torch.float64)
    optimizer = wrap(layer)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64) + 1
    layer(x, output_size=[10, 9]).square().mean().backward()
    optimizer.step()
    # 4 inputs reach a tap along each dimension, of 10 and of 9 outputs
    occupancy = 4 / 10 * 4 / 9
    mean = x.mean((0, 2, 3)).repeat_interleave(9)
    statistics = optimizer.statistics[""]
    torch.testing.assert_close(statistics.mean, occupancy * mean)
    second = x.square().mean((0, 2, 3)).repeat_interleave(9)
    torch.testing.assert_close(statistics.variance, occupancy * second - (occupancy * mean) ** 2)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("change", ["channels_last", "bfloat16"])
def test_transposed_convolutions_of_other_layouts(change: str, base: Any) -> None:
    plain = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(6, 2, 2, stride=2))
    if change == "bfloat16":
        plain = plain.bfloat16().float()  # representable in both
    other = copy.deepcopy(plain)
    other = other.to(memory_format=torch.channels_last) if change == "channels_last" else other.bfloat16()
    tolerance = 1e-5 if change == "channels_last" else 0.05
    for model in (plain, other):
        optimizer = BNPreconditioner(base(model.parameters(), lr=0.01), model)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x = torch.randn(3, 4, 5, 5, generator=generator) + 1
            optimizer.zero_grad()
            model(x.to(model[0].weight.dtype)).float().square().mean().backward()
            optimizer.step()
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.float(), p, rtol=tolerance, atol=tolerance)


# Lazy modules


def _lazy_and_eager() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]]:
    return {
        "linear": (
            lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(2)),
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)),
            (5, 4),
        ),
        "convolutions": (
            lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Tanh(), nn.LazyConvTranspose2d(2, 3, bias=False)),
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, bias=False)),
            (2, 3, 5, 5),
        ),
    }


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_lazy_modules_count_from_their_first_input_on(kind: str, base: Any) -> None:
    build, build_eager, shape = _lazy_and_eager()[kind]
    lazy, eager = build(), build_eager()
    mine = BNPreconditioner(base(lazy.parameters(), lr=0.1), lazy)
    assert mine.statistics == {}
    data = [torch.randn(shape) + 1 for _ in range(4)]
    for i, x in enumerate(data):
        mine.zero_grad()
        output = lazy(x)
        if i == 0:
            eager.load_state_dict(lazy.state_dict())
        output.square().mean().backward()
        mine.step()
    theirs = BNPreconditioner(base(eager.parameters(), lr=0.1), eager)
    train(eager, theirs, data)
    assert mine.coverage().preconditioned == tuple(name for name, _ in lazy.named_parameters())
    assert {n: int(s.count) for n, s in mine.statistics.items()} == {
        n: int(s.count) for n, s in theirs.statistics.items()
    }
    assert_same_weights(lazy, eager, rtol=0)
    assert hook_count(lazy) == hook_count(eager)


# Layers that grow or are replaced


def test_a_layer_that_grows_rows_keeps_its_statistics() -> None:
    model = mlp()
    optimizer = wrap(model)
    train(model, optimizer, inputs(2))
    before = optimizer.statistics["2"]
    head = model[2]
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), torch.zeros(2, 6)]))
    head.bias = nn.Parameter(torch.cat([head.bias.detach(), torch.zeros(2)]))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with optimizer.pause_statistics():
        backward_of(model, inputs(1)[0])
        optimizer.step()  # nobody has called rescan()
    after = optimizer.statistics["2"]
    assert torch.equal(before.mean, after.mean) and torch.equal(before.variance, after.variance)
    train(model, optimizer, inputs(2))
    assert {name: int(s.count) for name, s in optimizer.statistics.items()} == {"0": 32, "2": 32}
    assert optimizer.coverage()["2.weight"].preconditioned


def backward_of(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def test_a_layer_that_grows_inputs_starts_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model)
    train(model, optimizer, inputs(2))
    layer = model[0]
    layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), torch.zeros(3, 2)], dim=1))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.zero_grad()
    wider = [torch.cat([x, 5 + x[:, :2]], dim=1) for x in inputs(3)]
    backward_of(model, wider[0])
    optimizer.step()
    assert optimizer.coverage()["0.weight"].preconditioned is False  # its samples came before it was looked up again
    train(model, optimizer, wider[1:])
    statistics = optimizer.statistics["0"]
    assert statistics.mean.shape == (6,) and int(statistics.count) == 16
    assert optimizer.coverage()["0.weight"].preconditioned
    torch.testing.assert_close(statistics.mean[:4], torch.cat(inputs(3)[1:]).mean(0), rtol=1e-2, atol=1e-2)


# Experts


class Mixture(nn.Module):
    """Every token goes to one of two experts; a third is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = torch.zeros_like(x)
        for mask, expert in zip((first, ~first), self.experts, strict=False):
            out[mask] = expert(x[mask])
        return out


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_experts_that_see_no_token(base: Any) -> None:
    model = Mixture()
    optimizer = BNPreconditioner(base(model.parameters(), lr=0.01), model)
    third = copy.deepcopy(model.experts[2].state_dict())
    both, positive = torch.randn(8, 4), torch.rand(8, 4) + 0.1
    both[0, 0], both[1, 0] = 1, -1
    train(model, optimizer, [both])
    second = optimizer.statistics["experts.1"]
    train(model, optimizer, [positive, positive])  # the second expert gets an empty batch
    after = optimizer.statistics["experts.1"]
    assert torch.equal(second.mean, after.mean) and int(after.count) == int(second.count) == int(
        (both[:, 0] <= 0).sum()
    )
    assert int(optimizer.statistics["experts.0"].count) == int((both[:, 0] > 0).sum()) + 16
    assert all(torch.equal(third[n], p) for n, p in model.experts[2].state_dict().items())
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.coverage()["experts.2.weight"].why == "its layer's input was never seen so far"


# Weights that are computed from others

PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "spectral_norm of old": lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.3),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_computed_weights_pass_through_untouched(kind: str) -> None:
    torch.manual_seed(3)
    model = PARAMETRIZED[kind]()
    torch.manual_seed(3)
    twin = PARAMETRIZED[kind]()
    before = weights(model)
    with pytest.warns(UserWarning, match="no layer of the .* has its weight in the groups"):
        optimizer = wrap(model)
    for name, value in weights(model).items():  # spectral_norm's own power step did not run
        assert torch.equal(value, before[name]), name
    base = torch.optim.SGD(twin.parameters(), lr=0.1)
    train(model, optimizer, inputs(3))
    train(twin, base, inputs(3))
    assert_same_weights(model, twin, rtol=0)
    assert not optimizer.coverage().preconditioned
    assert all("paramet" in row.why for row in optimizer.coverage())


# Modules whose output is no tensor


class Wordy(nn.Linear):
    """Returns its output in a dict, as transformers' modules do, or hides it in an object."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__(4, 3)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return type("Output", (), {"y": y}) if self.hidden else {"y": y, "name": "linear"}


@pytest.mark.parametrize(("hidden", "counted"), [(False, 16), (True, 0)])
def test_outputs_in_dicts_count_and_hidden_ones_pass_through(hidden: bool, counted: int) -> None:
    model = Wordy(hidden=hidden)
    optimizer = wrap(model)
    for x in inputs(2):
        optimizer.zero_grad()
        output = model(x)
        (output.y if hidden else output["y"]).square().mean().backward()
        optimizer.step()
    assert int(optimizer.statistics[""].count) == counted
    assert optimizer.coverage()["weight"].preconditioned is not hidden
    assert "no longer measured" not in optimizer.coverage()["weight"].why


# Adapters that do not fit


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class OddAdapter(LayerAdapter):
    """Says whatever a test gives it."""

    def __init__(self, rows: Any, matrix: tuple[int, ...] | None, values: tuple[int, ...]) -> None:
        self._rows, self._matrix, self._values = rows, matrix, values

    def rows(self, module: nn.Module) -> Rows:
        return self._rows

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        return Samples(input.reshape(self._values), 2)

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight if self._matrix is None else weight.view(self._matrix)


@pytest.fixture
def odd_adapter() -> Any:
    def register(*args: Any) -> nn.Module:
        register_layer(Odd, OddAdapter(*args))
        return nn.Sequential(Odd())

    yield register
    registry._REGISTRY.pop(Odd, None)


@pytest.mark.parametrize(
    ("rows", "matrix", "message"),
    [
        (
            Rows(1, 5),
            None,
            r"OddAdapter does not fit the Odd '0': rows\(\) returned Rows\(groups=1, channels=5.*\(3, 4\)",
        ),
        (Rows(1, 4), (4, 3), r"OddAdapter does not fit the Odd '0': matrix\(\) returned shape \(4, 3\).*\(3, 4\)"),
        (
            (1, 4),
            None,
            r"OddAdapter does not fit the Odd '0': rows\(\) returned \(1, 4\), it must return bnp_optim.Rows",
        ),
    ],
)
def test_an_adapter_of_a_wrong_geometry_is_an_error_at_the_door(
    odd_adapter: Any, rows: Any, matrix: Any, message: str
) -> None:
    model = odd_adapter(rows, matrix, (-1, 4))
    with pytest.raises(ValueError, match=message):
        wrap(model)
    assert hook_count(model) == 0


def test_a_rescan_that_fails_changes_nothing(odd_adapter: Any) -> None:
    model = nn.Sequential(Odd(), nn.Linear(3, 2))
    optimizer = wrap(model)
    train(model, optimizer, inputs(1))
    odd_adapter(Rows(1, 5), None, (-1, 4))
    with pytest.raises(ValueError, match="OddAdapter does not fit the Odd '0'"):
        optimizer.rescan()
    train(model, optimizer, inputs(1))
    assert int(optimizer.statistics["1"].count) == 16


def test_samples_of_a_wrong_shape_are_an_error_of_the_step_not_of_the_forward(odd_adapter: Any) -> None:
    model = odd_adapter(Rows(1, 4), None, (-1, 2))
    optimizer = wrap(model)
    before = weights(model)
    backward_of(model, inputs(1)[0])
    with pytest.raises(
        ValueError, match=r"OddAdapter does not fit the Odd: samples\(\) .*\(16, 2\).*Rows\(groups=1, ch"
    ):
        optimizer.step()
    assert torch.equal(weights(model)["0.weight"], before["0.weight"])


class Odder(Odd):
    """A subclass, for which nobody has promised anything."""


def test_a_subclass_that_an_adapter_does_not_fit_passes_through(odd_adapter: Any) -> None:
    odd_adapter(Rows(1, 5), None, (-1, 4))
    model = nn.Sequential(Odder(), nn.Linear(3, 2))
    optimizer = wrap(model)
    train(model, optimizer, inputs(2))
    assert optimizer.coverage()["0.weight"].why.startswith(
        "no rule for Odder: rows() returned Rows(groups=1, channels=5"
    )
    assert optimizer.coverage()["1.weight"].preconditioned

    odd_adapter(Rows(1, 4), None, (-1, 2))
    model = nn.Sequential(Odder(), nn.Linear(3, 2))
    optimizer = wrap(model)
    with pytest.warns(UserWarning, match="could not read the input of a Odder.*OddAdapter does not fit the Odder"):
        train(model, optimizer, inputs(2))
    assert not optimizer.coverage()["0.weight"].preconditioned
