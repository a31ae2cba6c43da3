"""Run by test_lightning_ddp on each of two processes, which share every batch. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from tests.clients.lightning_runs import BATCH, BATCHES, Module, loader, trainer, wrapper_of
from tests.conftest import inputs


class Half(Module):
    """Takes its rank's half of the batch of that number."""

    def training_step(self, x: Tensor, index: int) -> Tensor:
        half = BATCH // 2
        return super().training_step(inputs(BATCHES)[index][half * self.global_rank :][:half], index)


def main(base: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    module = Half(base)
    run = trainer(folder, strategy="ddp", devices=2, max_epochs=2, use_distributed_sampler=False)
    run.fit(module, loader())
    statistics = wrapper_of(run).statistics
    found = {
        "weights": {name: value.flatten().tolist() for name, value in module.net.state_dict().items()},
        "means": {name: s.mean.tolist() for name, s in statistics.items()},
        "counts": [int(s.count) for s in statistics.values()],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
