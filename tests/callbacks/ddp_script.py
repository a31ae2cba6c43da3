"""Run by test_ddp on each of two processes: the same training with and without monitors. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnp_optim.curvature import coordinates_of, estimate_conditioning
from tests.callbacks.runs import OURS, Busy, Plain, Recorder, Split, data, fit, left_behind, monitors
from tests.conftest import same


def main(folder: Path, optimizer: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 1}
    found: dict[str, Any] = {}

    plain = Busy(optimizer)
    expected = left_behind(fit(folder, plain, **options), plain)
    watched, callbacks = Busy(optimizer), monitors()
    run = fit(folder, watched, callbacks, **options)
    after = left_behind(run, watched)
    found["different"] = [part for part in expected if not same(after[part], expected[part])]
    found["steps"] = [[step for step, _ in c.history] for c in callbacks]
    timeless = [[{k: x for k, x in row.items() if "seconds" not in k} for _, row in c.history] for c in callbacks]
    found["histories"] = timeless
    found["rows"] = len(run.logger.of(*OURS))

    # without noise, on all the data that both ranks have seen in the last step
    callbacks = [*monitors(every_n_train_steps=4)[:1], Split(every_n_train_steps=4, num_steps=10)]
    module = Plain("SGD")
    run = fit(folder, module, callbacks, logger=Recorder(), limit_train_batches=4, **options)
    order = torch.utils.data.DistributedSampler(data(), 2, 0, shuffle=True, seed=0)
    order.set_epoch(0)
    ranks = [torch.utils.data.DistributedSampler(data(), 2, r, shuffle=True, seed=0) for r in range(2)]
    last = [i for sampler in ranks for i in list(sampler)[3 * 8 : 4 * 8]]
    x, y = data()[last]
    params = list(module.parameters())

    def split() -> Any:
        return module(x), lambda outputs: nn.functional.cross_entropy(outputs, y)

    together = estimate_conditioning([(split, 16)], params, num_steps=4, num_probes=2)
    newton = estimate_conditioning([(split, 16)], params, matrix="gauss_newton", num_steps=10, num_probes=0)
    assert coordinates_of(run.optimizers[0], params) == []
    hessian, rate = (c.history[0][1] for c in callbacks)
    found["together"] = [[hessian[f"hessian/{k}"], getattr(together, k)] for k in ("lambda_max", "kappa_mean")]
    found["together"].append([rate["learning_rate/lambda_max_gauss_newton"], newton.lambda_max])
    found["samples"] = [hessian["hessian/num_samples"], rate["learning_rate/num_samples"]]

    # one rank cannot: none waits for it
    class Half(type(callbacks[0])):  # type: ignore[misc]
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Any:
            return super().loss(pl_module, batch, batch_idx) * (1.0 if pl_module.global_rank == 0 else float("nan"))

    half = Half(every_n_train_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(folder, Plain("SGD"), [half], **options)
    found["half"] = [run.global_step, len(half.history)]
    found["said"] = [str(w.message) for w in caught if "could not estimate" in str(w.message)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
