"""Models, batches and optimizers of the sharding checks, the same on every rank; and the plain run to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bnp_optim import BNPreconditioner, register_layer
from bnp_optim.layers.linear import TransposedLinearAdapter


class Conv1D(nn.Module):
    """As transformers has it: a Linear with its weight stored as (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


register_layer(Conv1D, TransposedLinearAdapter())


class Everything(nn.Module):
    """One layer of each kind; rows and inputs that two and four ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.grouped = nn.Conv2d(3, 6, 3, groups=3)
        self.up = nn.ConvTranspose2d(6, 3, 2)
        self.flat = nn.Linear(3 * 5 * 6, 7)
        self.no_bias = nn.Linear(7, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.stored = Conv1D(5, 6)
        self.stored_alone = Conv1D(6, 5, bias=False)
        self.tied = nn.Linear(6, 6)
        self.tied_too = nn.Linear(6, 6)
        self.tied_too.weight = self.tied.weight
        self.tied_too.bias = self.tied.bias
        self.one = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x[:, None, :6, :6]))
        h = torch.tanh(self.up(torch.relu(self.grouped(h)))).flatten(1)
        h = torch.tanh(self.flat(nn.functional.pad(h, (0, 90 - h.shape[1]))))
        index = (x[:, 6, :6].abs() * 10).long() % 11
        h = self.norm(self.no_bias(h) + self.embedding(index).mean(1))
        h = torch.tanh(self.stored_alone(torch.tanh(self.stored(h))))
        h = torch.tanh(self.tied(h)) + torch.tanh(self.tied_too(2 * h))
        return self.one(h)


class Feedforward(nn.Module):
    """For tensor parallel: column-wise, then row-wise, with and without bias, and a head that all ranks have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.up_alone, self.down_alone = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.down(torch.tanh(self.up(x[:, :4]))))
        return self.head(self.down_alone(torch.relu(self.up_alone(h)))).mean(1)


class Attending(nn.Module):
    """Attention with its packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Recurrent(nn.Module):
    """Recurrent layers, one of them stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 4, batch_first=True)
        self.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.gru(x)[0])[0][:, -1])


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    """(size, 7, 6), with a mean that is not zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 7, 6, generator=generator, dtype=torch.float64).mul(0.7).add(0.5).to(dtype)


def mine(x: Tensor, rank: int, world: int) -> Tensor:
    """A rank's share of a batch."""
    return x[rank::world]


def built(seed: int = 0, dtype: torch.dtype = torch.float64) -> Everything:
    """The model, the same everywhere."""
    torch.manual_seed(seed)
    return Everything().to(dtype)


OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9), {"mode": "gradient"}),
    # entries whose gradient is nearly zero turn rounding into steps of Adam: a small rate keeps them small
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.003), {}),
    "one q for all layers": (lambda p: torch.optim.AdamW(p, lr=0.003), {"step_scale": "common"}),
    "two-sided momentum": (
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
        {"mode": "two_sided"},
    ),
    "spectral": (lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), {"step_scale": "spectral", "mode": "gradient"}),
    "ASGD": (lambda p: torch.optim.ASGD(p, lr=0.01), {"mode": "two_sided"}),  # its update reads the parameter
}


def wrapped(model: nn.Module, kind: str, **options: Any) -> BNPreconditioner:
    base, more = OPTIMIZERS[kind]
    return BNPreconditioner(base(model.parameters()), model, **more, **options)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole, on every rank."""
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.mean((1, 2))[:, None]).square().mean()


def steps(model: nn.Module, optimizer: Any, count: int, share: Callable[[Tensor], Tensor], first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, share(batch(step, dtype=dtype))).backward()
        optimizer.step()


ALONE: dict[int, Any] = {}  # a group of every rank's own, for runs that share nothing


def plain(
    kind: str, count: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Everything, BNPreconditioner]:
    """One process on the whole batch."""
    model = built(dtype=dtype)
    optimizer = wrapped(model, kind, process_group=ALONE.get(torch.distributed.get_rank()), **options)
    steps(model, optimizer, count, lambda x: x)
    return model, optimizer


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - v).abs().max()) for k, v in expected.items())


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
