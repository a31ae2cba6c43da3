"""Checks of checkpoints, reports and copies of sharded models."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from tests.distributed.sharded_checks import (
    check,
    digest,
    mine,
    sharded,
    statistics_differ,
)
from tests.distributed.sharded_models import (
    ALONE,
    built,
    full_weights,
    plain,
    steps,
    worst,
    wrapped,
)


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
