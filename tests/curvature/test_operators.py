"""Products: averages, subsets, blocks, differences where there is no second derivative, and nothing left behind."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import (
    Batch,
    GaussNewtonOperator,
    HessianOperator,
    blocks,
    closures_from_loader,
    estimate_conditioning,
    layer_conditioning,
)
from tests.conftest import same, weights
from tests.curvature.problems import dense_hessian, evaluate
from tests.curvature.problems import mlp as net

WIDTHS = (5, 4, 3)


def data(samples: int = 24, features: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randint(0, 3, (samples,), generator=generator)


def matrix(operator: Any) -> Tensor:
    return torch.stack([operator(e) for e in torch.eye(operator.size, dtype=operator.dtype)])


def test_hessian_products_are_those_of_the_dense_matrix() -> None:
    x, y = data()
    model = net(WIDTHS)
    operator = HessianOperator(lambda: F.cross_entropy(model(x), y), model.parameters())
    torch.testing.assert_close(matrix(operator), dense_hessian(model, x, y), rtol=1e-10, atol=1e-13)
    assert operator.method == "double backward"
    assert operator.num_products == operator.size == 39
    assert operator.num_samples is None


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_unequal_batches_average_to_the_joint_one(kind: Any) -> None:
    x, y = data()
    model = net(WIDTHS)
    joint = matrix(kind((evaluate(model, x, y), 24), model.parameters()))
    batches: list[Any] = [(evaluate(model, x[:3], y[:3]), 3), Batch(evaluate(model, x[3:], y[3:]), 21)]
    operator = kind(batches, model.parameters())
    assert operator.num_samples == 24
    torch.testing.assert_close(matrix(operator), joint, rtol=1e-10, atol=1e-13)
    loader = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 24, 7)]  # 7, 7, 7, 3
    torch.testing.assert_close(
        matrix(kind(closures_from_loader(model, F.cross_entropy, loader), model.parameters())),
        joint,
        rtol=1e-10,
        atol=1e-13,
    )
    some = closures_from_loader(model, F.cross_entropy, loader, max_batches=2)
    assert [b.num_samples for b in some] == [7, 7]
    # without counts, all weigh the same
    even = matrix(kind([b.closure for b in batches if isinstance(b, Batch)] + [batches[0][0]], model.parameters()))
    assert not torch.allclose(even, joint, rtol=1e-3)


def test_subsets_are_blocks() -> None:
    x, y = data()
    model = net(WIDTHS)
    dense = dense_hessian(model, x, y)
    found = blocks(model)
    assert list(found) == ["0", "2"]
    for name, (start, end) in {"0": (0, 24), "2": (24, 39)}.items():
        operator = HessianOperator(evaluate(model, x, y), found[name])
        torch.testing.assert_close(matrix(operator), dense[start:end, start:end], rtol=1e-10, atol=1e-13)
    scattered = HessianOperator(evaluate(model, x, y), [model[2].bias, model[0].weight])
    order = [*range(36, 39), *range(20)]
    torch.testing.assert_close(matrix(scattered), dense[order][:, order], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_unused_and_frozen_parameters(kind: Any) -> None:
    x, y = data()
    model = net(WIDTHS)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[0].bias.requires_grad_(False)
    operator = kind(evaluate(model, x, y), [unused, *model.parameters(), unused])
    assert operator.size == 2 + 35  # the frozen one is left out, and the double one counts once
    found = matrix(operator)
    assert not found[:2].any()
    assert not found[:, :2].any()
    assert found[2:, 2:].any()
    linear = kind(lambda: (model(x), lambda outputs: outputs.sum()), [model[2].bias])
    assert not matrix(linear).any()  # no curvature at all


class Cube(torch.autograd.Function):
    """x³ with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_finite_differences_where_double_backward_is_missing(kind: Any) -> None:
    x, y = data()
    model = net(WIDTHS)
    before = weights(model)
    smooth = kind(lambda: (model[2](model[0](x) ** 3 / 50), lambda o: F.cross_entropy(o, y)), model.parameters())
    rough = kind(lambda: (model[2](Cube.apply(model[0](x)) / 50), lambda o: F.cross_entropy(o, y)), model.parameters())
    for seed in range(5):
        v = torch.randn(39, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        truth = smooth(v)
        assert float((rough(v) - truth).norm()) <= 1e-3 * float(truth.norm())
    assert rough.method == "finite differences: the backward of Cube is marked @once_differentiable"
    assert rough.num_products == 5
    assert same(weights(model), before)
    assert not rough(torch.zeros(39, dtype=torch.float64)).any()
    report = estimate_conditioning(
        lambda: F.cross_entropy(model[2](Cube.apply(model[0](x))), y), model.parameters(), num_probes=0
    )
    assert report.method.startswith("finite differences: ")
    assert "finite differences" in str(report)
    assert same(weights(model), before)


def test_checkpoints() -> None:
    x, y = data()
    x.requires_grad_()
    model = net(WIDTHS)
    v = torch.ones(39, dtype=torch.float64)
    truth = HessianOperator(evaluate(model, x, y), model.parameters())(v)

    def saved(reentrant: bool) -> Tensor:
        hidden: Any = checkpoint(model[:2], x, use_reentrant=reentrant)
        return F.cross_entropy(model[2](hidden), y)

    torch.testing.assert_close(HessianOperator(lambda: saved(False), model.parameters())(v), truth)
    # torch itself would leave the first layer's part out, and say nothing
    with pytest.raises(ValueError, match=r"use checkpoint\(..., use_reentrant=False\)"):
        HessianOperator(lambda: saved(True), model.parameters())(v)


def test_parameters_come_back_when_a_closure_fails() -> None:
    x, y = data()
    model = net(WIDTHS)
    before = weights(model)
    calls = 0

    def fails() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyError("lost")
        return F.cross_entropy(model[2](Cube.apply(model[0](x))), y)

    with pytest.raises(KeyError, match="lost"):
        HessianOperator(fails, model.parameters())(torch.ones(39, dtype=torch.float64))
    assert same(weights(model), before)


def test_embedding_bags_have_differences() -> None:
    bag = nn.EmbeddingBag(7, 3, mode="mean").double()
    head = nn.Linear(3, 3).double()
    tokens = torch.randint(0, 7, (6, 4), generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 3
    parameters = [*bag.parameters(), *head.parameters()]
    operator = HessianOperator(lambda: F.cross_entropy(head(bag(tokens)), y), parameters)
    exact = HessianOperator(lambda: F.cross_entropy(head(bag.weight[tokens].mean(1)), y), parameters)
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float((operator(v) - exact(v)).norm()) <= 1e-3 * float(exact(v).norm())
    assert operator.method.startswith("finite differences: ")


def test_fused_attention_takes_its_plain_kernel() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(4, 5, 8)
    operator = HessianOperator(lambda: attention(x).square().mean(), attention.parameters())
    v = torch.randn(operator.size)
    w = torch.randn(operator.size)
    torch.testing.assert_close(w @ operator(v), v @ operator(w), rtol=1e-3, atol=1e-5)  # symmetric
    assert operator.method == "double backward"


def test_compiled_modules_run_as_written() -> None:
    x, y = data()
    model = net(WIDTHS)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    operator = HessianOperator(evaluate(compiled, x, y), model.parameters())
    v = torch.ones(39, dtype=torch.float64)
    torch.testing.assert_close(operator(v), HessianOperator(evaluate(model, x, y), model.parameters())(v))
    assert operator.method == "double backward"
    assert list(layer_conditioning(model, evaluate(compiled, x, y))) == ["0", "2"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_left_behind(wrapped: bool) -> None:
    x, y = data()
    model = net(WIDTHS)
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()  # leaves .grad
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    statistics = {k: v.count.clone() for k, v in optimizer.statistics.items()}
    waiting = [len(place.intake.batches) for place in optimizer._tracker._places.values()]
    assert waiting == [1, 1]
    before = weights(model)
    grads = {k: (id(p.grad), p.grad.clone()) for k, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state().clone(), random.getstate()
    for method in ("double backward", "finite differences: for the test"):
        for kind in ("hessian", "gauss_newton"):
            operator = {"hessian": HessianOperator, "gauss_newton": GaussNewtonOperator}[kind]
            with optimizer.pause_statistics():
                by = operator(evaluate(model, x, y), model.parameters())
                by.method = method
                by(torch.ones(39, dtype=torch.float64))
            options: dict[str, Any] = {"matrix": kind, "num_steps": 5, "num_probes": 2}
            estimate_conditioning(evaluate(model, x, y), model.parameters(), preconditioner=optimizer, **options)
    if wrapped:
        layer_conditioning(model, evaluate(model, x, y), preconditioner=optimizer)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert same(weights(model), before)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert (id(p.grad), True) == (grads[name][0], torch.equal(p.grad, grads[name][1]))
    assert {k: v.count for k, v in optimizer.statistics.items()} == statistics
    assert [len(place.intake.batches) for place in optimizer._tracker._places.values()] == waiting
    assert [len(m._forward_hooks) for m in model] == [1, 0, 1]


def test_float32_agrees_with_float64() -> None:
    x, y = data()
    wide = net(WIDTHS)
    narrow = net(WIDTHS).float()
    truth = estimate_conditioning(evaluate(wide, x, y), wide.parameters(), num_probes=0, tolerance=1e-9)
    found = estimate_conditioning(evaluate(narrow, x.float(), y), narrow.parameters(), num_probes=0, tolerance=1e-9)
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=2e-6)
    half = net(WIDTHS).bfloat16()
    rough = estimate_conditioning(evaluate(half, x.bfloat16(), y), half.parameters(), num_probes=0)
    assert rough.lambda_max == pytest.approx(truth.lambda_max, rel=0.1)  # 8 bits


def test_random_forward_passes_are_noticed() -> None:
    x, y = data()
    model = net(WIDTHS)
    dropout = nn.Dropout(0.1)
    report = estimate_conditioning(lambda: F.cross_entropy(model[2](dropout(model[0](x))), y), model.parameters())
    assert "does the forward pass draw random numbers (dropout)" in str(report)
    dropout.eval()
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        report = estimate_conditioning(
            lambda d=dtype: F.cross_entropy(model[2](dropout(model[0](x.to(d)))), y), model.parameters()
        )
        assert "products disagree" not in str(report)


def test_inference_mode_is_left_for_the_products() -> None:
    x, y = data()
    model = net(WIDTHS)
    operator = HessianOperator(evaluate(model, x, y), model.parameters())
    v = torch.ones(39, dtype=torch.float64)
    truth = operator(v)
    with torch.no_grad():
        assert torch.equal(operator(v), truth)


def test_wrong_arguments_say_what_to_do() -> None:
    x, y = data()
    model = net(WIDTHS)
    good = evaluate(model, x, y)
    params = list(model.parameters())

    def says(error: type[Exception], match: str, closures: Any = good, over: Any = params, **options: Any) -> None:
        with pytest.raises(error, match=match):
            estimate_conditioning(closures, over, **{"num_probes": 0} | options)

    says(ValueError, r"closures is \[\], it must hold at least one", [])
    says(TypeError, r"closures\[0\] is 3, it must be a closure", [3])
    says(ValueError, r"num_samples 0, it must be a whole number of at least 1", [(good, 0)])
    says(ValueError, r"num_samples for 1 of 2 batches: give it for all or for none", [(good, 3), good])
    says(ValueError, "params holds 0 parameters, none of which requires grad", over=[])
    says(TypeError, r"params is a tensor", over=params[0])
    says(TypeError, r"params\[0\] is 'a'", over=["a"])
    says(ValueError, "matrix is 'fisher', it must be one of 'hessian', 'gauss_newton'", matrix="fisher")
    says(ValueError, "num_steps is 0, it must be at least 1", num_steps=0)
    says(TypeError, "num_probes is 1.5, it must be a whole number", num_probes=1.5)
    says(ValueError, "tolerance is 2, it must be in", tolerance=2)
    says(TypeError, "preconditioner is 'bnp', it must be a BNPreconditioner", preconditioner="bnp")
    says(ValueError, "loss does not require grad: evaluate the model inside", lambda: torch.tensor(1.0))
    says(ValueError, r"loss has shape \(24, 3\), it must be a scalar", lambda: model(x))
    says(ValueError, "loss is nan, it must be finite", lambda: model(x).sum() * math.nan)
    says(TypeError, "returned a float, it must return the loss as a tensor", lambda: 1.0)
    says(TypeError, "'gauss_newton' needs the pair", lambda: model(x).sum(), matrix="gauss_newton")
    detached = lambda: (model(x).detach(), lambda o: o.sum())  # noqa: E731
    says(ValueError, "outputs does not require grad", detached, matrix="gauss_newton")
    with pytest.raises(ValueError, match=r"vector has shape \(3,\), it must be \(39,\)"):
        HessianOperator(good, params)(torch.ones(3))
    with pytest.raises(ValueError, match="max_batches is 0"):
        closures_from_loader(model, F.cross_entropy, [(x, y)], max_batches=0)
    with pytest.raises(ValueError, match="gave no batch"):
        closures_from_loader(model, F.cross_entropy, [])
    with pytest.raises(TypeError, match="loader gave a Tensor, it must give sequences"):
        closures_from_loader(model, F.cross_entropy, [x])
    with pytest.raises(TypeError, match="targets of type list"):
        closures_from_loader(model, F.cross_entropy, [(x, [1])])
