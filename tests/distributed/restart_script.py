"""Run by test_restart on several processes: train, save, die, load and go on. Prints one line of JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bnp_optim import BNPreconditioner
from tests.distributed.training import adamw, batches, build, flat, message, parallel, same_everywhere, start, wrap

OPTIONS: dict[str, dict[str, Any]] = {"adamw": {}, "spectral": {"step_scale": "spectral"}}
SAVED_AT, STEPS = 6, 12


def make(kind: str) -> tuple[nn.Module, BNPreconditioner]:
    model = build("mlp")
    return model, wrap(model, adamw, **OPTIONS[kind])


def go_on(model: nn.Module, optimizer: BNPreconditioner, steps: range) -> list[float]:
    """Train on a batch of eight, split among the ranks, and return the weights."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    front: nn.Module = parallel(model) if world > 1 else model
    for step, parts in enumerate(batches(STEPS, 4, lambda step: [8 // world] * world)):
        if step in steps:
            optimizer.zero_grad()
            front(parts[rank]).square().mean().backward()
            optimizer.step()
    optimizer.zero_grad()
    return flat(model).tolist()


def save(model: nn.Module, optimizer: BNPreconditioner, folder: Path) -> None:
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder / "dcp")
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")
    dist.barrier()


def load(kind: str, folder: Path, how: str) -> tuple[nn.Module, BNPreconditioner]:
    model, optimizer = make(kind)
    if how == "plain":
        saved = torch.load(folder / "plain.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")  # one process loads
            dcp.load(states, checkpoint_id=folder / "dcp")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return model, optimizer


def continuations(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in OPTIONS:
        for how in ("plain", "dcp"):
            model, optimizer = load(kind, folder / kind, how)
            found[f"{kind}, {how}"] = go_on(model, optimizer, range(SAVED_AT, STEPS))
    return found


def main(task: str, folder: Path) -> None:
    rank, _ = start()
    found: dict[str, Any] = {}
    if task == "whole":
        for kind in OPTIONS:
            model, optimizer = make(kind)
            go_on(model, optimizer, range(SAVED_AT))
            (folder / kind).mkdir(exist_ok=True)
            save(model, optimizer, folder / kind)
            found[kind] = go_on(model, optimizer, range(SAVED_AT, STEPS))
            assert same_everywhere(flat(model))
    else:
        found = continuations(folder)
    if task == "continue and die":
        model, optimizer = make("adamw")
        go_on(model, optimizer, range(3))

        def die(*_: Any) -> None:
            if rank == 1:
                print(json.dumps(found), flush=True)
                os._exit(0)

        optimizer.register_step_pre_hook(die)  # its gradients have gone out
        before = flat(model).tolist()
        found["said"] = message(lambda: go_on(model, optimizer, range(3, 4)))
        found["untouched"] = flat(model).tolist() == before
        print(json.dumps(found), flush=True)
        os._exit(0)  # the group has lost a member
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
