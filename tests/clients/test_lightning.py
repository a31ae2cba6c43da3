"""Lightning's Trainer and Fabric, unmodified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import hook_count, inputs, mlp, same, weights

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
callbacks = pytest.importorskip("pytorch_lightning.callbacks")

BATCHES, BATCH = 6, 8
BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
}


def loader() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.cat(inputs(BATCHES)), batch_size=BATCH)  # type: ignore[arg-type]


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """The smallest one; keeps losses and weights as they come."""

    def __init__(self, base: str = "SGD", net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.base = base
        self.example_input_array = torch.ones(3, 4)
        self.losses: list[Tensor] = []
        self.at_epoch_start: list[dict[str, Tensor]] = []
        self.after_step: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss: Tensor = self(x).float().square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return BNPreconditioner(BASES[self.base](self.parameters()), self)

    def on_train_epoch_start(self) -> None:
        self.at_epoch_start.append(weights(self.net))

    def on_train_batch_end(self, *args: Any) -> None:
        self.after_step.append(weights(self.net))


class Validated(Module):
    def validation_step(self, x: Tensor, index: int) -> None:
        with torch.enable_grad():  # the worst case
            self.log("validation", self(x).square().mean())


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
        | quiet
        | {"enable_checkpointing": False}
        | options
    )


def wrapper_of(run: Any, which: int = 0) -> BNPreconditioner:
    optimizer = run.optimizers[which]
    assert isinstance(optimizer, BNPreconditioner)
    return optimizer


def counts(optimizer: BNPreconditioner) -> set[int]:
    return {int(s.count) for s in optimizer.statistics.values()}


# ---- automatic optimization ----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("base", BASES)
def test_automatic_optimization_is_the_loop_that_one_would_write(base: str, accumulate: int, tmp_path: Path) -> None:
    """With clipping, accumulation, and a validation that is nobody's sample."""
    module = Validated(base)
    run = trainer(tmp_path, max_epochs=2, gradient_clip_val=0.05, accumulate_grad_batches=accumulate)
    run.fit(module, loader(), loader())
    assert counts(wrapper_of(run)) == {2 * BATCHES * BATCH}

    net = mlp()
    optimizer = BNPreconditioner(BASES[base](net.parameters()), net)
    data = inputs(BATCHES) * 2
    for first in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for x in data[first : first + accumulate]:
            (net(x).square().mean() / accumulate).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
    assert same(weights(module.net), weights(net))
    for name, expected in optimizer.statistics.items():
        found = wrapper_of(run).statistics[f"net.{name}"]
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance)


def test_the_summary_and_its_example_input_count_no_samples(tmp_path: Path) -> None:
    module = Module()
    run = trainer(tmp_path, enable_model_summary=True)
    run.fit(module, loader())
    summary = pl.utilities.model_summary.ModelSummary(module, max_depth=-1)
    assert summary.layer_names and summary.in_sizes[-1] == [3, 6]
    assert counts(wrapper_of(run)) == {BATCHES * BATCH}
    assert hook_count(module) == 2


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
@pytest.mark.parametrize("base", BASES)
def test_half_precision_learns_with_float32_statistics(
    base: str, precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    module = Module(base)
    run = trainer(tmp_path, precision=precision, max_epochs=10)
    run.fit(module, loader())
    assert {p.dtype for p in module.parameters()} == {dtype}
    found = wrapper_of(run).statistics["net.0"]
    assert found.mean.dtype == found.variance.dtype == torch.float32
    assert counts(wrapper_of(run)) == {10 * BATCHES * BATCH}
    x = torch.cat(inputs(BATCHES))
    torch.testing.assert_close(found.mean, x.mean(0), rtol=0.05, atol=0.05)
    first, last = (torch.stack(module.losses[part]).mean() for part in (slice(BATCHES), slice(-BATCHES, None)))
    assert last < first / 4


@pytest.mark.parametrize("base", BASES)
def test_resume_from_a_checkpoint_is_bitwise(base: str, tmp_path: Path) -> None:
    whole = Module(base)
    straight = trainer(tmp_path, max_epochs=3)
    straight.fit(whole, loader())

    first = trainer(tmp_path, max_epochs=1)
    first.fit(Module(base), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    module = Module(base)
    second = trainer(tmp_path, max_epochs=3)
    second.fit(module, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert same(weights(module), weights(whole))
    assert same(wrapper_of(second).state_dict(), wrapper_of(straight).state_dict())
    assert counts(wrapper_of(second)) == {3 * BATCHES * BATCH}


# ---- manual optimization -------------------------------------------------------------------------


class Gan(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Two networks, two wrappers, each around the whole module."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.judge = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def configure_optimizers(self) -> Any:
        generator = torch.optim.AdamW(self.generator.parameters(), lr=0.01)
        judge = torch.optim.SGD(self.judge.parameters(), lr=0.05)
        return [BNPreconditioner(base, self) for base in (generator, judge)]

    def training_step(self, real: Tensor, index: int) -> None:
        generator, judge = self.optimizers()
        noise = torch.randn(BATCH - 3, 2)
        if self.toggle:
            self.toggle_optimizer(judge)
        score = self.judge(real).mean() - self.judge(self.generator(noise).detach()).mean()
        judge.zero_grad()
        self.manual_backward(score + score.square())
        judge.step()
        if self.toggle:
            self.untoggle_optimizer(judge)
            self.toggle_optimizer(generator)
        loss = self.judge(self.generator(noise)).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        if self.toggle:
            self.untoggle_optimizer(generator)


@pytest.mark.parametrize("toggle", [False, True])
def test_a_gan_counts_for_each_network_the_samples_behind_its_own_steps(toggle: bool, tmp_path: Path) -> None:
    """The judge: real and fake ones of its own loss, not those that it judged for the generator's, though a
    gradient of these reaches it. The generator: those of its loss, not those made for the judge's."""
    module = Gan(toggle)
    before = weights(module)
    run = trainer(tmp_path)
    run.fit(module, loader())
    generator, judge = wrapper_of(run, 0), wrapper_of(run, 1)
    assert list(generator.statistics) == ["generator.0", "generator.2"]
    assert list(judge.statistics) == ["judge.0", "judge.2"]
    assert counts(generator) == {BATCHES * (BATCH - 3)}
    assert counts(judge) == {BATCHES * (BATCH + BATCH - 3)}
    assert run.global_step == 2 * BATCHES
    after = weights(module)
    assert all(not torch.equal(after[name], before[name]) for name in before if name != "judge.2.bias")


# ---- callbacks -----------------------------------------------------------------------------------


def test_the_rate_monitor_names_it_after_its_class(tmp_path: Path) -> None:
    monitor = callbacks.LearningRateMonitor("step")
    logger = pl.loggers.CSVLogger(tmp_path)
    run = trainer(tmp_path, callbacks=[monitor], logger=logger, log_every_n_steps=1)
    run.fit(Module(), loader())
    assert monitor.lrs == {"lr-BNPreconditioner": [0.1] * BATCHES}


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


def test_stochastic_weight_averaging_averages_the_starts_of_its_epochs(tmp_path: Path) -> None:
    module = Module()
    run = trainer(tmp_path, max_epochs=5, callbacks=[callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)])
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
    run = trainer(tmp_path, max_epochs=3, callbacks=[callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)])
    run.fit(module, loader())
    assert len(module.losses) == 4 * BATCHES  # the additional epoch was there
    assert counts(wrapper_of(run)) == {3 * BATCHES * BATCH}


def test_weight_averaging_averages_every_step(tmp_path: Path) -> None:
    module = Module("AdamW")
    run = trainer(tmp_path, max_epochs=2, callbacks=[callbacks.WeightAveraging()])
    run.fit(module, loader())
    expected = mean_of(module.after_step)
    assert len(module.after_step) == 2 * BATCHES
    for name, value in weights(module.net).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, module.after_step[-1][name], rtol=1e-4)
    assert counts(wrapper_of(run)) == {2 * BATCHES * BATCH}


# ---- Fabric --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("base", BASES)
def test_fabric_is_the_loop_that_one_would_write(base: str, precision: str) -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1, precision=precision)
    net, plain = mlp(), mlp()
    model, optimizer = fabric.setup(net, BNPreconditioner(BASES[base](net.parameters()), net))
    expected = BNPreconditioner(BASES[base](plain.parameters()), plain)
    for x in inputs(BATCHES):
        optimizer.zero_grad()
        fabric.backward(model(x).float().square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        optimizer.step()
        expected.zero_grad()
        half = precision != "32-true"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output = plain(x.bfloat16() if half else x)  # Fabric casts the input itself, too
        output.float().square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        expected.step()
    assert same(weights(net), weights(plain))
    assert counts(optimizer) == {BATCHES * BATCH}
    assert same(optimizer.state_dict(), expected.state_dict())
