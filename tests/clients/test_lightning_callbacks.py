"""Lightning's callbacks and its Tuner with the wrapper."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.clients.lightning_runs import (
    BASES,
    BATCH,
    BATCHES,
    Module,
    assert_bitwise,
    counts,
    loader,
    loop,
    pl,
    trainer,
    wrapped,
    wrapper_of,
)
from tests.conftest import hook_count, inputs, mlp, same, weights


def test_the_rate_monitor_names_it_after_its_class(tmp_path: Path) -> None:
    monitor = pl.callbacks.LearningRateMonitor("step")
    logger = pl.loggers.CSVLogger(tmp_path)
    run = trainer(tmp_path, callbacks=[monitor], logger=logger, log_every_n_steps=1)
    run.fit(Module(), loader())
    assert monitor.lrs == {"lr-BNPreconditioner": [0.1] * BATCHES}


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def test_stochastic_weight_averaging_averages_the_starts_of_its_epochs(tmp_path: Path) -> None:
    module = Module()
    run = trainer(tmp_path, max_epochs=5, callbacks=[pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)])
    run.fit(module, loader())
    # swa_epoch_start counts from one here
    expected = mean_of(module.at_epoch_start[1:])
    for name, value in weights(module.net).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, module.after_step[-1][name], rtol=1e-4)
    assert counts(wrapper_of(run)) == {5 * BATCHES * BATCH}


def test_the_pass_that_refreshes_batch_norm_counts_no_samples(tmp_path: Path) -> None:
    """StochasticWeightAveraging adds an epoch of forwards in training mode whose backward never runs."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    module = Module(net=net)
    run = trainer(tmp_path, max_epochs=3, callbacks=[pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)])
    run.fit(module, loader())
    assert len(module.losses) == 4 * BATCHES  # the additional epoch was there
    assert counts(wrapper_of(run)) == {3 * BATCHES * BATCH}


def test_weight_averaging_averages_every_step(tmp_path: Path) -> None:
    module = Module("AdamW")
    run = trainer(tmp_path, max_epochs=2, callbacks=[pl.callbacks.WeightAveraging()])
    run.fit(module, loader())
    expected = mean_of(module.after_step)
    assert len(module.after_step) == 2 * BATCHES
    for name, value in weights(module.net).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, module.after_step[-1][name], rtol=1e-4)
    assert counts(wrapper_of(run)) == {2 * BATCHES * BATCH}


def test_exponential_averaging(tmp_path: Path) -> None:
    """Its copy of the module, hooks and all, measures nothing."""
    module = Module()
    run = trainer(tmp_path, max_epochs=2, callbacks=[pl.callbacks.EMAWeightAveraging(decay=0.8)])
    run.fit(module, loader())
    expected = module.after_step[0]
    for state in module.after_step[1:]:
        expected = {name: torch.lerp(old, state[name], 0.2) for name, old in expected.items()}
    for name, value in weights(module.net).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert counts(wrapper_of(run)) == {2 * BATCHES * BATCH}


def test_a_rate_for_each_group_and_its_momentum(tmp_path: Path) -> None:
    class Grouped(Module):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters(), "name": "first"}, {"params": self.net[2].parameters()}]  # type: ignore[operator, index]
            return BNPreconditioner(torch.optim.SGD(groups, lr=0.1, momentum=0.8), self)

    monitor = pl.callbacks.LearningRateMonitor("epoch", log_momentum=True)
    run = trainer(tmp_path, callbacks=[monitor], logger=pl.loggers.CSVLogger(tmp_path))
    run.fit(Grouped(), loader())
    assert monitor.lrs == {"lr-BNPreconditioner/first": [0.1], "lr-BNPreconditioner/pg2": [0.1]}
    assert set(monitor.last_momentum_values.values()) == {0.8}


def test_accumulation_that_changes_by_epoch(tmp_path: Path) -> None:
    module = Module()
    run = trainer(tmp_path, max_epochs=2, callbacks=[pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})])
    run.fit(module, loader())
    net = mlp()
    optimizer = wrapped(net, "SGD")
    loop(net, optimizer, inputs(BATCHES))
    loop(net, optimizer, inputs(BATCHES), accumulate=3)
    assert_bitwise(module.net, wrapper_of(run), net, optimizer, "net.")


def test_layers_that_finetuning_unfreezes_are_preconditioned_from_then_on(tmp_path: Path) -> None:
    class Finetuning(pl.callbacks.BaseFinetuning):  # type: ignore[misc, name-defined]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.05)

    class Tuned(Module):
        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return BNPreconditioner(torch.optim.SGD(trainable, lr=0.1), self)

    module = Tuned()
    run = trainer(tmp_path, max_epochs=3, callbacks=[Finetuning()])
    run.fit(module, loader())
    found = wrapper_of(run)
    assert [int(found.statistics[name].count) for name in ("net.0", "net.2")] == [2 * 48, 3 * 48]

    net = mlp()
    net[0].requires_grad_(False)
    optimizer = BNPreconditioner(torch.optim.SGD(net[2].parameters(), lr=0.1), net)
    loop(net, optimizer, inputs(BATCHES))
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.05})
    loop(net, optimizer, inputs(BATCHES) * 2)
    assert_bitwise(module.net, found, net, optimizer, "net.")


# ---- the Tuner -----------------------------------------------------------------------------------


class Tunable(Module):
    def __init__(self, base: str) -> None:
        super().__init__(base)
        self.lr = 0.05
        self.batch_size = 2

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["lr"] = self.lr
        return optimizer

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.cat(inputs(BATCHES)), batch_size=self.batch_size)  # type: ignore[arg-type]


def expected_of(base: str, lr: float, batch: int) -> tuple[nn.Module, BNPreconditioner]:
    net = mlp()
    optimizer = wrapped(net, base)
    optimizer.param_groups[0]["lr"] = lr
    loop(net, optimizer, torch.cat(inputs(BATCHES)).split(batch))
    return net, optimizer


@pytest.mark.parametrize("base", BASES)
def test_the_learning_rate_finder(base: str, tmp_path: Path) -> None:
    """It steps with the wrapper at its rates, and leaves no trace but the rate."""
    module = Tunable(base)
    run = trainer(tmp_path)
    found = pl.tuner.Tuner(run).lr_find(module, num_training=20, min_lr=1e-3, max_lr=1.0, early_stop_threshold=None)
    net = mlp()
    optimizer = wrapped(net, base)
    losses = []
    for x, rate in zip(torch.cat(inputs(BATCHES)).split(2), found.results["lr"], strict=False):
        optimizer.param_groups[0]["lr"] = rate
        losses.append(net(x).square().mean().detach())
        loop(net, optimizer, [x])
    assert len(losses) == len(module.losses) == 20
    assert same(module.losses, losses)

    assert same(weights(module.net), weights(mlp()))
    assert module.lr == found.suggestion() != 0.05
    run.fit(module)
    assert_bitwise(module.net, wrapper_of(run), *expected_of(base, module.lr, 2), "net.")
    gc.collect()
    assert hook_count(module) == 2  # the wrapper of the search is gone


@pytest.mark.parametrize("base", BASES)
def test_the_batch_size_finder(base: str, tmp_path: Path) -> None:
    module = Tunable(base)
    run = trainer(tmp_path)
    pl.tuner.Tuner(run).scale_batch_size(module, init_val=2, max_trials=3, steps_per_trial=3)
    assert module.batch_size == 8 and len(module.losses) == 9
    assert same(weights(module.net), weights(mlp()))
    run.fit(module)
    assert_bitwise(module.net, wrapper_of(run), *expected_of(base, 0.05, 8), "net.")
    gc.collect()
    assert hook_count(module) == 2
