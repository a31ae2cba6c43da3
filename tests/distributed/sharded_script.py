"""What every rank runs for test_sharded.py: ``python -m tests.distributed.sharded_script CHECK...``.

Prints one line of JSON, the answers by check; the first check that fails ends the rank.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bnp_optim import BNPreconditioner
from tests.distributed.sharded_models import (
    ALONE,
    OPTIMIZERS,
    Attending,
    Everything,
    Feedforward,
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
        "SGD", lambda m: _averaging(parallel(m, mesh["tp"]), group), lambda x: x[row::2], process_group=group
    )
    reference, _ = feedforward("SGD", lambda m: m, lambda x: x, process_group=ALONE[dist.get_rank()])
    answers["given"] = worst(full_weights(model), full_weights(reference))
    return answers


@check
def checkpoints() -> Any:
    """Saved by these ranks, loaded by them, and by one alone; the plain model's loaded by these."""
    folder, answers = os.environ["CHECKPOINTS"], {}
    for kind in ("SGD", "AdamW", "spectral"):
        model = sharded(built())
        optimizer = wrapped(model, kind)
        steps(model, optimizer, 5, mine)
        optimizer.zero_grad()
        path = f"{folder}/{kind}"
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=path)
        whole = get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        here, resumed = started(sharded(built(1)), kind, path)
        steps(model, optimizer, 5, mine, first=5)
        steps(here, resumed, 5, mine, first=5)
        alone, after = built(1), full_weights(model)
        if dist.get_rank() == 0:
            alone, single = started(alone, kind, path, process_group=ALONE[0], no_dist=True)
            steps(alone, single, 5, lambda x: x, first=5)
        reference, plainly = plain(kind, 5)
        plainly.zero_grad()
        if dist.get_rank() == 0:
            states = dict(zip(("model", "optimizer"), get_state_dict(reference, plainly), strict=True))
            dcp.save(states, checkpoint_id=path + "-one", no_dist=True)
        dist.barrier()
        there, spread = started(sharded(built(1)), kind, path + "-one")
        steps(reference, plainly, 5, lambda x: x, first=5)
        steps(there, spread, 5, mine, first=5)
        answers[kind] = {
            "same_ranks": digest(here) == digest(model) and statistics_differ(resumed, optimizer) == 0,
            "to_one": worst(full_weights(alone), after) if dist.get_rank() == 0 else 0.0,
            "from_one": worst(full_weights(there), full_weights(reference)),
            "shapes": sorted({v["bnp_mean"].shape[0] for v in whole.get("state", {}).values() if "bnp_mean" in v}),
        }
    return answers


@check
def checkpoint_of_two() -> Any:
    """With another number of ranks than the one that saved it."""
    answers = {}
    for kind in ("SGD", "AdamW", "spectral"):
        model, optimizer = started(sharded(built(1)), kind, f"{os.environ['CHECKPOINTS']}/{kind}")
        steps(model, optimizer, 5, mine, first=5)
        answers[kind] = worst(full_weights(model), full_weights(plain(kind, 10)[0]))
    return answers


def started(model: nn.Module, kind: str, path: str, no_dist: bool = False, **options: Any) -> Any:
    """Loaded from a checkpoint."""
    optimizer = wrapped(model, kind, **options)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=path, no_dist=no_dist)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return model, optimizer


@check
def verify_state_dict() -> Any:
    """torch's own checks of distributed state dicts."""
    from torch.testing._internal.common_utils import TestCase
    from torch.testing._internal.distributed.common_state_dict import VerifyStateDictMixin

    class Verify(TestCase, VerifyStateDictMixin):
        def runTest(self) -> None: ...

    verify = Verify()
    for kind in ("SGD", "AdamW", "spectral"):
        reference, plainly = plain(kind, 3)
        model = sharded(built())
        optimizer = wrapped(model, kind)
        steps(model, optimizer, 3, mine)
        optimizer.zero_grad()
        plainly.zero_grad()
        for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
            model_state, state = get_state_dict(model, optimizer, options=options)
            verify._verify_msd(reference.state_dict(), model_state, options)
            verify._verify_osd(reference, plainly, plainly.state_dict(), state)
        model_state, state = get_state_dict(model, optimizer)
        fresh = built(1)
        verify._verify_osd_by_load(fresh, plainly, wrapped(fresh, kind, process_group=ALONE[dist.get_rank()]), state)
    return True


@check
def reports() -> Any:
    """repr, coverage and statistics as ever; copies end in FSDP's own error."""
    model = sharded(built())
    optimizer = wrapped(model, "SGD")
    steps(model, optimizer, 1, mine)
    errors = []
    for make in (copy.deepcopy, pickle.dumps):
        try:
            make(optimizer)
            errors.append("none")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    rows = {row.name: [list(row.shape), row.why] for row in optimizer.coverage()}
    return {
        "repr": repr(optimizer),
        "rows": rows,
        "width": optimizer.statistics["flat"].mean.shape[0],
        "copies": errors,
    }


def _averaging(model: nn.Module, group: Any) -> nn.Module:
    """Data parallel by hand, since DistributedDataParallel takes no DTensors."""

    def average(p: Tensor) -> None:
        grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        dist.all_reduce(grad, group=group)
        grad.div_(group.size())

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(average)
    return model


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    for rank in range(dist.get_world_size()):
        ALONE[rank] = dist.new_group([rank])
    answers: dict[str, Any] = {}
    for name in sys.argv[1:]:
        try:
            answers[name] = CHECKS[name]()
        except Exception:
            answers[name] = {"failed": traceback.format_exc()}
            break
    print(json.dumps(answers), flush=True)
    if not any(isinstance(a, dict) and "failed" in a for a in answers.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would not let a rank go whose partner has failed


if __name__ == "__main__":
    main()
