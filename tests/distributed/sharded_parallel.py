"""Checks of tensor parallel, and of meshes with two dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bnp_optim import BNPreconditioner
from tests.distributed.sharded_checks import (
    FEW,
    STEPS,
    averaging,
    check,
    digest,
    mine,
    sharded,
    statistics_differ,
)
from tests.distributed.sharded_models import (
    ALONE,
    Feedforward,
    batch,
    built,
    full_weights,
    loss_of,
    plain,
    steps,
    worst,
    wrapped,
)


def parallel(model: nn.Module, mesh: Any) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "up_alone": ColwiseParallel()}
    parallelize_module(model, mesh, plan | {"down_alone": RowwiseParallel()})
    return model


def feedforward(
    kind: str, prepare: Callable[[nn.Module], nn.Module], share: Any, count: int = STEPS, **options: Any
) -> Any:
    torch.manual_seed(0)
    model = prepare(Feedforward().double())
    optimizer = wrapped(model, kind, **options)
    steps(model, optimizer, count, share)
    return model, optimizer


@check
def tensor_parallel() -> Any:
    """All ranks see the same samples, which count once."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    answers = {}
    for kind in ("SGD", "AdamW", "two-sided momentum"):
        count = STEPS if kind != "two-sided momentum" else FEW
        model, optimizer = feedforward(kind, lambda m: parallel(m, mesh), lambda x: x, count)
        reference, alone = feedforward(kind, lambda m: m, lambda x: x, count, process_group=ALONE[dist.get_rank()])
        answers[kind] = {
            "from_plain": worst(full_weights(model), full_weights(reference)),
            "statistics": statistics_differ(optimizer, alone),
            "digest": digest(model),
            "preconditioned": len(optimizer.coverage().preconditioned),
            "of_plain": len(alone.coverage().preconditioned),
            "synchronization": optimizer.synchronization is None,
        }
    try:
        wrapped(model, "spectral")
        answers["spectral"] = "no error"
    except ValueError as error:
        answers["spectral"] = str(error)
    for option in ({"max_norm": 1.0}, {"follow_inputs": True}):
        name = next(iter(option))
        try:
            BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model, **option)
            answers[name] = "no error"
        except ValueError as error:
            answers[name] = str(error)
    return answers


@check
def batch_sharded_inputs() -> Any:
    """Ranks that share a weight see different samples: that layer is not measured, and it is said."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    torch.distributed.tensor.distribute_module(model, mesh)
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x = torch.distributed.tensor.distribute_tensor(batch(0, dtype=torch.float32)[:, 0], mesh, [Shard(0)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x).square().mean().backward()
        optimizer.step()
    return [str(w.message) for w in caught if "could not read" in str(w.message)]


@check
def muon() -> Any:
    if not hasattr(torch.optim, "Muon"):
        return 0.0

    def train(model: nn.Module, share: Any, **options: Any) -> dict[str, Tensor]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = torch.optim.Muon(matrices, lr=0.01)
        if options["wrap"]:
            optimizer = BNPreconditioner(optimizer, model, process_group=options["group"])
        steps(model, optimizer, 5, share)
        return full_weights(model)

    answers = []
    for wrap in (True, False):
        found = []
        for alone in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(42, 6), nn.Tanh(), nn.Linear(6, 4))
            group = ALONE[dist.get_rank()] if alone else None
            model = model if alone else fully_shard(model)
            found.append(train(model, (lambda x: x) if alone else mine, wrap=wrap, group=group))
        answers.append(worst(*found))
    return answers


@check
def two_dimensions() -> Any:
    """Four ranks as 2 × 2: replicas of shards, and FSDP over tensor parallel; and what the meshes do not tell."""
    answers = {}
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for kind in ("SGD", "AdamW"):
        model = sharded(built(), replicas)
        optimizer = wrapped(model, kind)
        steps(model, optimizer, STEPS, mine)
        reference, alone = plain(kind, STEPS)
        answers["HSDP, " + kind] = {
            "from_plain": worst(full_weights(model), full_weights(reference)),
            "statistics": statistics_differ(optimizer, alone),
            "digest": digest(model),
        }
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row = mesh["dp"].get_local_rank()
    for kind in ("SGD", "AdamW", "two-sided momentum"):
        model, optimizer = feedforward(
            kind, lambda m: fully_shard(parallel(m, mesh["tp"]), mesh=mesh["dp"]), lambda x: x[row::2]
        )
        reference, alone = feedforward(kind, lambda m: m, lambda x: x, process_group=ALONE[dist.get_rank()])
        answers["FSDP × TP, " + kind] = {
            "from_plain": worst(full_weights(model), full_weights(reference)),
            "statistics": statistics_differ(optimizer, alone),
            "digest": digest(model),
            "preconditioned": len(optimizer.coverage().preconditioned),
            "of_plain": len(alone.coverage().preconditioned),
        }
    torch.manual_seed(0)
    model = parallel(Feedforward().double(), mesh["tp"])
    optimizer = wrapped(model, "SGD")
    before = digest(model)
    loss_of(model, batch(0)).backward()
    try:
        optimizer.step()
        answers["ambiguous"] = ["no error", False]
    except ValueError as error:
        answers["ambiguous"] = [str(error), before == digest(model)]
    group = mesh["dp"].get_group()
    model, optimizer = feedforward(
        "SGD", lambda m: averaging(parallel(m, mesh["tp"]), group), lambda x: x[row::2], process_group=group
    )
    reference, _ = feedforward("SGD", lambda m: m, lambda x: x, process_group=ALONE[dist.get_rank()])
    answers["given"] = worst(full_weights(model), full_weights(reference))
    return answers
