"""ActivationMonitor and StepDivergenceProbe log what the functions say, on the same weights and batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import BNPCoordinates, coordinates_of
from bnp_optim.diagnostics import activation_health, step_divergence
from tests.callbacks.runs import BATCH, OPTIMIZERS, Plain, data, fit, loader, noisy_net, seeded, trainer

from lightning_callbacks import ActivationMonitor, StepDivergenceProbe  # isort: skip

STEPS = 5
GRID = [0.01, 1.0, 100.0]


def run_to_the_estimate(folder: Path, callbacks: Any, module: Any) -> tuple[Any, list[Any]]:
    """Stops right after it; returns the trainer and the batches in the order they came."""
    run = trainer(folder, callbacks, max_steps=STEPS, max_epochs=None)
    run.fit(module, loader(shuffle=False))
    return run, list(loader(shuffle=False))[:STEPS]


def closures(module: Any, batches: list[Any]) -> Any:
    return [((lambda x=x, y=y: nn.functional.cross_entropy(module(x), y)), BATCH) for x, y in batches]


@pytest.mark.parametrize("layers", [None, ["net.1", nn.Linear]])
@pytest.mark.parametrize("num_batches", [1, 3])
def test_activations(layers: Any, num_batches: int, tmp_path: Path) -> None:
    monitor = ActivationMonitor(every_n_train_steps=STEPS, num_batches=num_batches, layers=layers)
    module = Plain("BNP-SGD", seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))))
    run, batches = run_to_the_estimate(tmp_path, [monitor], module)
    ((step, values),) = run.logger.of("activations/")
    assert step == STEPS and monitor.history == [(STEPS, values)]
    report = activation_health(module, closures(module, batches[-num_batches:]), layers=layers)
    assert [x.name for x in report.layers] == (["net.0", "net.2"] if layers is None else ["net.0", "net.1", "net.2"])
    numbers = report.to_dict()
    counts = {key for key in numbers if key.endswith(("/num_samples", "/num_channels"))}
    assert values == {f"activations/{key}": numbers[key] for key in numbers.keys() - counts}
    assert values["activations/num_samples"] == num_batches * BATCH
    assert monitor.reports == {"BNPreconditioner": report}
    assert run.logger.experiment.drawn == [("activations", STEPS)]


def test_outputs_that_are_not_the_last_layers(tmp_path: Path) -> None:
    """The logits' cosine, where outputs are known."""

    class Outputs(ActivationMonitor):
        def outputs_and_loss(self, pl_module: Any, batch: Any) -> Any:
            return pl_module(batch[0]).relu(), lambda outputs: nn.functional.cross_entropy(outputs, batch[1])

    monitor = Outputs(every_n_train_steps=STEPS)
    module = Plain()
    _, batches = run_to_the_estimate(tmp_path, [monitor], module)
    x, y = batches[-1]
    expected = activation_health(
        module, lambda: (module(x).relu(), lambda outputs: nn.functional.cross_entropy(outputs, y))
    )
    ((_, values),) = monitor.history
    assert values["activations/logit_cosine"] == expected.logit_cosine
    assert values["activations/logit_cosine"] != values["activations/net.2/cosine"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps(optimizer: str, tmp_path: Path) -> None:
    monitor = StepDivergenceProbe(every_n_train_steps=STEPS, num_batches=2, step_sizes=GRID, threshold=2.0)
    module = Plain(optimizer)
    run, batches = run_to_the_estimate(tmp_path, [monitor], module)
    ((step, values),) = run.logger.of("step/")
    assert step == STEPS and monitor.history == [(STEPS, values)]
    (used,) = run.optimizers
    report = step_divergence(
        module,
        closures(module, batches[-2:]),
        step_sizes=GRID,
        preconditioner=coordinates_of(used, module.parameters()),
        threshold=2.0,
    )
    directions = {"gradient"} if optimizer == "SGD" else {"gradient", "preconditioned"}
    assert set(report.relative_losses) == directions
    expected = {"step/num_samples": 2.0 * BATCH}
    for name in directions:
        losses = report.relative_losses[name]
        expected |= {f"step/{name}/relative_loss/{a:g}": x for a, x in zip(GRID, losses, strict=True)}
        expected[f"step/{name}/best_step_size"] = GRID[losses.index(min(losses))]
        expected[f"step/{name}/best_relative_loss"] = min(losses)
        expected[f"step/{name}/divergence"] = next(a for a, x in zip(GRID, losses, strict=True) if x > 2)
    assert values == expected
    assert run.logger.experiment.drawn == [("relative_loss", STEPS)]


def test_a_base_without_coordinates_and_a_net_without_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """RMSprop in a BNPreconditioner is looked at along P Pᵀg; what P does not act on has the gradient alone."""

    class Wrapped(Plain):
        def configure_optimizers(self) -> Any:
            return BNPreconditioner(torch.optim.RMSprop(self.parameters(), lr=0.01), self)

    module, monitor = Wrapped(), StepDivergenceProbe(every_n_train_steps=STEPS, step_sizes=GRID)
    with caplog.at_level("INFO"):
        run, batches = run_to_the_estimate(tmp_path, [monitor], module)
    assert caplog.text.count("the preconditioned step is P Pᵀg, or missing") == 1
    coordinates = BNPCoordinates(module.parameters(), run.optimizers[0])
    report = step_divergence(module, closures(module, batches[-1:]), step_sizes=GRID, preconditioner=[coordinates])
    assert monitor.reports == {"BNPreconditioner": report}
    assert "preconditioned" in report.relative_losses

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    monitor = StepDivergenceProbe(every_n_train_steps=STEPS, step_sizes=GRID)
    with pytest.warns(UserWarning, match="no layer of the Plain has its weight in the groups"):
        run_to_the_estimate(tmp_path, [monitor], Plain("BNP-SGD", Scale()))
    assert set(monitor.reports["BNPreconditioner"].relative_losses) == {"gradient"}


def test_what_does_not_diverge_or_is_not_finite_is_left_out(tmp_path: Path) -> None:
    class Quadratic(StepDivergenceProbe):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Any:
            return pl_module.net[0].weight.square().sum()

    monitor = Quadratic(every_n_train_steps=STEPS, step_sizes=[0.25, 1e30])  # squared, that is beyond float32
    run_to_the_estimate(tmp_path, [monitor], Plain())
    ((_, values),) = monitor.history
    assert values == {
        "step/num_samples": BATCH,
        "step/gradient/divergence": 1e30,
        "step/gradient/best_step_size": 0.25,
        "step/gradient/best_relative_loss": pytest.approx(0.25),
        "step/gradient/relative_loss/0.25": pytest.approx(0.25),
    }
    small = StepDivergenceProbe(every_n_train_steps=STEPS, step_sizes=[1e-3])
    run_to_the_estimate(tmp_path, [small], Plain())
    ((_, values),) = small.history
    assert not any("divergence" in key for key in values)
    assert small.reports["SGD"].divergence == {"gradient": math.inf}


def test_dropout_has_one_mask(tmp_path: Path) -> None:
    """A tiny step changes nothing, in the noise of training."""
    monitor = StepDivergenceProbe(every_n_epochs=1, step_sizes=[1e-9])
    fit(tmp_path, Plain("SGD", seeded(noisy_net)), [monitor], max_epochs=1)
    ((_, values),) = monitor.history
    assert values["step/gradient/relative_loss/1e-09"] == pytest.approx(1, abs=1e-6)
    assert len(data()) == 64
