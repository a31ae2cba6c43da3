"""Gaussian integrals of activations, against closed forms and scipy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnp_optim.theory import Activation, GaussianMoments, gaussian_moments
from bnp_optim.theory.activations import as_activation

FIELDS = ("value", "cross", "slope", "slope_cross", "tilt")
CLOSED = {
    "relu": Activation(torch.relu, kinks=(0.0,)),
    "erf": Activation(lambda u: torch.erf(u)),
    "linear": Activation(lambda u: u * 1),
    "leaky_relu": Activation(nn.LeakyReLU(0.01), kinks=(0.0,)),
}


def assert_close(a: GaussianMoments, b: GaussianMoments, tolerance: float) -> None:
    for name in FIELDS:
        scale = b.value if name in ("value", "cross") else b.slope
        assert abs(getattr(a, name) - getattr(b, name)) <= tolerance * scale, name


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("q1", [1e-3, 1e4])
@pytest.mark.parametrize("c", [-1.0, -0.999, 0.0, 0.9, 1 - 1e-10, 1.0])
def test_quadrature_matches_closed_forms(name: str, q1: float, c: float) -> None:
    """1e-8 is asked for; the quadrature has 1e-11 from nearly equal to opposite samples."""
    assert_close(gaussian_moments(CLOSED[name], q1, c * q1), gaussian_moments(as_activation(name), q1, c * q1), 1e-11)


def test_relu_in_the_papers_form() -> None:
    """Wei et al.: (q/2π)(√(1-c²) + cπ/2 + c·asin c) and (π/2 + asin c)/(2π)."""
    q, c = 1.7, 0.3
    m = gaussian_moments(as_activation("relu"), q, c * q)
    assert m.value == pytest.approx(q / 2, rel=1e-14)
    expected = q / (2 * math.pi) * (math.sqrt(1 - c * c) + c * math.pi / 2 + c * math.asin(c))
    assert m.cross == pytest.approx(expected, rel=1e-14)
    assert (m.slope, m.slope_cross) == pytest.approx((0.5, (math.pi / 2 + math.asin(c)) / (2 * math.pi)), rel=1e-14)


@pytest.mark.parametrize("name", ["tanh", "gelu", "softplus"])
def test_smooth_activations_against_the_trapezoidal_rule(name: str) -> None:
    activation, q1, q2 = as_activation(name), 2.3, 0.7
    z = torch.linspace(-12, 12, 601, dtype=torch.float64)
    w = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * 24 / 600
    found = gaussian_moments(activation, q1, q2)
    own = activation.values(math.sqrt(q1) * z)
    pair = activation.values(math.sqrt(q2) * z[:, None] + math.sqrt(q1 - q2) * z)
    for i, (same, cross) in enumerate(((found.value, found.cross), (found.slope, found.slope_cross))):
        assert same == pytest.approx(float(w @ own[i].square()), rel=1e-8)
        assert cross == pytest.approx(float(w @ (pair[i] @ w).square()), rel=1e-8)


def test_a_clipped_line_against_scipy() -> None:
    """E φ'φ' is the probability that both samples are inside."""
    stats = pytest.importorskip("scipy.stats", reason="the oracle is scipy")
    low, high, q1, q2 = -0.3, 0.7, 2.0, 0.5
    found = gaussian_moments(as_activation(nn.Hardtanh(low, high)), q1, q2)
    accuracy = {"abseps": 1e-12, "releps": 1e-12, "maxpts": 10**6}
    normal = {"mean": [0.0, 0.0], "cov": [[q1, q2], [q2, q1]]}
    expected = stats.multivariate_normal.cdf([high, high], **normal, **accuracy, lower_limit=[low, low])
    assert found.slope_cross == pytest.approx(expected, rel=1e-8)
    assert found.slope == pytest.approx(stats.norm.cdf(high / q1**0.5) - stats.norm.cdf(low / q1**0.5), rel=1e-12)


def test_a_module_counts_with_its_parameters_and_is_left_alone() -> None:
    module = nn.LeakyReLU(0.3, inplace=True)
    exact = gaussian_moments(Activation(torch.relu, slope=0.3), 2.0, 0.5)
    assert gaussian_moments(as_activation(module), 2.0, 0.5) == exact
    assert module.inplace
    learned = nn.PReLU(init=0.3)
    assert_close(gaussian_moments(as_activation(learned), 2.0, 0.5), exact, 1e-7)  # 0.3 in float32
    assert learned.weight.dtype == torch.float32
    clipped = gaussian_moments(as_activation(nn.Hardtanh(-0.3, 0.7)), 2.0, 0.5)
    assert_close(clipped, gaussian_moments(Activation(lambda u: u.clamp(-0.3, 0.7), (-0.3, 0.7)), 2.0, 0.5), 1e-13)


def test_a_kink_that_was_not_named_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"cannot be integrated.*kinks="):
        gaussian_moments(Activation(lambda u: u.clamp(-0.33, 0.71), name="clip"), 2.0, 0.5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"activation is 'swoosh', known are .*erf.*relu"):
        as_activation("swoosh")
    with pytest.raises(TypeError, match="activation is 3, it must be a name, a module or a callable"):
        as_activation(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be elementwise and differentiable"):
        gaussian_moments(Activation(lambda u: u.sum()), 1.0, 0.0)
    with pytest.raises(ValueError, match="is not finite on"):
        gaussian_moments(Activation(torch.log), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"q1 is -1\.0, it must be positive"):
        gaussian_moments(as_activation("tanh"), -1.0, 0.0)
    with pytest.raises(ValueError, match=r"q2 is 2\.0, it must be within"):
        gaussian_moments(as_activation("tanh"), 1.0, 2.0)
    with pytest.raises(ValueError, match="num_parameters=3"):
        as_activation(nn.PReLU(3))
