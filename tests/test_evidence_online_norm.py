"""Online Normalization against its formulas, sample by sample in NumPy; and Muon's orthogonalization."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks.evidence.muon import CPUMuon, orthogonalize
from benchmarks.evidence.online_norm import OnlineNorm

A, B, EPS = 0.9, 0.8, 1e-5


class Slow:
    """The paper's recursions for one layer without scale, shift and layer scaling; x is (channels, positions)."""

    def __init__(self, channels: int) -> None:
        self.mu, self.var = np.zeros(channels), np.ones(channels)
        self.e_y, self.e_1 = np.zeros(channels), np.zeros(channels)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sigma = np.sqrt(self.var + EPS)
        y = (x - self.mu[:, None]) / sigma[:, None]
        m = x.mean(1)
        self.var = A * self.var + (1 - A) * x.var(1) + A * (1 - A) * (m - self.mu) ** 2
        self.mu = A * self.mu + (1 - A) * m
        return y, sigma

    def backward(self, g: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        tilde = g - (1 - B) * self.e_y[:, None] * y
        self.e_y = self.e_y + (tilde * y).mean(1)
        out = tilde / sigma[:, None] - (1 - B) * self.e_1[:, None]
        self.e_1 = self.e_1 + out.mean(1)
        return out


def slow_layer_scaling(z: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample's z / √(mean z² + ε), and the gradient with respect to z."""
    root = np.sqrt((z**2).mean() + EPS)
    return z / root, (g - (g * z).mean() / root**2 * z) / root


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
@pytest.mark.parametrize("batch", [1, 4])
def test_matches_the_recursions(batch: int, positions: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    channels, count = 5, int(np.prod(positions))
    layer = OnlineNorm(channels, A, B, EPS).double()
    weight, bias = rng.normal(size=channels) + 2, rng.normal(size=channels)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    slow = Slow(channels)
    for _ in range(3):  # the state goes on from call to call
        x = rng.normal(size=(batch, channels, count)) * 3 + 1
        g = rng.normal(size=x.shape)
        expected, gradients, passed = [], [], []
        for sample in x:
            y, sigma = slow.forward(sample)
            passed.append((y, sigma))
        for (y, sigma), g_out in zip(passed, g, strict=True):
            out, g_z = slow_layer_scaling(weight[:, None] * y + bias[:, None], g_out)
            expected.append(out)
            gradients.append(slow.backward(g_z * weight[:, None], y, sigma))
        leaf = torch.from_numpy(x).reshape(batch, channels, *positions).requires_grad_()
        result = layer(leaf)
        result.backward(torch.from_numpy(g).reshape(result.shape))
        assert leaf.grad is not None
        np.testing.assert_allclose(result.detach().numpy().reshape(x.shape), np.stack(expected), rtol=1e-10)
        np.testing.assert_allclose(leaf.grad.numpy().reshape(x.shape), np.stack(gradients), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(layer.mean.numpy(), slow.mu, rtol=1e-12)
    np.testing.assert_allclose(layer.variance.numpy(), slow.var, rtol=1e-12)


def test_a_batch_is_its_samples_one_by_one() -> None:
    torch.manual_seed(0)
    one, many = OnlineNorm(4).double(), OnlineNorm(4).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    single = torch.cat([one(sample[None]) for sample in x])
    torch.testing.assert_close(many(x), single, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(many.variance, one.variance, rtol=1e-12, atol=1e-12)


def test_evaluation_uses_the_running_statistics_and_leaves_them() -> None:
    layer = OnlineNorm(2).eval()
    x = torch.tensor([[3.0, -1.0]])
    expected = x / (1 + 1e-5) ** 0.5
    expected = expected / (expected.square().mean() + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)
    assert layer.mean.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_muon_orthogonalizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25  # what its coefficients promise
    assert torch.linalg.matrix_norm(found - u @ vh) / 6**0.5 < 0.35


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_steps_as_torch_does() -> None:
    """In float64 ours orthogonalizes in float64, theirs in bfloat16: so to its precision."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(20, 8, dtype=torch.float64)) for _ in range(2))
    mine = CPUMuon([ours], lr=0.1)
    muon = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        ours.grad = torch.randn(20, 8, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        for optimizer in (mine, muon):
            optimizer.step()
    moved, moved_too = ours.detach() - 1, theirs.detach() - 1
    assert (moved - moved_too).norm() / moved_too.norm() < 0.02
