"""Every test starts from the same random numbers, on one thread; and helpers that several files share."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def mlp(*, bias: bool = True) -> nn.Sequential:
    """4 → 6 → 3, always with the same weights; layers "0" and "2"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))


def inputs(steps: int, *, batch: int = 8, features: int = 4, seed: int = 1) -> list[Tensor]:
    """Off-centre inputs in different scales, so that P is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 2, features)
    return [torch.randn(batch, features, generator=generator) * scale + 0.5 for _ in range(steps)]


def backward(model: nn.Module, x: Tensor) -> Tensor:
    """Leave a gradient; the loss is the mean square of the output."""
    loss: Tensor = model(x).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, data: Iterable[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()


def takes(optimizer: str, option: str) -> bool:
    """Whether the installed torch's optimizer has that option: Adam's decoupled_weight_decay came after torch 2.6."""
    return option in inspect.signature(getattr(torch.optim, optimizer)).parameters


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, sequences, tensors and plain values are equal, NaN to NaN too."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model's ``state_dict``."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def identity_statistics(optimizer: Any) -> None:
    """Load statistics under which P = I to the last bit.

    Build ``optimizer`` with the options in ``IDENTITY``, and train it inside ``pause_statistics()``.
    """
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    checkpoint = optimizer.state_dict()
    for layer in optimizer._tracker.layers:
        entries = {
            "bnp_mean": torch.zeros(layer.rows.statistics),
            "bnp_variance": torch.ones(layer.rows.statistics),
            "bnp_count": torch.tensor(10**6),
            "bnp_mass": torch.tensor(100.0),
            "bnp_q2": torch.tensor(1.0),
        }
        checkpoint["state"].setdefault(index[id(layer.weight)], {}).update(entries)
    optimizer.load_state_dict(checkpoint)


IDENTITY: dict[str, Any] = {"var_rel_eps": 0.0, "var_eps": 1e-30, "step_scale": None}


def hook_count(model: nn.Module) -> int:
    """Forward hooks on any module of ``model``."""
    return sum(len(m._forward_hooks) for m in model.modules())


def wrap(model: nn.Module, **options: Any) -> BNPreconditioner:
    return BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def count(optimizer: BNPreconditioner, layer: str = "0") -> int:
    return int(optimizer.statistics[layer].count)


def assert_same_statistics(a: BNPreconditioner, b: BNPreconditioner, rtol: float = 1e-6) -> None:
    assert a.statistics.keys() == b.statistics.keys()
    for name, mine in a.statistics.items():
        other = b.statistics[name]
        assert int(mine.count) == int(other.count), name
        torch.testing.assert_close(mine.mean, other.mean, rtol=rtol, atol=rtol)
        torch.testing.assert_close(mine.variance, other.variance, rtol=rtol, atol=rtol)


def assert_same_weights(a: nn.Module, b: nn.Module, rtol: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)
