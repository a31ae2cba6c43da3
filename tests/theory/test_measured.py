"""``fisher_lambda_max`` against the dense matrix, and the traces it must not leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import GaussNewtonOperator, PreconditionedOperator, lanczos
from bnp_optim.nn import OutputCentering
from bnp_optim.theory import FisherKernel, fisher_lambda_max
from tests.conftest import same, weights
from tests.theory.nets import dense_fisher, inputs, mlp


def small(kind: str) -> nn.Sequential:
    if kind == "convolution":
        layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)]
        return nn.Sequential(*layers).double()
    net = mlp([5, 8, 7, 3], nn.Tanh, 2.0, 0.1, seed=0, gamma=None if kind == "plain" else 1.3)
    for m in net:
        m.requires_grad_()  # γ and β, too
    return net.double()


def data(kind: str) -> Tensor:
    return inputs(9, *((2, 4, 4) if kind == "convolution" else (5,))).double()


@pytest.mark.parametrize("kind", ["plain", "batch norm", "convolution"])
@pytest.mark.parametrize("training", [True, False])
def test_against_the_dense_matrix(kind: str, training: bool) -> None:
    net, x = small(kind).train(training), data(kind)
    expected = float(torch.linalg.eigvalsh(dense_fisher(net, x))[-1])
    assert fisher_lambda_max(net, x, tolerance=1e-10) == pytest.approx(expected, rel=1e-8)


def test_the_whole_spectrum_and_some_parameters() -> None:
    net, x = small("batch norm"), data("batch norm")
    kernel = FisherKernel(net, x)
    dense = torch.stack([kernel(row) for row in torch.eye(kernel.size, dtype=torch.float64)])
    torch.testing.assert_close(dense, dense.T, rtol=1e-10, atol=1e-12)
    values = torch.linalg.eigvalsh(dense_fisher(net, x))[-kernel.size :]
    torch.testing.assert_close(torch.linalg.eigvalsh(dense), values, rtol=1e-8, atol=1e-10)
    last = list(net[-1].parameters())
    alone = dense_fisher(net.requires_grad_(False).append(net.pop(-1).requires_grad_()), x)
    expected = float(torch.linalg.eigvalsh(alone)[-1])
    assert fisher_lambda_max(net, x, params=last, tolerance=1e-10) == pytest.approx(expected, rel=1e-8)


def test_parameters_that_take_no_part_have_no_curvature() -> None:
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert fisher_lambda_max(small("plain"), data("plain"), params=[other]) == 0


def test_batch_norm_in_training_is_not_that_in_evaluation() -> None:
    net, x = small("batch norm"), data("batch norm")
    nn.Sequential(*net)(x)
    a, b = fisher_lambda_max(net.train(), x), fisher_lambda_max(net.eval(), x)
    assert abs(a / b - 1) > 0.1


def test_centered_output_is_the_module() -> None:
    net, x = small("plain"), data("plain")
    option = fisher_lambda_max(net, x, centered_output=True, tolerance=1e-10)
    assert option == pytest.approx(
        fisher_lambda_max(net.append(OutputCentering(3).double()), x, tolerance=1e-10), rel=1e-10
    )
    assert option == pytest.approx(float(torch.linalg.eigvalsh(dense_fisher(net, x))[-1]), rel=1e-8)


def test_it_is_the_gauss_newton_matrix_of_half_the_squared_error() -> None:
    net, x = small("batch norm"), data("batch norm")
    operator = GaussNewtonOperator(lambda: (net(x), lambda y: y.square().sum() / (2 * len(x))), net.parameters())
    top = lanczos(operator, torch.ones(operator.size, dtype=torch.float64), num_steps=60).ritz_values[-1]
    assert fisher_lambda_max(net, x, tolerance=1e-10) == pytest.approx(float(top), rel=1e-8)


@pytest.mark.parametrize("step_scale", [None, "trace"])
def test_preconditioned(step_scale: Any) -> None:
    net, x = small("plain"), data("plain") * 3 + 2
    optimizer = BNPreconditioner(torch.optim.SGD(net.parameters(), lr=0.0), net, step_scale=step_scale)
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = optimizer.statistics
    found = fisher_lambda_max(net, x, preconditioner=optimizer, tolerance=1e-10)
    with optimizer.pause_statistics():
        plain = fisher_lambda_max(net, x, tolerance=1e-10)
    closure = lambda: (net(x), lambda y: y.square().sum() / (2 * len(x)))  # noqa: E731
    operator = PreconditionedOperator(GaussNewtonOperator(closure, net.parameters()), optimizer)
    dense = torch.stack([operator(row) for row in torch.eye(operator.size, dtype=torch.float64)])
    assert found == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-8)
    assert abs(found / plain - 1) > 0.05
    optimizer.step()
    for name, statistics in optimizer.statistics.items():
        assert int(statistics.count) == int(before[name].count)
        assert torch.equal(statistics.mean, before[name].mean)


def test_nothing_is_left_behind() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)).double()
    x = data("plain")
    net(x).sum().backward()
    before = weights(net)
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    random = torch.get_rng_state()
    first = fisher_lambda_max(net, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(weights(net), before)
    assert same([p.grad for p in net.parameters()], gradients)
    assert net.training
    assert first == fisher_lambda_max(net, x)  # the same mask of dropout, too


def largest_loss(activation: type[nn.Module], c: float, noise: float | None, seed: int) -> float:
    """Over 60 steps at c·2/λ, M = 400: relative to the first. Labels N(0, I), or so far from the outputs."""
    w, b = (3.0, 0.64) if activation is nn.Tanh else (2.0, 0.1)
    net = mlp([400, 400, 400, 2], activation, w, b, seed)
    x = inputs(100, 400, seed=seed)
    y = torch.randn(100, 2, generator=torch.Generator().manual_seed(5 + seed))
    if noise is not None:
        y = net(x).detach() + noise * y
    optimizer = torch.optim.SGD(net.parameters(), lr=c * 2 / fisher_lambda_max(net, x))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (y - net(x)).square().sum() / (2 * len(x))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return max(losses) / losses[0]


def test_gradient_descent_knows_lambda_max() -> None:
    """Where the loss is large the net's curvature gives way, so what c = 1.3 reaches varies from 4 to 10."""
    assert max(largest_loss(nn.Tanh, 0.9, None, seed) for seed in range(4)) <= 1.05
    assert sum(largest_loss(nn.Tanh, 1.3, None, seed) for seed in range(4)) / 4 > 5


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_gradient_descent_near_a_minimum_knows_lambda_max(activation: type[nn.Module]) -> None:
    for seed in range(2):
        assert largest_loss(activation, 0.9, 0.1, seed) <= 1.05
        assert largest_loss(activation, 1.3, 0.1, seed) > 5


def test_refusals() -> None:
    net, x = small("batch norm"), data("batch norm")
    with pytest.raises(ValueError, match=r"x holds 1 sample, but BatchNorm in training mode needs at least 2"):
        fisher_lambda_max(net, x[:1])
    assert fisher_lambda_max(net.eval(), x[:1]) > 0
    with pytest.raises(ValueError, match="x is None, it must be a tensor"):
        fisher_lambda_max(net, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whose first dimension must be the samples"):
        fisher_lambda_max(nn.Sequential(net, nn.Flatten(0)), x)
    with pytest.raises(ValueError, match="none of which requires grad"):
        fisher_lambda_max(small("plain").requires_grad_(False), x)

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(TypeError, match="model returns a tuple, it must return a tensor"):
        fisher_lambda_max(Pair(5, 2).double(), x)
    with pytest.raises(ValueError, match="does not require grad"):
        fisher_lambda_max(Detached(5, 2).double(), x)
    with pytest.warns(RuntimeWarning, match="has not converged to 1e-12 in 2 products: it is a lower bound"):
        fisher_lambda_max(small("plain"), x, num_steps=2, tolerance=1e-12)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()
