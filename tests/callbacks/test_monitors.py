"""The monitors' numbers are those of the curvature package, on the same weights and batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import coordinates_of, estimate_conditioning, layer_conditioning, max_learning_rate
from tests.callbacks.runs import BATCH, BATCHES, OPTIMIZERS, Plain, Recorder, Split, data, fit, loader, trainer

from lightning_callbacks import (  # isort: skip
    HessianConditionMonitor,
    LayerConditionMonitor,
    MaxLearningRateMonitor,
)

STEPS = 5
FIXED = {"seconds"}


def run_to_the_estimate(folder: Path, optimizer: str, callbacks: Any, module: Any = None) -> tuple[Any, Any, list[Any]]:
    """Stops right after it; returns trainer, module, and the batches in the order they came."""
    module = Plain(optimizer) if module is None else module
    run = trainer(folder, callbacks, max_steps=STEPS, max_epochs=None)
    run.fit(module, loader(shuffle=False))
    return run, module, list(loader(shuffle=False))[:STEPS]


def closure(module: Any, batch: Any) -> Any:
    return lambda: nn.functional.cross_entropy(module(batch[0]), batch[1])


def split(module: Any, batch: Any) -> Any:
    return lambda: (module(batch[0]), lambda outputs: nn.functional.cross_entropy(outputs, batch[1]))


def numbers(report: Any, values: dict[str, float], prefix: str) -> None:
    """``values`` under ``prefix`` are the report's."""
    mine = {key.removeprefix(prefix): x for key, x in values.items() if key.startswith(prefix)}
    expected = {key: x for key, x in report.to_dict().items() if key in mine}
    assert len(expected) == len(mine) >= 10
    assert {k: x for k, x in mine.items() if k not in FIXED} == {k: x for k, x in expected.items() if k not in FIXED}


@pytest.mark.parametrize("optimizer", ["SGD", "BNP-SGD", "BNP-AdamW"])
@pytest.mark.parametrize("num_batches", [1, 3])
def test_hessian(optimizer: str, num_batches: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_steps": 6, "num_probes": 2, "seed": 5}
    monitor = HessianConditionMonitor(every_n_train_steps=STEPS, num_batches=num_batches, **options)
    run, module, batches = run_to_the_estimate(tmp_path, optimizer, [monitor])
    (step, values), *_ = run.logger.of("hessian/")
    assert step == STEPS and monitor.history == [(STEPS, values)]
    closures = [(closure(module, b), BATCH) for b in batches[-num_batches:]]
    (wrapper,) = run.optimizers
    sides: dict[str, Any] = {"hessian/": None}
    if isinstance(wrapper, BNPreconditioner):
        sides["preconditioned_hessian/"] = wrapper
    for prefix, preconditioner in sides.items():
        report = estimate_conditioning(closures, module.parameters(), preconditioner=preconditioner, **options)
        numbers(report, values, prefix)
        assert values[f"{prefix}num_samples"] == num_batches * BATCH
    assert set(monitor.reports) == {prefix[:-1] for prefix in sides}
    assert run.logger.experiment.drawn == [("spectrum", STEPS)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("overridden", [True, False])
def test_learning_rate(optimizer: str, overridden: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"num_steps": 15, "seed": 5}
    monitor = (Split if overridden else MaxLearningRateMonitor)(every_n_train_steps=STEPS, **options)
    with caplog.at_level("INFO"):
        run, module, batches = run_to_the_estimate(tmp_path, optimizer, [monitor])
    (values,) = (row for _, row in run.logger.of("learning_rate/"))
    params, (used,) = list(module.parameters()), run.optimizers
    matrix = "gauss_newton" if overridden else "hessian"
    make = split if overridden else closure
    report = estimate_conditioning(
        [(make(module, batches[-1]), BATCH)],
        params,
        preconditioner=coordinates_of(used, params),
        matrix=matrix,  # type: ignore[arg-type]
        num_probes=0,
        **options,
    )
    rate = max_learning_rate(report.lambda_max, used)
    lr = used.param_groups[0]["lr"]
    assert values == {
        f"learning_rate/lambda_max_{matrix}": report.lambda_max,
        "learning_rate/max": rate,
        "learning_rate/current": lr,
        "learning_rate/ratio": lr / rate,
        "learning_rate/num_samples": BATCH,
    }
    assert ("outputs_and_loss is not overridden" in caplog.text) is not overridden


def test_an_optimizer_without_a_known_rule_and_several_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Groups(Plain):
        def configure_optimizers(self) -> Any:
            first, last = self.net[0], self.net[2]
            groups = [{"params": first.parameters(), "lr": 0.1}, {"params": last.parameters(), "name": "head"}]
            return torch.optim.RMSprop(groups, lr=0.2)

    with caplog.at_level("INFO"):
        run, _, _ = run_to_the_estimate(tmp_path, "", [Split(every_n_train_steps=1)], Groups())
    for _, values in run.logger.of("learning_rate/"):
        assert set(values) == {
            "learning_rate/lambda_max_gauss_newton",
            "learning_rate/current/pg1",
            "learning_rate/current/head",
            "learning_rate/num_samples",
        }
        assert (values["learning_rate/current/pg1"], values["learning_rate/current/head"]) == (0.1, 0.2)
    assert caplog.text.count("no learning_rate/max is logged") == 1


def test_warns_once_when_the_rate_stays_above(tmp_path: Path) -> None:
    class Sharp(MaxLearningRateMonitor):
        def outputs_and_loss(self, pl_module: Any, batch: Any) -> Any:
            return pl_module(batch[0]), lambda outputs: 1e4 * outputs.square().mean()

    monitor = Sharp(every_n_train_steps=1, warn_after=3)
    with pytest.warns(UserWarning, match=r"learning rate 0\.05 of SGD was above .* in 3 estimates in a row") as found:
        run_to_the_estimate(tmp_path, "SGD", [monitor])
    assert sum("in a row" in str(w.message) for w in found) == 1
    assert monitor.state_dict()["above"] == {"SGD": STEPS}
    assert all(values["learning_rate/ratio"] > 1 for _, values in monitor.history)


@pytest.mark.parametrize("optimizer", ["SGD", "BNP-SGD"])
def test_layers(optimizer: str, tmp_path: Path) -> None:
    monitor = LayerConditionMonitor(every_n_train_steps=STEPS, share=0.8, epsilon=1e-6, num_batches=2)
    run, module, batches = run_to_the_estimate(tmp_path, optimizer, [monitor])
    (values,) = (row for _, row in run.logger.of("layers/"))
    (used,) = run.optimizers
    wrapper = used if isinstance(used, BNPreconditioner) else None
    closures = [(closure(module, b), BATCH) for b in batches[-2:]]
    records = layer_conditioning(module, closures, preconditioner=wrapper, share=0.8, epsilon=1e-6)
    assert list(records) == ["net.0", "net.2"]
    for name, record in records.items():
        for key, x in record.to_dict().items():
            if key in ("num_features", "bias", "share", "epsilon"):
                continue
            assert values.get(f"layers/{name}/{key}", math.nan) == pytest.approx(x, rel=0, nan_ok=True), key
        if wrapper is not None:
            mean, variance = wrapper.statistics[name].mean, wrapper.statistics[name].variance
            std = (variance + 1e-2 * variance.max() + 1e-4).sqrt()
            for what, x in (("mean", mean), ("std", std)):
                for how, number in (("min", x.min()), ("mean", x.mean()), ("max", x.max())):
                    assert values[f"layers/{name}/bnp_{what}_{how}"] == pytest.approx(float(number), rel=1e-5)
            assert values[f"layers/{name}/bnp_q"] > 0
    assert any("bnp" in key for key in values) is (wrapper is not None)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    """Of a quadratic in the weights whose Hessian is known."""

    class Quadratic(HessianConditionMonitor):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Tensor:
            a, b = pl_module.net[0].weight, pl_module.net[2].weight
            return 1.5 * a.square().sum() - 0.5 * b.square().sum()

    monitor = Quadratic(every_n_epochs=1, num_steps=8)
    fit(tmp_path, Plain(), [monitor], max_epochs=1)
    ((_, values),) = monitor.history
    assert values["hessian/lambda_max"] == pytest.approx(3.0, rel=1e-5)
    assert values["hessian/lambda_min"] == pytest.approx(-1.0, rel=1e-5)
    # 24 weights at 3, 18 at -1, and 9 biases at 0; three random probes
    error = 3 * values["hessian/kappa_mean_error"]
    assert values["hessian/kappa_mean"] == pytest.approx(3 * 51 / (24 * 3 + 18), abs=max(error, 1e-4))


class Once(torch.autograd.Function):
    """A square without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_finite_differences_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Squares(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            return Once.apply(self(batch[0])).mean()

    with caplog.at_level("INFO"):
        run, module, batches = run_to_the_estimate(
            tmp_path, "SGD", [HessianConditionMonitor(every_n_train_steps=1, num_steps=6)], Squares("SGD")
        )
    (*_, (_, values)) = run.logger.of("hessian/")
    x = batches[-1][0]
    report = estimate_conditioning(lambda: module(x).square().mean(), module.parameters(), num_steps=6, num_probes=3)
    assert values["hessian/lambda_max"] == pytest.approx(report.lambda_max, rel=1e-2)
    assert caplog.text.count("finite differences") == 1


def test_all_samples_of_a_loader_are_the_data_sets_hessian(tmp_path: Path) -> None:
    monitor = HessianConditionMonitor(
        every_n_epochs=1, num_batches=BATCHES, dataloader=loader(), num_steps=6, num_probes=2
    )
    module = Plain("SGD")
    run = fit(tmp_path, module, [monitor], max_epochs=1, logger=Recorder())
    whole = data()[:]
    report = estimate_conditioning([(closure(module, whole), 64)], module.parameters(), num_steps=6, num_probes=2)
    ((_, values),) = run.logger.of("hessian/")
    assert values["hessian/num_samples"] == 64
    assert values["hessian/lambda_max"] == pytest.approx(report.lambda_max, rel=1e-5)
    assert values["hessian/kappa_mean"] == pytest.approx(report.kappa_mean, rel=1e-4)
