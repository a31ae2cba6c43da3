"""Train a sharded model: fully_shard (FSDP2), then the optimizer, then the wrapper around it.

    torchrun --nproc_per_node 2 examples/fsdp2.py

Scikit-learn's handwritten digits, a batch of 32 per process; some seconds on two cores. Every process holds half of
each weight and preconditions it where it lies; a checkpoint of the sharded model is written and read back at the end.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from bnp_optim import BNPreconditioner


def build(seed: int) -> tuple[nn.Module, BNPreconditioner]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    fully_shard(model[2])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, BNPreconditioner(optimizer, model)  # the change


def state(model: nn.Module, optimizer: BNPreconditioner) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)

    model, optimizer = build(0)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        order = torch.randperm(1400, generator=generator)[: 1400 // (32 * ranks) * 32 * ranks]
        for batch in order.view(-1, ranks, 32)[:, rank]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
        if rank == 0:
            print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}", flush=True)

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save(state(model, optimizer), checkpoint_id=folder[0])
    other, resumed = build(1)
    loaded = state(other, resumed)
    dcp.load(loaded, checkpoint_id=folder[0])
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    same = all(
        torch.equal(p.to_local(), q.to_local()) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
    same &= all(torch.equal(s.mean, resumed.statistics[name].mean) for name, s in optimizer.statistics.items())
    if rank == 0:
        print(f"rank 0 holds {tuple(model[0].weight.to_local().shape)} of {tuple(model[0].weight.shape)}")
        print(f"the checkpoint holds the same parameters and statistics: {same}")
        print(optimizer.synchronization)
        shutil.rmtree(folder[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
