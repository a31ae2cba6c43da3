"""The contraction rate of gradient descent, predicted and measured, raw and after P."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import HessianOperator, PreconditionedOperator
from bnp_optim.theory import contraction_rate, effective_condition_number, preconditioning_matrix

SAMPLES = 200


def features() -> Tensor:
    """Badly scaled, shifted, correlated, and one of them twice: the Hessian has exact zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([0.1, 0.5, 2.0, 8.0]) + torch.tensor([1.0, -2.0, 3.0, 10.0])
    return torch.cat([x, x[:, :1]], dim=1)


class Problem:
    """½·mean‖y - Wx - b‖² with two outputs."""

    def __init__(self, preconditioned: bool) -> None:
        self.x = features()
        self.y = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.manual_seed(2)
        self.model = nn.Linear(5, 2, dtype=torch.float64)
        self.base = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.optimizer = BNPreconditioner(self.base, self.model, step_scale=None) if preconditioned else None
        if preconditioned:
            self.step()  # of length 0: the statistics are there, and stay the same for the same batch
        hessian = HessianOperator((self.loss, SAMPLES), self.model.parameters())
        self.matrix = PreconditionedOperator(hessian, self.optimizer) if preconditioned else hessian

    def loss(self) -> Tensor:
        return 0.5 * (self.y - self.model(self.x)).square().sum(1).mean()

    def step(self) -> None:
        (self.optimizer or self.base).zero_grad()
        self.loss().backward()
        (self.optimizer or self.base).step()

    def distance(self) -> float:
        """To the minimizers, in what the loss sees."""
        design = torch.cat([torch.ones(SAMPLES, 1, dtype=torch.float64), self.x], dim=1)
        best = torch.linalg.lstsq(design, self.y, driver="gelsd").solution
        with torch.no_grad():
            return float((self.model(self.x) - design @ best).norm())

    def measured_rate(self, step: float, start: int, end: int) -> float:
        for group in self.base.param_groups:
            group["lr"] = step
        for _ in range(start):
            self.step()
        first = self.distance()
        for _ in range(end - start):
            self.step()
        return (self.distance() / first) ** (1 / (end - start))


def test_gradient_descent_contracts_as_told_raw_and_after_p() -> None:
    """The distance of the rate from one is 2/(κ*+1) within 2 %, and P improves κ* by at least 100."""
    kappa = {}
    for preconditioned in (False, True):
        problem = Problem(preconditioned)
        found = effective_condition_number(problem.matrix)
        kappa[preconditioned] = found.condition_number
        assert (found.rank, found.size) == (10, 12)
        # once the other eigenvectors' parts are gone, and before rounding is all that is left
        rate = problem.measured_rate(found.best_step, *((100, 300) if preconditioned else (300, 900)))
        assert 1 - rate == pytest.approx(2 / (found.condition_number + 1), rel=0.02)
        assert contraction_rate(found) == pytest.approx(1 - 2 / (found.condition_number + 1), rel=1e-12)
    assert kappa[False] / kappa[True] >= 100

    # the factor from the exact spectra of one unit's matrices, formed by hand
    x = features()
    design = torch.cat([torch.ones(SAMPLES, 1, dtype=torch.float64), x], dim=1)
    h = design.T @ design / SAMPLES
    p = preconditioning_matrix(x.mean(0), x.var(0, correction=0))
    values = [torch.linalg.eigvalsh(m) for m in (h, p.T @ h @ p)]
    factor = float(values[0][-1] / values[0][1] / (values[1][-1] / values[1][1]))
    assert kappa[False] / kappa[True] == pytest.approx(factor, rel=1e-6)
    assert effective_condition_number(h, preconditioner=p).condition_number == pytest.approx(kappa[True], rel=1e-9)


def test_another_step_and_divergence() -> None:
    problem = Problem(True)
    found = effective_condition_number(problem.matrix)
    for step in (1.0 / found.lambda_max, 2.1 / found.lambda_max):
        told = contraction_rate(problem.matrix, step)
        assert told == max(abs(1 - step * found.lambda_max), abs(1 - step * found.lambda_min))
        assert Problem(True).measured_rate(step, 100, 200) == pytest.approx(told, rel=1e-3)
    assert told > 1


def test_a_scale_invariant_net_is_flat_along_its_weights() -> None:
    """f(w) = xᵀw/‖w‖: at a minimum the Hessian is that of the plain problem on the sphere, over ‖w‖²."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        y = x @ (w / w.norm())
    found = effective_condition_number(
        HessianOperator((lambda: 0.5 * (x @ (w / w.norm()) - y).square().mean(), 50), [w])
    )
    assert (found.rank, found.size) == (3, 4)
    unit = (w / w.norm()).detach()
    sphere = torch.eye(4, dtype=torch.float64) - torch.outer(unit, unit)
    expected = torch.linalg.eigvalsh(sphere @ (x.T @ x / 50) @ sphere)
    assert found.condition_number == pytest.approx(float(expected[-1] / expected[1]), rel=1e-9)
    assert found.lambda_max == pytest.approx(float(expected[-1] / w.detach().square().sum()), rel=1e-9)


def test_numbers_of_a_diagonal() -> None:
    found = effective_condition_number(torch.diag(torch.tensor([0.0, 0.5, 2.0, 8.0], dtype=torch.float64)))
    assert (found.condition_number, found.best_step, found.rank) == (16.0, 2 / 8.5, 3)
    assert found.tolerance == 4 * torch.finfo(torch.float64).eps
    assert found.rate() == pytest.approx(15 / 17)
    assert found.rate(0.1) == pytest.approx(0.95)
    assert "κ* 16: λ_max 8, λ*_min 0.5, rank 3 of 4" in str(found)
    rough = effective_condition_number(torch.diag(torch.tensor([1e-9, 0.5, 2.0])), tolerance=1e-6)
    assert (rough.rank, rough.gap) == (2, pytest.approx(2**-1 / (2 * torch.finfo(torch.float32).eps)))


def test_no_gap_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no gap between zero and non-zero.*would measure the tolerance"):
        effective_condition_number(torch.diag(torch.logspace(-20, 0, 41, dtype=torch.float64)))
    with pytest.raises(ValueError, match="no gap"):  # full rank, down to rounding
        effective_condition_number(torch.diag(torch.logspace(-14, 0, 15, dtype=torch.float64)))


def test_refusals() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"eigenvalues from -1 to 1: κ\* is defined for positive semidefinite"):
        effective_condition_number(torch.diag(torch.tensor([-1.0, 0.0, 1.0])))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), it must be square"):
        effective_condition_number(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not symmetric: pass PᵀHP, not PPᵀH"):
        effective_condition_number(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="matrix is not finite"):
        effective_condition_number(eye * float("nan"))
    with pytest.raises(ValueError, match="eigenvalues from 0 to 0"):
        effective_condition_number(0 * eye)
    with pytest.raises(TypeError, match="matrix is a str"):
        effective_condition_number("H")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"preconditioner has shape \(2, 2\), it must be \(3, 3\)"):
        effective_condition_number(eye, preconditioner=eye[:2, :2])
    with pytest.raises(ValueError, match=r"tolerance is 2\.0, it must be in \(0, 1\)"):
        effective_condition_number(eye, tolerance=2.0)
    with pytest.raises(ValueError, match=r"step is -1\.0, it must be positive"):
        contraction_rate(eye, -1.0)
    with pytest.raises(ValueError, match=r"6000 rows.*at most 5000"):
        effective_condition_number(torch.eye(6000))
    with pytest.raises(ValueError, match="both must be"):
        preconditioning_matrix([0.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="variance has minimum -1"):
        preconditioning_matrix([0.0], [-1.0])
