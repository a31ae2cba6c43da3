"""Train on several processes: DistributedDataParallel, and the wrapper around the optimizer as ever.

    torchrun --nproc_per_node 2 examples/ddp.py

Scikit-learn's handwritten digits, a batch of 32 per process; some seconds on two cores. The processes pool the samples
of each step, so that their statistics, and with them their parameters, stay the same to the last bit: the end says so.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from bnp_optim import BNPreconditioner


def digits() -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    return TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    train, test = digits()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(train)
    loader = DataLoader(train, batch_size=32, sampler=sampler)

    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = BNPreconditioner(optimizer, model)  # the change

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if rank == 0:
            x, y = test.tensors
            with torch.no_grad():
                accuracy = (model.module(x).argmax(1) == y).float().mean()
            print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}", flush=True)

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everybodys = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, weights)
    if rank == 0:
        same = all(torch.equal(w, weights) for w in everybodys)
        print(f"parameters the same on all {len(everybodys)} ranks: {same}")
        print(optimizer.synchronization)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
