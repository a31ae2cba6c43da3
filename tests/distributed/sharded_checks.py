"""What the checks of sharded models share, and where they are found by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

from bnp_optim import BNPreconditioner
from tests.distributed.sharded_models import (
    full_weights,
)

CHECKS: dict[str, Callable[[], Any]] = {}
STEPS = int(os.environ.get("STEPS", "50"))
FEW = min(STEPS, 8)


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def mine(x: Tensor) -> Tensor:
    return x[dist.get_rank() :: dist.get_world_size()]


def digest(model: nn.Module) -> str:
    """The same if and only if all parameters are, to the last bit."""
    whole = b"".join(p.contiguous().view(torch.uint8).numpy().tobytes() for p in full_weights(model).values())
    return hashlib.sha256(whole).hexdigest()


def sharded(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """In several units; nested ones, of a container, and of a single layer."""
    for name, child in model.named_children():
        if name in ("conv", "stored", "no_bias", "up"):
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def statistics_differ(found: BNPreconditioner, expected: BNPreconditioner) -> float:
    """The largest difference of means and variances; the counts must be equal."""
    mine, theirs = found.statistics, expected.statistics
    assert mine.keys() == theirs.keys()
    assert all(mine[k].count == theirs[k].count for k in theirs), {k: int(mine[k].count) for k in theirs}
    pairs = [(getattr(mine[k], what), getattr(v, what)) for k, v in theirs.items() for what in ("mean", "variance")]
    return max(float((a - b).abs().max()) for a, b in pairs)


def unshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def averaging(model: nn.Module, group: Any) -> nn.Module:
    """Data parallel by hand, since DistributedDataParallel takes no DTensors."""

    def average(p: Tensor) -> None:
        grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        dist.all_reduce(grad, group=group)
        grad.div_(group.size())

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(average)
    return model
