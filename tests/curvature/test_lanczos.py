"""Lanczos and quadrature on matrices whose spectrum is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from bnp_optim.curvature import lanczos, spectral_density
from bnp_optim.curvature.lanczos import gaussian


@dataclass
class Diagonal:
    values: Tensor
    calls: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __call__(self, v: Tensor) -> Tensor:
        self.calls.append(1)
        return self.values * v


def start(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return gaussian(n, torch.Generator().manual_seed(0), dtype, torch.device("cpu"))


def test_all_eigenvalues_of_a_small_matrix() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0], dtype=torch.float64)
    found = lanczos(Diagonal(values), start(6), num_steps=100)  # clipped
    assert found.exhausted
    assert found.steps == 6
    torch.testing.assert_close(found.ritz_values, values, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.weights, (start(6) / start(6).norm()).square(), rtol=0, atol=1e-12)
    assert not found.residuals.any()


def test_breakdown_ends_the_run() -> None:
    operator = Diagonal(torch.tensor([1.0] * 50 + [4.0] * 50, dtype=torch.float64))
    found = lanczos(operator, start(100), num_steps=30)
    assert found.exhausted
    assert found.steps == len(operator.calls) == 2  # two distinct eigenvalues
    torch.testing.assert_close(found.ritz_values, torch.tensor([1.0, 4.0], dtype=torch.float64), rtol=0, atol=1e-12)
    zero = lanczos(Diagonal(torch.zeros(9)), torch.ones(9), num_steps=5)
    assert zero.exhausted
    assert zero.ritz_values.tolist() == [0.0]


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_orthogonality_lasts(dtype: torch.dtype, accuracy: float) -> None:
    """Outliers converge early, and without re-orthogonalization they would appear again and again."""
    values = torch.cat([torch.linspace(0, 1, 495, dtype=dtype), torch.tensor([10.0, 20, 40, 80, 160], dtype=dtype)])
    found = lanczos(Diagonal(values), start(500, dtype), num_steps=80, keep_basis=True)
    assert found.basis is not None
    gram = found.basis @ found.basis.T
    assert float((gram - torch.eye(80, dtype=dtype)).abs().max()) < accuracy
    torch.testing.assert_close(found.ritz_values[-5:], values[-5:].double(), rtol=accuracy, atol=0)
    assert float(found.ritz_values[-6]) < 1 + 1e-5
    top = found.ritz_vectors(torch.tensor([79]))[0]
    assert abs(float(top[-1])) == pytest.approx(1, abs=accuracy)
    assert float((values * top - found.ritz_values[-1].to(dtype) * top).norm()) <= 1e-4


def test_residuals_are_honest() -> None:
    values = torch.linspace(-1, 1, 300, dtype=torch.float64) ** 3
    found = lanczos(Diagonal(values), start(300), num_steps=25, keep_basis=True)
    vectors = found.ritz_vectors(torch.arange(25))
    true = (values * vectors - found.ritz_values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=1e-12)
    distance = (found.ritz_values[:, None] - values).abs().amin(1)
    assert bool((distance <= found.residuals + 1e-12).all())


def test_tolerance_stops_early() -> None:
    values = torch.cat([torch.linspace(0, 1, 999, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)])
    told: list[tuple[int, int]] = []
    found = lanczos(Diagonal(values), start(1000), num_steps=60, tolerance=1e-3, progress=lambda *x: told.append(x))
    assert found.steps < 15
    assert float(found.ritz_values[-1]) == pytest.approx(5, rel=1e-3)
    assert told == [(i + 1, 60) for i in range(found.steps)]


def test_restriction_to_a_complement() -> None:
    values = torch.arange(1.0, 9.0, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    found = lanczos(Diagonal(values), start(8), num_steps=50, orthogonal_to=eye[-3:])
    torch.testing.assert_close(found.ritz_values, values[:5], rtol=0, atol=1e-12)


def test_wrong_arguments() -> None:
    operator = Diagonal(torch.ones(4))
    with pytest.raises(ValueError, match="num_steps is 0"):
        lanczos(operator, torch.ones(4), num_steps=0)
    with pytest.raises(ValueError, match="give a non-zero vector"):
        lanczos(operator, torch.zeros(4), num_steps=2)
    with pytest.raises(ValueError, match="product 1 of the operator is not finite"):
        lanczos(Diagonal(torch.full((4,), torch.inf)), torch.ones(4), num_steps=2)
    with pytest.raises(ValueError, match="the basis was not kept"):
        lanczos(operator, torch.ones(4), num_steps=2).ritz_vectors(torch.tensor([0]))
    with pytest.raises(ValueError, match="num_probes is 0"):
        spectral_density(operator, num_probes=0)
    with pytest.raises(ValueError, match=r"share is 1, it must be in \(0, 1\)"):
        spectral_density(operator).quantile(1)


class Rotated(Diagonal):
    """The same spectrum in a random basis: of a diagonal matrix, signs give every average without error."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        generator = torch.Generator().manual_seed(9)
        n = len(values)
        self.reflections = torch.randn(3, n, generator=generator, dtype=torch.float64).to(values.dtype)
        self.reflections /= self.reflections.norm(dim=1, keepdim=True)

    def __call__(self, v: Tensor) -> Tensor:
        for u in self.reflections:
            v = v - 2 * torch.dot(u, v) * u
        v = super().__call__(v)
        for u in self.reflections.flip(0):
            v = v - 2 * torch.dot(u, v) * u
        return v


@pytest.mark.parametrize("seed", range(4))
def test_the_density_of_a_known_spectrum(seed: int) -> None:
    values = torch.cat([torch.logspace(-4, 0, 995), -torch.tensor([0.5, 30]), torch.tensor([50.0, 90, 100])]).double()
    told: list[tuple[int, int]] = []
    density = spectral_density(Rotated(values), seed=seed, progress=lambda *x: told.append(x))
    assert told == [(i + 1, 250) for i in range(250)]
    assert {-30.0, 50.0, 90.0, 100.0} <= {round(x, 6) for x in density.outliers.tolist()}
    assert float(density.weights.sum()) == pytest.approx(1)
    mean, error = density.mean(torch.abs)
    assert mean == pytest.approx(float(values.abs().mean()), rel=0.02)
    assert 0 < error < 0.03 * mean
    for share in (0.9, 0.75, 0.5):
        assert density.quantile(share)[0] == pytest.approx(float(values.abs().quantile(share)), rel=0.15)
    assert density.mean(torch.ones_like) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    points, curve = density.curve()
    s = torch.asinh(points / (1e-3 * 100))
    assert float(torch.trapezoid(curve, s)) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("n", [1, 2, 3, 100])
@pytest.mark.parametrize("num_probes", [1, 5])
def test_multiples_and_tiny_matrices(n: int, num_probes: int) -> None:
    """One Ritz value may stand for many eigenvalues: the identity, and a matrix with two levels."""
    density = spectral_density(Rotated(torch.ones(n, dtype=torch.float64)), num_probes=num_probes)
    assert density.mean(torch.abs)[0] == pytest.approx(1)
    assert density.quantile(0.5)[0] == pytest.approx(1)
    if n == 100 and num_probes > 1:
        levels = torch.cat([torch.ones(80), torch.full((20,), 9.0)]).double()
        density = spectral_density(Rotated(levels), num_probes=num_probes)
        mean, error = density.mean(torch.abs)
        assert abs(mean - float(levels.mean())) <= 4 * error + 1e-9


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_ones() -> None:
    values = torch.logspace(-3, 0, 200).double()
    state = torch.get_rng_state().clone()
    a, b, c = (spectral_density(Rotated(values), num_steps=10, seed=s).mean(torch.square) for s in (1, 1, 2))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), state)
