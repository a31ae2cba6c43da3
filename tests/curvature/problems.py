"""Digits, small nets, and their exact spectra: the oracle, by forward over reverse, which the package never uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_optim import BNPreconditioner

SMALL = (64, 16, 16, 10)
FULL = (64, 32, 32, 10)


@lru_cache
def digits(samples: int = 600) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, pixels in [0, 1], float64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16)[:samples], torch.tensor(data.target)[:samples]


def mlp(widths: Sequence[int] = SMALL, seed: int = 0) -> nn.Sequential:
    """Tanh between Linear layers, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """A closure fit for both matrices."""
    return lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y))


def prepare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> BNPreconditioner:
    """Train by BNP-SGD for so many steps of 32 samples; with 0 steps, measure the whole data and do not move."""
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1 if steps else 0.0), model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(max(steps, 1)):
        batch = torch.randint(0, len(x), (32,), generator=generator) if steps else torch.arange(len(x))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All columns at once: (n, n)."""
    names = [name for name, _ in model.named_parameters()]
    params = [p.detach() for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in params])
        named = {k: part.view(p.shape) for k, part, p in zip(names, parts, params, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([p.reshape(-1) for p in params])
    gradient = torch.func.grad(loss)
    eye = torch.eye(len(flat), dtype=flat.dtype)
    return torch.func.vmap(lambda v: torch.func.jvp(gradient, (flat,), (v,))[1], chunk_size=32)(eye)


def dense_p(model: nn.Sequential, optimizer: BNPreconditioner) -> Tensor:
    """P by the formula, from what ``optimizer.statistics`` shows: (1/q) U D per row, the paper's notation."""
    options = optimizer._options
    columns = sum(p.numel() for p in model.parameters())
    whole = torch.zeros(columns, columns, dtype=torch.float64)
    offset = 0
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        s = optimizer.statistics[name]
        sigma = (s.variance + options.var_rel_eps * s.variance.max() + options.var_eps).sqrt()
        tracker = optimizer._tracker
        q = float(tracker.factors(next(x for x in tracker.layers if x.name == name)).q2) ** 0.5
        outputs, d = layer.weight.shape
        for row in range(outputs):
            weights = slice(offset + row * d, offset + (row + 1) * d)
            bias = offset + outputs * d + row
            whole[weights, weights] = torch.diag(1 / sigma) / q
            whole[bias, weights] = -s.mean / sigma / q
            whole[bias, bias] = 1 / q
        offset += outputs * (d + 1)
    return whole


def kappas(eigenvalues: Tensor) -> dict[str, float]:
    """What a report estimates, exactly."""
    size = eigenvalues.abs()
    return {
        "lambda_max": float(eigenvalues.max()),
        "lambda_min": float(eigenvalues.min()),
        "kappa_mean": float(eigenvalues.max() / size.mean()),
        "kappa_q90": float(size.max() / size.quantile(0.9)),
        "kappa_q75": float(size.max() / size.quantile(0.75)),
    }
