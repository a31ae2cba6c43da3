"""Checks of training under DistributedDataParallel."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnp_optim import fold_normalization
from tests.distributed import training
from tests.distributed.ddp_checks import CASES, check, race
from tests.distributed.training import (
    batches,
    build,
    flat,
    joined,
    parallel,
    same_everywhere,
    shared,
    statistics,
    wrap,
)


@check
def equal_to_the_joined_batch(rank: int, world: int) -> Any:
    found = {case: race(case, lambda step: [4] * world) for case in CASES}
    uneven = "gradient form, momentum", "spectral", "convolutions"
    found |= {f"{c}, uneven": race(c, lambda step: [1 + (3 * step + 5 * r) % 7 for r in range(world)]) for c in uneven}
    for row in found.values():
        del row["flat"]
    return found


@check
def equal_with_four(rank: int, world: int) -> Any:
    found = race("spectral", lambda step: [1 + (3 * step + 5 * r) % 7 for r in range(world)])
    del found["flat"]
    return found


@check
def without_synchronization(rank: int, world: int) -> Any:
    found = race("gradient form, momentum", lambda step: [4] * world, training.alone)
    del found["flat"]
    return found


@check
def options_of_ddp(rank: int, world: int) -> Any:
    def run(**ddp: Any) -> Tensor:
        found: Tensor = race("gradient form, momentum", lambda step: [4] * world, **ddp)["flat"]
        return found

    plain = run()
    options: list[dict[str, Any]] = [
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 1e-4},
    ]
    return {next(iter(o)): float((run(**o) - plain).abs().max()) for o in options}


@check
def accumulation(rank: int, world: int) -> Any:
    """Two micro-batches, the first under no_sync."""
    model, single = build(), build()
    optimizer, reference = wrap(model), wrap(single, process_group=training.alone)
    front = parallel(model)
    for halves in zip(*[batches(12, 4, lambda step: [3] * world)] * 2, strict=True):
        optimizer.zero_grad()
        with front.no_sync():
            (front(halves[0][rank]).square().mean() / 2).backward()
        (front(halves[1][rank]).square().mean() / 2).backward()
        optimizer.step()
        joined([*halves[0], *halves[1]], single, reference)
    return [same_everywhere(flat(model)), float((flat(model) - flat(single)).abs().max())]


class Branches(nn.Module):
    """Rank 0 goes to the second layer and the others to the first; later by turns. Nobody goes to the third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        found: Tensor = self.layers[which](x)
        return found


@check
def layers_used_by_some_ranks(rank: int, world: int) -> Any:
    """A layer without samples here has those of the other ranks: one update, the same preconditioning."""
    torch.manual_seed(3)
    model = Branches()
    optimizer = wrap(model)
    front = parallel(model, find_unused_parameters=True)
    counts = []
    for step, parts in enumerate(batches(10, 4, lambda step: [3] * world)):
        which = int(rank == 0) if step < 4 else (rank + step) % 2
        optimizer.zero_grad()
        front(parts[rank], which).square().mean().backward()
        optimizer.step()
        counts.append([int(s.count) for s in optimizer.statistics.values()])
    ready = sorted(layer.name for layer in optimizer._tracker.ready)
    return {
        "same": same_everywhere(flat(model)) and same_everywhere(statistics(optimizer)),
        "first": counts[0],
        "last": counts[-1],
        "ready": ready,
        "preconditioned": list(optimizer.coverage().preconditioned),
    }


@check
def ranks_without_samples(rank: int, world: int) -> Any:
    """Empty batches: at the first step, and at every fourth; and a single sample of all."""
    model, single = build(), build()
    optimizer, reference = wrap(model), wrap(single, process_group=training.alone)
    front = parallel(model)

    def sizes(step: int) -> list[int]:
        if step == 1:
            return [1] + [0] * (world - 1)
        return [0 if step % 4 == r % 4 else 1 + r for r in range(world)]

    for parts in batches(20, 4, sizes):
        shared(parts, front, optimizer)
        joined(parts, single, reference)
    return {
        "same": same_everywhere(flat(model)),
        "from_joined": float((flat(model) - flat(single)).abs().max()),
        "statistics": float((statistics(optimizer) - statistics(reference)).abs().max()),
    }


@check
def infinity_on_one_rank(rank: int, world: int) -> Any:
    model = build()
    optimizer = wrap(model)
    front = parallel(model)
    data = list(batches(4, 4, lambda step: [3] * world))
    for parts in data[:2]:
        shared(parts, front, optimizer)
    before, weights = statistics(optimizer), copy.deepcopy(model.state_dict())
    if rank == world - 1:
        data[2][rank][0, 0] = float("inf")
    shared(data[2], front, optimizer)
    untouched = torch.equal(statistics(optimizer), before)
    model.load_state_dict(weights)
    optimizer.base_optimizer.state.clear()
    shared(data[3], front, optimizer)
    return [untouched, same_everywhere(flat(model)), bool(flat(model).isfinite().all())]


@check
def scaled_gradients(rank: int, world: int) -> Any:
    """GradScaler skips a step on all ranks when one has an infinite gradient."""
    model = build()
    optimizer = wrap(model)
    front = parallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    counts, scales = [], []
    for step, parts in enumerate(batches(6, 4, lambda step: [3] * world)):
        optimizer.zero_grad()
        loss = front(parts[rank]).square().mean()
        scaler.scale(loss * (float("inf") if step == 2 and rank == 0 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(int(optimizer.statistics["0"].count))
        scales.append(scaler.get_scale())
    return [counts, scales, same_everywhere(flat(model))]


class NoReads(TorchDispatchMode):
    """What reads a tensor's value on the host fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads"
        return func(*args, **(kwargs or {}))


@check
def nothing_is_read(rank: int, world: int) -> Any:
    """The way of accelerators: counts stay tensors. One rank sees one layer late."""
    found = {}
    for scale in ("trace", "common", "spectral"):
        runs = []
        for blind in (True, False):
            model = build()
            optimizer = wrap(model, step_scale=scale)
            if blind:
                optimizer._tracker._on_host = False
                optimizer._tracker.reset()
            front = parallel(model)
            for step, parts in enumerate(batches(10, 4, lambda step: [0 if step == 0 else 2] + [3] * (world - 1))):
                optimizer.zero_grad()
                (front(parts[rank]).square().sum() / 9).backward()
                if blind and step:  # before, the layout is made
                    with NoReads():
                        optimizer.step()
                else:
                    optimizer.step()
            runs.append(torch.cat([flat(model).double(), statistics(optimizer)]))
        found[scale] = [same_everywhere(runs[0]), float((runs[0] - runs[1]).abs().max())]
    return found


@check
def folded(rank: int, world: int) -> Any:
    """Each rank folds on samples of its own before DistributedDataParallel, which hands out the first rank's."""
    model = build()
    samples = torch.randn(20, 4, generator=torch.Generator().manual_seed(rank))
    fold_normalization(model, samples * 10 ** torch.arange(4))
    apart = not same_everywhere(torch.cat([b.flatten() for b in model.buffers()]))
    optimizer = wrap(model)
    front = parallel(model)
    for parts in batches(10, 4, lambda step: [4] * world):
        shared(parts, front, optimizer)
    units = [v for s in optimizer.state_dict()["state"].values() for k, v in s.items() if k == "bnp_units"]
    return [apart, same_everywhere(torch.cat(units)), same_everywhere(flat(model))]


@check
def following(rank: int, world: int) -> Any:
    """Refrained from, and said once: no rank knows whether all of a layer's inputs are data."""
    runs = []
    for follows in (False, True):
        model = build()
        optimizer = wrap(model, follow_inputs=follows, stat_decay=0.8)
        front = parallel(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step, parts in enumerate(batches(16, 4, lambda step: [4] * world)):
                shared([x * (50 if step > 7 else 1) for x in parts], front, optimizer)
        runs.append((flat(model), sum("follow_inputs does nothing" in str(w.message) for w in caught)))
    return [torch.equal(runs[0][0], runs[1][0]), runs[0][1], runs[1][1]]
