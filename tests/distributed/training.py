"""What the scripts of this folder share: models, data, and training by one rank or by all."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnp_optim import BNPreconditioner

alone: Any = None  # this rank's own group


def start(seconds: float = 60) -> tuple[int, int]:
    """Join the other processes; returns rank and world."""
    global alone
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*", FutureWarning)  # of torch's own calls
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch 2.6 in its own checkpoints
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    groups = [dist.new_group([i]) for i in range(dist.get_world_size())]
    alone = groups[dist.get_rank()]
    return dist.get_rank(), dist.get_world_size()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 6, 6)),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (mlp, 4),
    "wide": (wide, 4),
    "convolutions": (convolutions, 72),
}


def build(model: str = "mlp") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return MODELS[model][0]()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def batches(steps: int, features: int, sizes: Callable[[int], list[int]], seed: int = 1) -> Iterator[list[Tensor]]:
    """For each step a batch per rank, off-centre and in different scales."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 2, features)
    for step in range(steps):
        sizes_now = sizes(step)
        x = torch.randn(sum(sizes_now), features, generator=generator) * scale + 0.5
        yield list(x.split(sizes_now))


def wrap(model: nn.Module, base: Callable[[Any], torch.optim.Optimizer] = sgd, **options: Any) -> BNPreconditioner:
    return BNPreconditioner(base(model.parameters()), model, **options)


def joined(parts: list[Tensor], model: nn.Module, optimizer: Any) -> None:
    """A step of one process on all ranks' samples."""
    optimizer.zero_grad()
    model(torch.cat(parts)).square().mean().backward()
    optimizer.step()


def shared(parts: list[Tensor], model: nn.Module, optimizer: Any) -> None:
    """A step of one rank on its own samples; DistributedDataParallel averages, so the ranks' means are weighted."""
    mine = parts[dist.get_rank()]
    optimizer.zero_grad()
    (model(mine).square().sum() / 3 * len(parts) / sum(map(len, parts))).backward()
    optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def statistics(optimizer: BNPreconditioner) -> Tensor:
    found = optimizer.statistics.values()
    return torch.cat([torch.cat([s.mean, s.variance, s.count[None]]).double() for s in found])


def everywhere(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found


def same_everywhere(tensor: Tensor) -> bool:
    return all(torch.equal(x, tensor) for x in everywhere(tensor))


def parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


def message(action: Callable[[], Any]) -> str:
    """The error that it ends in."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
