"""One layer at a step: its gradients, and the places where its samples and its statistics are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnp_optim.bank import StatisticsBank
from bnp_optim.discovery import Layer, ShardedLayer
from bnp_optim.intake import Intake
from bnp_optim.moments import Moments, statistics_dtype
from bnp_optim.sharding.blocks import local_grad
from bnp_optim.spectral import Projection, power_step

__all__ = ["Home", "LiveLayer", "Origin", "Place", "dense_grad", "home_of", "live_shards", "statistics_home"]

Home = tuple[torch.device, torch.dtype]


class LiveLayer(NamedTuple):
    """A layer whose weight has a gradient at this step.

    Args:
        bias: The bias that takes part in P, or None: then the rank-one form serves the weight alone.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    weight_grad: Tensor
    bias_grad: Tensor | None


@dataclass(eq=False)
class Origin:
    """Where a weight that follows its inputs was last expressed; each (channels,). See :mod:`bnp_optim.following`.

    Args:
        mean: μ.
        inv_std: 1/σ̃.
        beyond: How many batches in a row lay beyond it.
        went: 1 for those that have moved before, else 0.
        waiting: Whether ``beyond`` may have other values than 0.
        settled: Whether the statistics are known to rest on enough.
    """

    mean: Tensor
    inv_std: Tensor
    beyond: Tensor
    went: Tensor
    waiting: bool = True
    settled: bool = False

    @classmethod
    def at(cls, mean: Tensor, inv_std: Tensor) -> Origin:
        """One from which nothing has moved; a copy."""
        return cls(mean.clone(), inv_std.clone(), torch.zeros_like(mean), torch.zeros_like(mean), waiting=False)

    @classmethod
    def of(cls, snapshot: Tensor, like: Tensor) -> Origin:
        """What :meth:`snapshot` was made of, where ``like`` is."""
        mean, inv_std, beyond, went = snapshot.to(like).clone().unbind()
        return cls(mean, inv_std, beyond, went)

    def become(self, mean: Tensor, inv_std: Tensor, beyond: Tensor, went: Tensor) -> None:
        """In place, so that a captured graph goes on from where its last replay ended."""
        for mine, new in zip(
            (self.mean, self.inv_std, self.beyond, self.went), (mean, inv_std, beyond, went), strict=True
        ):
            mine.copy_(new)

    def snapshot(self) -> Tensor:
        """All of it, (4, channels)."""
        return torch.stack((self.mean, self.inv_std, self.beyond, self.went))


@dataclass(eq=False)
class Place:
    """Where the samples and the statistics of one layer are kept; ``live`` during a step.

    Args:
        seen: The samples of the step, while it lasts.
        origin: Of a weight that follows its inputs.
    """

    layer: Layer
    intake: Intake
    bank: StatisticsBank
    row: int
    device: torch.device
    dtype: torch.dtype
    live: LiveLayer | None = None
    projection: Projection | None = None
    seen: Moments | None = None
    origin: Origin | None = None

    def take(self) -> Moments | None:
        """The samples behind the gradient; where there is none, what waits has lost its gradient."""
        if self.live is not None:
            self.seen, self.projection = self.intake.take()
            return self.seen
        self.intake.discard()
        if self.intake.traced:
            self.intake.clear_trace()
        return None

    def power_step(self, finite: Any) -> None:
        """Let q² follow the largest eigenvalue, if the step's samples are ``finite``."""
        direction = self.intake.direction
        if self.live is None or self.projection is None or direction is None:
            return
        touched = self.bank.ledger.touched
        active = torch.as_tensor(finite) if touched is None else touched[self.row] & finite
        if isinstance(self.projection.rows, Tensor):  # of all ranks: maybe none
            active = active & (self.projection.rows > 0).any()
        factors = self.bank.factors(self.row)
        affine = self.live.bias is not None
        q2 = power_step(self.projection, factors, affine=affine, direction=direction, active=active)
        self.bank.set_q2(self.row, torch.where(active, q2, self.bank.now.q2[self.row]))


def live_shards(layer: ShardedLayer, weight: Tensor, bias: Tensor | None) -> LiveLayer | None:
    """A sharded layer with what this rank holds of its gradients; without the weight's there is nothing to do."""
    weight_grad = local_grad(weight)
    if weight_grad is None:
        return None
    bias_grad = None if bias is None else local_grad(bias)
    return LiveLayer(layer, weight, None if bias_grad is None else bias, weight_grad, bias_grad)


def home_of(weight: Tensor | None) -> Home:
    """A layer's device and dtype."""
    return (torch.device("cpu"), torch.float32) if weight is None else (weight.device, weight.dtype)


def statistics_home(layer: Layer) -> Home:
    """Where a layer's statistics live: its device, float32, or float64 where the layer is."""
    weight = layer.weight
    return home_of(None) if weight is None else (weight.device, statistics_dtype(weight))


def dense_grad(parameter: Tensor) -> Tensor | None:
    """The gradient, if it can be changed in place; one whose entries share memory gets its own."""
    grad = parameter.grad
    if grad is None or grad.layout != torch.strided:
        return None
    if grad.is_contiguous():
        return grad
    if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
        parameter.grad = grad = grad.clone(memory_format=torch.contiguous_format)
    return grad
