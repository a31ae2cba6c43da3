"""SGLD in the two-sided form samples from the posterior: against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks.sgld import NOISE, PRIOR, SGLD, best, chains, markdown, quality, regression
from bnp_optim import BNPreconditioner


def exact_variances(rate: float) -> tuple[Tensor, Tensor]:
    """Of w: the stationary ones of z ← z − ε/2 PᵀHP z + √ε ξ, mapped by P; and the posterior's, both from NumPy's P."""
    problem = regression()
    mean, variance = problem.x.mean(0), problem.x.var(0, correction=0) + 1e-4
    p = torch.eye(len(mean) + 1, dtype=torch.float64)
    p[0, 1:] = -mean
    p[:, 1:] /= variance.sqrt()
    values, vectors = torch.linalg.eigh(p.T @ problem.covariance.inverse() @ p)
    stationary = vectors @ torch.diag(1 / (values * (1 - rate * values / 4))) @ vectors.T
    return (p @ stationary @ p.T).diagonal(), problem.covariance.diagonal()


def test_variances_are_those_of_the_discretized_dynamics_and_nearly_the_posteriors() -> None:
    """400 steps of 100 chains after 200: some 2,000 independent samples, so 3 % of a variance is one standard error."""
    rate = 1e-4
    states = chains(regression(), "BNP-SGLD, ε1 = 0", rate, 500, 600)[20:].flatten(0, 1)
    expected, posterior = exact_variances(rate)
    found = states.var(0)
    torch.testing.assert_close(found / expected, torch.ones(7, dtype=torch.float64), rtol=0, atol=0.1)
    torch.testing.assert_close(found / posterior, torch.ones(7, dtype=torch.float64), rtol=0, atol=0.15)
    q = quality(regression(), states)
    assert q.divergence < 0.03 and q.mean < 0.1
    plain = quality(regression(), chains(regression(), "SGLD", 1e-5, 500, 600)[20:])
    assert plain.divergence > 10 and plain.mean > 1  # near the largest stable rate, and still on its way


def test_a_step_is_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = BNPreconditioner(SGLD(model.parameters(), 1e-2), model)
    x = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1, 2, 3]) + 1
    before = torch.cat([model.bias[:, None], model.weight], 1).detach().clone()
    model(x).square().sum().backward()
    gradient = torch.cat([model.bias.grad[:, None], model.weight.grad], 1)
    torch.manual_seed(1)
    optimizer.step()
    torch.manual_seed(1)
    xi_w, xi_b = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    variance = x.var(0, correction=0)
    p = torch.eye(4, dtype=torch.float64)
    p[0, 1:] = -x.mean(0)
    p[:, 1:] /= (variance + 1e-2 * variance.max() + 1e-4).sqrt()
    expected = before - 0.5e-2 * gradient @ p @ p.T + 0.1 * torch.cat([xi_b[:, None], xi_w], 1) @ p.T
    after = torch.cat([model.bias[:, None], model.weight], 1).detach()
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)


def test_the_posterior_is_the_minimum_of_the_potential_with_its_curvature() -> None:
    problem = regression()
    w = problem.mean.clone().requires_grad_()

    def potential(w: Tensor) -> Tensor:
        misfit = (problem.x @ w[1:] + w[0] - problem.y[:, 0]).square().sum() / (2 * NOISE**2)
        return misfit + w.square().sum() / (2 * PRIOR**2)

    (gradient,) = torch.autograd.grad(potential(w), w)
    curvature = torch.autograd.functional.hessian(potential, problem.mean)
    assert gradient.abs().max() < 1e-7
    torch.testing.assert_close(curvature, problem.covariance.inverse(), rtol=1e-8, atol=1e-8)


def test_quality_of_known_samples() -> None:
    problem = regression()
    root = torch.linalg.cholesky(problem.covariance)
    white = torch.randn(200_000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = quality(problem, problem.mean + white @ root.T)
    assert q.divergence < 2e-4 and q.mean < 0.01 and 0.99 < q.least < 1 < q.most < 1.01
    q = quality(problem, problem.mean + problem.covariance.diagonal().sqrt() + 2 * white @ root.T)
    assert q.mean == pytest.approx(1, abs=0.02) and q.least == pytest.approx(2, rel=0.01) == q.most
    for far in (torch.inf, torch.nan, 1e200):
        assert quality(problem, torch.full((10, 7), far, dtype=torch.float64)).divergence == float("inf")


def test_a_rate_must_be_positive_and_the_table_takes_the_best() -> None:
    with pytest.raises(ValueError, match="lr is 0, it must be above 0"):
        SGLD(nn.Linear(1, 1).parameters(), 0)
    row = {"method": "SGLD", "batch": 500, "steps": 3000, "mean": 0.5, "least": 0.9, "most": 1.1}
    runs = [{**row, "rate": r, "divergence": d} for r, d in ((1e-6, 3.0), (1e-5, 2.0), (1e-4, None))]
    assert [r["rate"] for r in best(runs)] == [1e-5]
    about = {"cpu": "c", "cores": 1, "python": "3", "torch": "2", "numpy": "2", "date": "2026-01-01T00:00"}
    text = markdown({"runs": runs, "environment": about, "cpu_seconds": 1.0})
    assert "| SGLD | 500 | 3000 | 1.0e-05 | 2 | 0.5 sd | 0.9 to 1.1 |" in text and "1.0e-04 | diverged" in text
    assert "| SGLD | 500 | 3000 | 1.0e-06* | 3 |" in text
