"""The user's forward pass and run are sacred: odd inputs, replaced modules, moved models, broken rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner, LayerAdapter, Rows, Samples, register_layer
from bnp_optim.layers import registry
from tests.conftest import backward, count, inputs, mlp, same, train, wrap


def test_keyword_calls_count() -> None:
    layer = nn.Linear(4, 3)
    optimizer = wrap(nn.Sequential(layer))
    layer(input=inputs(1)[0]).sum().backward()
    optimizer.step()
    assert count(optimizer) == 8


def test_empty_and_unbatched_inputs() -> None:
    model = mlp()
    optimizer = wrap(model)
    x = inputs(1)[0]
    (model(x).sum() + model(x[:0]).sum() + model(x[0]).sum() + model(x.view(2, 2, 2, 4)).sum()).backward()
    optimizer.step()
    assert count(optimizer) == 8 + 0 + 1 + 8
    optimizer.zero_grad()
    model(x[:0]).sum().backward()  # a rank without samples
    optimizer.step()
    assert count(optimizer) == 17
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(8, 4), (2, 4, 4), (4,)])
def test_in_place_activations(shape: tuple[int, ...]) -> None:
    """On views (3-d and unbatched Linear outputs) the in-place operation replaces the output's graph node."""
    torch.manual_seed(0)
    inplace = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.ReLU(inplace=True))
    plain = copy.deepcopy(inplace)
    plain[1].inplace = plain[3].inplace = False
    a, b = wrap(inplace), wrap(plain)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(shape, generator=generator) for _ in range(3)]
    train(inplace, a, data)
    train(plain, b, data)
    assert count(a) == count(a, "2") == 3 * data[0].numel() // 4
    assert same(a.state_dict(), b.state_dict())
    assert same(dict(inplace.state_dict()), dict(plain.state_dict()))


def test_in_place_activations_on_unbatched_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True))
    optimizer = wrap(model)
    model(torch.randn(2, 5, 5)).sum().backward()
    optimizer.step()
    assert count(optimizer) == 25


def test_the_input_may_change_after_the_call() -> None:
    """A buffer that is filled anew for each micro-batch."""
    layer = nn.Linear(4, 3)
    optimizer = wrap(nn.Sequential(layer))
    first, second = inputs(2)
    buffer = first.clone()
    layer(buffer).sum().backward()
    buffer.copy_(second)
    layer(buffer).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.statistics["0"].mean, torch.cat([first, second]).mean(0))


def test_nested_and_sparse_inputs_do_not_break_the_forward() -> None:
    layer = nn.Linear(4, 3)
    optimizer = wrap(nn.Sequential(layer))
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(5, 4)], layout=torch.jagged)
    layer(nested).values().sum().backward()
    layer(torch.eye(4).to_sparse()).sum().backward()
    raw = layer.weight.grad.clone()
    optimizer.step()
    assert count(optimizer) == 0
    assert torch.equal(layer.weight.grad, raw)  # no statistics: passed through


def test_autocast_statistics_are_float32() -> None:
    layer = nn.Linear(4, 3)
    optimizer = wrap(nn.Sequential(layer), step_scale="spectral")
    x = inputs(1)[0] + 300
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    optimizer.step()
    statistics = optimizer.statistics["0"]
    assert statistics.mean.dtype == torch.float32
    torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.variance, x.var(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("setup", ["autocast", "bf16 model"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_bfloat16_at_batch_size_one_is_bounded(setup: str, base: Any) -> None:
    """Half-precision rounding of a single sample's gradient must not be blown up by 1/σ̃².

    The float32 run of the same samples is the measure: no parameter may move ten times as far as there.
    """
    moved = []
    for half in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
        if half and setup != "autocast":
            model = model.to(torch.bfloat16)
        dtype = next(model.parameters()).dtype
        start = [p.detach().float().clone() for p in model.parameters()]
        optimizer = BNPreconditioner(base(model.parameters(), lr=1e-2), model)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            x = torch.randn(1, 20, generator=generator) + 3
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half and setup == "autocast"):
                loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), (x[:, 0] > 3).long())
            loss.backward()
            optimizer.step()
        ends = [p.detach().float() for p in model.parameters()]
        moved.append(max(float((p - s).abs().max()) for p, s in zip(ends, start, strict=True)))
    assert moved[1] < 10 * moved[0]


def test_the_model_may_change_dtype_after_wrapping() -> None:
    model, reference = mlp(), mlp().double()
    a, b = wrap(model, step_scale="spectral"), wrap(reference, step_scale="spectral")
    data = inputs(6)
    train(model, a, data[:3])
    train(reference, b, [x.double() for x in data[:3]])
    model.double()
    train(model, a, [x.double() for x in data[3:]])
    train(reference, b, [x.double() for x in data[3:]])
    assert a.statistics["0"].mean.dtype == torch.float64
    assert count(a) == 48
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_replaced_parameters_are_followed() -> None:
    """Accelerate and Fabric put new Parameter objects into both module and groups."""
    model, reference = mlp(), mlp()
    a, b = wrap(model), wrap(reference)
    data = inputs(6)
    train(model, a, data[:3])
    train(reference, b, data[:3])
    for module in (model[0], model[2]):
        for name in ("weight", "bias"):
            old = getattr(module, name)
            new = nn.Parameter(old.detach().clone())
            setattr(module, name, new)
            group = a.param_groups[0]["params"]
            group[next(i for i, p in enumerate(group) if p is old)] = new
    train(model, a, data[3:])
    train(reference, b, data[3:])
    assert same(dict(model.state_dict()), dict(reference.state_dict()))
    assert count(a) == 48


def test_wrapper_subclass_weights_pass_through() -> None:
    """DTensor and the like: what P would mean on their local parts is not built yet."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = mlp()
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    optimizer = wrap(model)
    assert list(optimizer.statistics) == ["2"]
    assert optimizer.coverage()["0.weight"].why == "its weight is a TwoTensor, which is not supported yet"


def test_a_grown_layer_passes_through_until_rescan() -> None:
    model = mlp()
    optimizer = wrap(model)
    train(model, optimizer, inputs(2))
    model[2] = nn.Linear(6, 5)
    optimizer.param_groups[0]["params"].extend(model[2].parameters())
    optimizer.zero_grad()
    backward(model, inputs(1)[0])
    raw = model[2].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[2].weight.grad, raw)
    optimizer.rescan()
    train(model, optimizer, inputs(2))
    assert (count(optimizer), count(optimizer, "2")) == (5 * 8, 2 * 8)


def test_two_wrappers_own_their_own_layers() -> None:
    model = mlp()
    a = BNPreconditioner(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    b = BNPreconditioner(torch.optim.Adam(model[2].parameters()), model)
    assert (list(a.statistics), list(b.statistics)) == (["0"], ["2"])
    assert a.coverage()["2.weight"].why == "not in this optimizer's parameter groups"


class Scale(nn.Module):
    """y = w ⊙ x summed over features: one row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class ScaleAdapter(LayerAdapter):
    """A rule that a test can break."""

    fails = False

    def rows(self, module: nn.Module) -> Rows:
        return Rows(groups=1, channels=4)

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        if self.fails:
            raise RuntimeError("no rule for this input")
        return Samples(input, input.shape[0])


@pytest.fixture
def scale_adapter() -> Any:
    adapter = ScaleAdapter()
    register_layer(Scale, adapter)
    yield adapter
    del registry._REGISTRY[Scale]


@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
def test_a_registered_layer_type_equals_linear(scale_adapter: ScaleAdapter, step_scale: Any) -> None:
    mine, linear = nn.Sequential(Scale()), nn.Sequential(nn.Linear(4, 1))
    linear.load_state_dict(mine.state_dict())
    a, b = wrap(mine, step_scale=step_scale), wrap(linear, step_scale=step_scale)
    train(mine, a, inputs(5))
    train(linear, b, inputs(5))
    for p, q in zip(mine.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_broken_rule_does_not_break_the_run(scale_adapter: ScaleAdapter) -> None:
    model = nn.Sequential(Scale())
    optimizer = wrap(model)
    train(model, optimizer, inputs(2))
    scale_adapter.fails = True
    with pytest.warns(UserWarning, match="could not read the input of a Scale") as caught:
        train(model, optimizer, inputs(3))
    assert len(caught) == 1
    assert count(optimizer) == 16
    assert "no longer measured" in optimizer.coverage()["0.weight"].why
    assert all(p.isfinite().all() for p in model.parameters())


def test_registering_nonsense() -> None:
    with pytest.raises(TypeError, match=r"module_type must be a subclass of torch\.nn\.Module, got <class 'int'>"):
        register_layer(int, ScaleAdapter())  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"adapter must be an instance of LayerAdapter .*got 3"):
        register_layer(Scale, 3)  # type: ignore[arg-type]


def test_a_differentiable_base_is_refused() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match=r"SGD has differentiable=True.*build it with differentiable=False"):
        BNPreconditioner(base, model)
    assert not any(m._forward_hooks for m in model.modules())
