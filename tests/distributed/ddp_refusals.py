"""Checks of ranks that do not fit together, of checkpoints, other engines and groups."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer

from bnp_optim import BNPreconditioner
from tests.distributed import training
from tests.distributed.ddp_checks import check
from tests.distributed.training import (
    adamw,
    batches,
    build,
    flat,
    joined,
    message,
    parallel,
    same_everywhere,
    sgd,
    shared,
    statistics,
    wrap,
)


@check
def other_layers(rank: int, world: int) -> Any:
    """Every rank gets the same error, for whichever rank is different."""
    found = {}

    def step(model: nn.Module, optimizer: Any) -> str:
        model(torch.ones(2, 4)).square().mean().backward()
        return message(optimizer.step)

    last = rank == world - 1
    model: nn.Module = nn.Sequential(nn.Linear(4, 3 + last))
    found["shape"] = step(model, wrap(model))
    model = nn.Sequential(nn.Linear(4, 3), *([nn.Linear(3, 3)] if last else []))
    found["number"] = step(model, wrap(model))
    model = nn.Sequential(nn.Linear(4, 3))
    found["option"] = step(model, wrap(model, stat_decay=0.9 if last else 0.99))
    model = nn.Sequential(nn.Linear(4, 3))
    found["base"] = step(model, wrap(model, adamw if last else sgd))
    model = nn.Sequential(nn.Linear(4, 3).to(torch.bfloat16 if last else torch.float32), nn.Identity())
    optimizer = wrap(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    found["dtype"] = message(optimizer.step)

    # a checkpoint that one rank alone has loaded
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model, process_group=training.alone)
    joined([torch.ones(2, 4)], model, optimizer)
    fresh = wrap(model)
    if last:
        fresh.load_state_dict(optimizer.state_dict())
    found["checkpoint"] = step(model, fresh)
    found["another model"] = message(lambda: wrap(build("wide")).load_state_dict(optimizer.state_dict()))
    return found


@check
def layers_that_change_later(rank: int, world: int) -> Any:
    """On all ranks: training goes on. On one rank: the same error on all, and the others can go on."""
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + rank)).square().mean().backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()

    step()
    torch.manual_seed(0)
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    step()
    grown = [int(s.count) for s in optimizer.statistics.values()]
    same = same_everywhere(statistics(optimizer))
    before = statistics(optimizer)
    if rank == world - 1:
        optimizer._settings["skip"] = ()
        model[1] = nn.Linear(3, 2, bias=False)
        optimizer.add_param_group({"params": list(model[1].parameters())})

    def lonely() -> None:
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()

    said = message(lonely)
    untouched = rank == world - 1 or torch.equal(statistics(optimizer), before)
    return {"grown": grown, "same": same, "said": said, "untouched": untouched}


@check
def an_adapter_that_fails(rank: int, world: int) -> Any:
    model = build()
    optimizer = wrap(model)
    x = torch.ones(2, 4)
    joined([x], model, optimizer)
    before = statistics(optimizer)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    if rank == 0:
        next(iter(optimizer._tracker._places.values())).intake.error = "the adapter is wrong"
    said = message(optimizer.step)
    return [said, torch.equal(statistics(optimizer), before)]


@check
def uneven_inputs(rank: int, world: int) -> Any:
    """join() is refused at the first step, even where the optimizer was given the module inside."""
    model = build()
    optimizer = wrap(model)
    front = parallel(model)

    def run() -> None:
        with front.join():
            for _ in range(3):
                optimizer.zero_grad()
                front(torch.ones(2, 4)).square().mean().backward()
                optimizer.step()

    return message(run)


@check
def checkpoints_by_one_rank(rank: int, world: int) -> Any:
    """torch.distributed.checkpoint's step for stateless bases is no step of the training."""
    model = build()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model, stat_interval=2)
    front = parallel(model)
    saved = None
    for step, parts in enumerate(batches(6, 4, lambda step: [3] * world)):
        shared(parts, front, optimizer)
        optimizer.zero_grad()
        if rank == 0 and step == 2:
            saved = get_optimizer_state_dict(model, optimizer)
    steps = optimizer._progress["steps"]
    return [steps, saved is None or "bnp_mean" in saved["state"]["0.weight"], same_everywhere(flat(model))]


@check
def other_engines(rank: int, world: int) -> Any:
    """ZeroRedundancyOptimizer inside the wrapper, PostLocalSGDOptimizer around it, FSDP1 refused."""
    found: dict[str, Any] = {}
    zero = dist.optim.ZeroRedundancyOptimizer
    bases: dict[str, tuple[Any, dict[str, Any]]] = {
        "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
        "AdamW": (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.0}),
    }
    for name, (cls, options) in bases.items():
        model, single = build(), build()
        optimizer = wrap(model, lambda p, c=cls, o=options: zero(p, optimizer_class=c, **o))
        mode = {"mode": optimizer._form}  # with a weight decay of its own it is the gradient form
        reference = wrap(single, lambda p, c=cls, o=options: c(p, **o), process_group=training.alone, **mode)
        front = parallel(model)
        for parts in batches(20, 4, lambda step: [4] * world):
            shared(parts, front, optimizer)
            joined(parts, single, reference)
        found[name] = [same_everywhere(flat(model)), float((flat(model) - flat(single)).abs().max()), optimizer._form]
        base: Any = optimizer.base_optimizer
        base.consolidate_state_dict(to=0)
        if rank == 0:
            wrap(build(), lambda p, c=cls, o=options: c(p, **o), **mode).load_state_dict(optimizer.state_dict())
    found["decay"] = message(lambda: wrap(build(), lambda p: zero(p, torch.optim.AdamW, lr=0.1, weight_decay=0.1)))

    model = build()
    averager = PeriodicModelAverager(period=4, warmup_steps=5)
    found["inside"] = message(lambda: BNPreconditioner(PostLocalSGDOptimizer(sgd(model.parameters()), averager), model))
    outside = PostLocalSGDOptimizer(wrap(model), averager)
    front = parallel(model)
    hook = PostLocalSGDState(process_group=None, subgroup=training.alone, start_localSGD_iter=5)
    front.register_comm_hook(hook, post_localSGD_hook)
    found["averaged"] = []
    for parts in batches(14, 4, lambda step: [4] * world):
        shared(parts, front, outside)
        found["averaged"].append(same_everywhere(flat(model)))

    for whole in (True, False):
        inner = build("wide")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outer = FullyShardedDataParallel(inner, use_orig_params=whole, device_id=torch.device("cpu"))
        base = sgd(outer.parameters())
        found[f"FSDP1, {whole}"] = [message(partial(BNPreconditioner, base, m)) for m in (outer, inner)]
    return found


@check
def groups(rank: int, world: int) -> Any:
    """Which group is taken, and what a copy and a pickle know of it."""
    everyone = dist.new_group(list(range(world)))
    model = build()
    front = parallel(model, process_group=everyone)
    found = {}

    def used(optimizer: BNPreconditioner) -> str:
        group = optimizer._ranks.group(optimizer._model)
        names = {id(everyone): "DDP's", id(dist.group.WORLD): "default", id(None): "none"}
        return names.get(id(group), "another")

    found["inside DDP"] = used(wrap(model))
    found["holds DDP"] = used(wrap(nn.Sequential(front)))
    found["is DDP"] = used(wrap(front))
    found["plain"] = used(wrap(build()))
    chosen = wrap(build(), process_group=everyone)
    found["given"] = used(chosen)
    lonely = wrap(build(), process_group=training.alone)
    found["own"] = used(lonely)
    found["copy"] = used(copy.deepcopy(chosen))
    found["own copy"] = used(copy.deepcopy(lonely))
    found["pickle"] = used(pickle.loads(pickle.dumps(chosen)))
    buffer = io.BytesIO()
    torch.save(lonely, buffer)
    buffer.seek(0)
    found["own pickle"] = used(torch.load(buffer, weights_only=False))
    found["not a member"] = message(lambda: wrap(build(), process_group=dist.GroupMember.NON_GROUP_MEMBER))
    return found


@check
def seen_from_the_first_step(rank: int, world: int) -> Any:
    """What was said of the exchange, in numbers: channels 4 + 6 + 5."""
    model = build()
    optimizer = wrap(model)
    before = optimizer.synchronization
    shared(next(batches(1, 4, lambda step: [2] * world)), parallel(model), optimizer)
    assert optimizer.synchronization is not None
    return [before, optimizer.synchronization.ranks, optimizer.synchronization.bytes]
