"""Checks of ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from bnp_optim import BNPreconditioner
from tests.distributed.sharded_checks import (
    FEW,
    STEPS,
    check,
    digest,
    mine,
    reshard,
    sharded,
    statistics_differ,
    unshard,
)
from tests.distributed.sharded_models import (
    ALONE,
    OPTIMIZERS,
    Attending,
    Everything,
    Recurrent,
    batch,
    built,
    full_weights,
    loss_of,
    plain,
    steps,
    worst,
    wrapped,
)


@check
def fsdp() -> Any:
    answers = {}
    for i, kind in enumerate(OPTIMIZERS):
        model = sharded(built(), reshard_after_forward=i % 2 == 0)
        optimizer = wrapped(model, kind)
        count = STEPS if kind in ("SGD", "AdamW", "spectral") else FEW
        steps(model, optimizer, count, mine)
        reference, alone = plain(kind, count)
        answers[kind] = {
            "from_plain": worst(full_weights(model), full_weights(reference)),
            "statistics": statistics_differ(optimizer, alone),
            "moved": worst(full_weights(model), full_weights(built())),
            "digest": digest(model),
            "preconditioned": len(optimizer.coverage().preconditioned),
            "of_plain": len(alone.coverage().preconditioned),
        }
    return answers


@check
def float32() -> Any:
    model = sharded(built(dtype=torch.float32))
    optimizer = wrapped(model, "SGD")
    steps(model, optimizer, STEPS, mine)
    reference, _ = plain("SGD", STEPS, dtype=torch.float32)
    return worst(full_weights(model), full_weights(reference))


@check
def accumulation() -> Any:
    """Two micro-batches are one batch; with the reduction of each, of the last alone, and with clipping."""
    reference = built()
    alone = wrapped(reference, "SGD", process_group=ALONE[dist.get_rank()])
    answers = {}
    for kind in ("every", "last", "unsharded", "bfloat16"):
        policy = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)} if kind == "bfloat16" else {}
        model = sharded(built(), **policy)
        optimizer = wrapped(model, "SGD")
        if kind == "unsharded":
            model.set_reshard_after_backward(False)
        for step in range(5):
            for p in model.parameters():  # not by the optimizer, which so must see it
                p.grad = None
            x = mine(batch(step, 16))
            for half in range(2):
                if kind in ("last", "bfloat16"):
                    model.set_requires_gradient_sync(half == 1)
                (loss_of(model, x[half::2]) / 2).backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
            optimizer.step()
            if kind == "unsharded":
                reshard(model)
        answers[kind] = full_weights(model), {k: int(s.count) for k, s in optimizer.statistics.items()}
    for step in range(5):
        alone.zero_grad()
        loss_of(reference, batch(step, 16)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        alone.step()
    expected, counts = full_weights(reference), {k: int(s.count) for k, s in alone.statistics.items()}
    return {kind: [worst(found, expected), n == counts] for kind, (found, n) in answers.items()}


@check
def unsharded_at_step() -> Any:
    """Between backward and step parameters are gathered again: the optimizer's are the sharded ones all the same."""
    answers = []
    for gathered in (False, True):
        model = sharded(built())
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        if gathered:
            unshard(model)  # as the wrapper is built, too
        optimizer = BNPreconditioner(base, model)
        reshard(model)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, mine(batch(step))).backward()
            if gathered:
                unshard(model)
            optimizer.step()
            covered = len(optimizer.coverage().preconditioned)
            reshard(model)
        answers.append((full_weights(model), covered))
    return [worst(answers[1][0], answers[0][0]), answers[1][1], answers[0][1]]


@check
def mixed_precision() -> Any:
    """Inputs and parameters are bfloat16 while the model runs; statistics are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x = batch(0, dtype=torch.float32)[:, 0] + 100
    for _ in range(2):
        optimizer.zero_grad()
        model(mine(x)).float().square().mean().backward()
        optimizer.step()
    seen, found = x.bfloat16().double(), optimizer.statistics["0"]
    return {
        "dtype": str(found.mean.dtype),
        "mean": float((found.mean - seen.mean(0)).abs().max() / 100),
        "variance": float((found.variance / seen.var(0, correction=0) - 1).abs().max()),
        "finite": all(bool(w.isfinite().all()) for w in full_weights(model).values()),
    }


@check
def meta() -> Any:
    """Built on the meta device, wrapped, then given memory and values."""
    with torch.device("meta"):
        model = Everything().double()
    sharded(model)
    optimizer = wrapped(model, "AdamW")
    model.to_empty(device="cpu")
    source = built()
    for p, q in zip(model.parameters(), source.parameters(), strict=True):
        p.detach().copy_(torch.distributed.tensor.distribute_tensor(q.detach(), p.device_mesh, p.placements))
    steps(model, optimizer, 5, mine)
    return worst(full_weights(model), full_weights(plain("AdamW", 5)[0]))


@check
def sharded_after_wrapping() -> Any:
    model = built()
    optimizer = wrapped(model, "SGD")
    sharded(model)
    before = digest(model)
    loss_of(model, mine(batch(0))).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return [str(error), before == digest(model)]
    return ["no error", False]


@check
def replaced_in_the_groups() -> Any:
    """As accelerate does it: the model is sharded after wrapping, and the optimizer's groups get its new parameters."""
    model = built()
    optimizer = wrapped(model, "SGD")
    names = [n for n, _ in model.named_parameters()]
    sharded(model)
    new = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [new[n] for n in names]
    steps(model, optimizer, 5, mine)
    return worst(full_weights(model), full_weights(plain("SGD", 5)[0]))


@check
def other_layers() -> Any:
    """Attention's packed weight, recurrent layers, weights sharded along another dimension."""
    answers = {}
    for kind in (Attending, Recurrent):
        found = []
        for share in (True, False):
            torch.manual_seed(0)
            model = kind().double()
            group = None if share else ALONE[dist.get_rank()]
            if share:
                fully_shard(model)
            optimizer = BNPreconditioner(torch.optim.AdamW(model.parameters(), lr=0.01), model, process_group=group)
            steps(model, optimizer, FEW, mine if share else lambda x: x)
            found.append((full_weights(model), len(optimizer.coverage().preconditioned)))
        answers[kind.__name__] = [worst(found[0][0], found[1][0]), found[0][1], found[1][1]]
    for optimizer_kind in ("SGD", "AdamW"):
        model = built()
        fully_shard(
            model,
            shard_placement_fn=lambda p: (
                Shard(1) if p.dim() > 1 and p.shape[1] % dist.get_world_size() == 0 else Shard(0)
            ),
        )
        optimizer = wrapped(model, optimizer_kind)
        steps(model, optimizer, FEW, mine)
        difference = worst(full_weights(model), full_weights(plain(optimizer_kind, FEW)[0]))
        passed = [row.name for row in optimizer.coverage() if "sharded along" in row.why]
        answers["Shard(1), " + optimizer_kind] = [difference, passed]
    return answers


@check
def passed_through() -> Any:
    """Layouts that leave no block: said by coverage(), and harmless."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(18, 2, bias=False)
    )
    fully_shard(model, shard_placement_fn=lambda p: Shard(3) if p.shape[1:] == (4, 2, 2) else Shard(0))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x = batch(0, 4, torch.float32)[:, :4, :3, None].expand(4, 4, 3, 3)
    model(x).square().mean().backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    optimizer.step()
    same = [bool(torch.equal(g, p.grad.full_tensor())) for g, p in zip(gradients, model.parameters(), strict=True)]
    return [{row.name: row.why for row in optimizer.coverage()}, same]


@check
def gpt2() -> Any:
    """transformers' GPT-2: Conv1D throughout, whose inputs FSDP splits."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=37, n_positions=12, n_embd=12, n_layer=2, n_head=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    found = []
    for share in (True, False):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().train()
        if share:
            for block in model.transformer.h:
                fully_shard(block)
            fully_shard(model)
        group = None if share else ALONE[dist.get_rank()]
        optimizer = BNPreconditioner(torch.optim.AdamW(model.parameters(), lr=1e-3), model, process_group=group)
        for step in range(FEW):
            tokens = torch.randint(37, (4, 12), generator=torch.Generator().manual_seed(step))
            tokens = mine(tokens) if share else tokens
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        found.append((full_weights(model), sum(row.preconditioned for row in optimizer.coverage())))
    return [worst(found[0][0], found[1][0]), found[0][1], found[1][1]]
