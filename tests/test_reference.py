"""The package against the slow NumPy implementation: every layer × option, over 20 steps, in both precisions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnp_optim import BNPreconditioner
from tests.cases import LAYERS, LayerCase
from tests.reference.numpy_bnp import ReferenceBNP

STEPS = 20
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"step_scale": "fan_in", "debias": False, "variance": "batch"},
    "spectral": {"step_scale": "spectral", "stat_decay": 0.9},
    "unbounded": {"step_scale": None, "stat_decay": 0.8},
    "trace-undebiased": {"debias": False, "var_rel_eps": 0.1},
    "fan-in": {"step_scale": "fan_in", "var_eps": 1e-2},
}
# |mean|/std of the inputs, and the tolerance relative to the layer's largest gradient entry, raw or preconditioned
PRECISION = [
    pytest.param(torch.float64, 10.0, 1e-10, id="float64-10"),
    pytest.param(torch.float32, 10.0, 1e-5, id="float32-10"),
    pytest.param(torch.float32, 1000.0, 1e-3, id="float32-1000"),
]


class Twin:
    """A layer under test, its float64 double for exact gradients, and the NumPy reference."""

    def __init__(self, case: LayerCase, dtype: torch.dtype, options: dict[str, Any], mode: str, base: Any) -> None:
        self.case = case
        self.layer = case.build().to(dtype)
        self.double = copy.deepcopy(self.layer).double()
        self.wrapper = BNPreconditioner(base(self.layer.parameters()), self.layer, mode=mode, **options)
        geometry = case.reference_layer()
        if options.get("step_scale") == "spectral":
            (tracked,) = self.wrapper._tracker.layers
            direction = self.wrapper._tracker.snapshot(tracked)["direction"].double().numpy()
            options = {**options, "direction": direction if geometry.bias else direction[:, 1:]}
        self.reference = ReferenceBNP(geometry, **options)
        self.generator = torch.Generator().manual_seed(7)

    def backward(self, n: int, ratio: float, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """One batch through both layers; returns the exact gradients."""
        x = self.case.inputs(n, ratio, self.generator, step)
        with torch.no_grad():
            for mine, exact in zip(self.layer.parameters(), self.double.parameters(), strict=True):
                exact.copy_(mine)
        gradients: list[Tensor] = []
        for layer in (self.layer, self.double):
            dtype = layer.weight.dtype
            layer.zero_grad()
            y = layer(x.to(dtype))
            if not gradients:
                # exact in float32, and far from zero, so that no gradient vanishes by cancellation alone
                self.weights = (torch.rand(y.shape, generator=self.generator) + 0.5).double()
            (y * self.weights.to(dtype)).sum().backward()
            gradients = [p.grad for p in layer.parameters()]
        self.reference.observe(x.numpy())
        g_w = self.double.weight.grad.numpy()
        return g_w, None if self.double.bias is None else self.double.bias.grad.numpy()


def assert_close(found: list[Tensor], expected: list[np.ndarray], tolerance: float, scale: float, what: str) -> None:
    scale = max(scale, *(np.abs(e).max() for e in expected))
    error = max(np.abs(f.double().numpy() - e).max() for f, e in zip(found, expected, strict=True))
    assert error <= tolerance * scale, f"{what}: error {error:.3g}, largest entry {scale:.3g}"


def largest(*gradients: np.ndarray | None) -> float:
    return max(float(np.abs(g).max()) for g in gradients if g is not None)


def present(*parts: np.ndarray | None) -> list[np.ndarray]:
    return [p for p in parts if p is not None]


grid = pytest.mark.parametrize(("dtype", "ratio", "tolerance"), PRECISION)
options_grid = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
layers_grid = pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
batches = pytest.mark.parametrize("batch", [1, 4])


@grid
@options_grid
@layers_grid
@batches
def test_gradient_form(
    case: LayerCase, options: dict[str, Any], dtype: torch.dtype, ratio: float, tolerance: float, batch: int
) -> None:
    twin = Twin(case, dtype, options, "gradient", lambda p: torch.optim.SGD(p, lr=1e-3))
    for step in range(STEPS):
        g_w, g_b = twin.backward(batch, ratio, step)
        twin.reference.commit()
        twin.wrapper.step()
        found = [p.grad for p in twin.layer.parameters()]
        expected = present(*twin.reference.gradient_form(g_w, g_b))
        assert_close(found, expected, tolerance, largest(g_w, g_b), f"step {step}")


@grid
@options_grid
@layers_grid
@batches
def test_two_sided_form(
    case: LayerCase, options: dict[str, Any], dtype: torch.dtype, ratio: float, tolerance: float, batch: int
) -> None:
    """Momentum in z, computed by NumPy, against the wrapped base: what it is fed and the update it makes.

    The parameters are zeroed before each step (the gradient of a linear layer does not depend on them), so that
    the update is read off without the rounding of w + Δw.
    """
    lr, beta = 0.5, 0.9
    twin = Twin(case, dtype, options, "two_sided", lambda p: torch.optim.SGD(p, lr=lr, momentum=beta))
    buffers: list[np.ndarray] = []
    for step in range(STEPS):
        g_w, g_b = twin.backward(batch, ratio, step)
        twin.reference.commit()
        in_z = present(*twin.reference.to_z(g_w, g_b))
        buffers = in_z if step == 0 else [beta * m + g for m, g in zip(buffers, in_z, strict=True)]
        moves = [-lr * m for m in buffers]
        update = present(*twin.reference.from_z(moves[0], moves[1] if len(moves) > 1 else None))
        parameters = list(twin.layer.parameters())
        with torch.no_grad():
            for p in parameters:
                p.zero_()
        twin.wrapper.step()
        scale = largest(g_w, g_b)
        assert_close([p.grad for p in parameters], in_z, tolerance, scale, f"Pᵀg at step {step}")
        assert_close([p.detach() for p in parameters], update, tolerance, scale, f"PΔz at step {step}")
