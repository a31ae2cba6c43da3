"""When the monitors estimate, where the numbers arrive, and what happens when they cannot."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.callbacks.runs import (
    BATCHES,
    OURS,
    Plain,
    Recorder,
    fit,
    left_behind,
    loader,
    monitors,
    pl,
    reseed,
    trainer,
)
from tests.conftest import same

from lightning_callbacks import (  # isort: skip
    ActivationMonitor,
    HessianConditionMonitor,
    LayerConditionMonitor,
    MaxLearningRateMonitor,
    StepDivergenceProbe,
)

Misconfiguration = pytest.importorskip("lightning_fabric.utilities.exceptions").MisconfigurationException


def hessian(**options: Any) -> HessianConditionMonitor:
    return HessianConditionMonitor(**{"num_steps": 3, "num_probes": 1} | options)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "monitor",
    [
        HessianConditionMonitor,
        MaxLearningRateMonitor,
        LayerConditionMonitor,
        ActivationMonitor,
        StepDivergenceProbe,
    ],
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "every_n_train_steps is None and every_n_epochs is None: give exactly one"),
        ({"every_n_train_steps": 2, "every_n_epochs": 1}, "give exactly one"),
        ({"every_n_train_steps": 0}, "every_n_train_steps is 0, it must be a whole number of at least 1"),
        ({"every_n_epochs": 1.5}, r"every_n_epochs is 1\.5"),
        ({"every_n_epochs": True}, "every_n_epochs is True"),
        ({"every_n_epochs": 1, "num_batches": 0}, "num_batches is 0"),
        ({"every_n_epochs": 1, "log_key_prefix": 3}, "log_key_prefix is 3"),
    ],
)
def test_wrong_schedules(monitor: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Misconfiguration, match=message):
        monitor(**options)


@pytest.mark.parametrize(
    ("monitor", "options", "message"),
    [
        (HessianConditionMonitor, {"num_steps": 0}, "num_steps is 0"),
        (HessianConditionMonitor, {"num_probes": -1}, "num_probes is -1, it must be a whole number of at least 0"),
        (MaxLearningRateMonitor, {"num_steps": "20"}, "num_steps is '20'"),
        (MaxLearningRateMonitor, {"warn_after": 0}, "warn_after is 0"),
        (LayerConditionMonitor, {"share": 0.0}, r"share is 0\.0"),
        (LayerConditionMonitor, {"epsilon": -1.0}, r"epsilon is -1\.0"),
        (StepDivergenceProbe, {"step_sizes": []}, "step_sizes is empty"),
        (StepDivergenceProbe, {"step_sizes": [0.1, -1.0]}, r"step_sizes\[1\] is -1\.0, it must be a positive"),
        (StepDivergenceProbe, {"threshold": 1.0}, r"threshold is 1\.0, it must be above 1"),
    ],
)
def test_wrong_options(monitor: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Misconfiguration, match=message):
        monitor(every_n_epochs=1, **options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["net.7"], "layers has 'net.7', which fits no module of the model: it has 'net', 'net.0', 'net.1', 'net.2'"),
        ([nn.ReLU], "ReLU'>, which fits no module"),
        ([3], "layers has 3, it must be a name"),
        ("net.0", "layers is 'net.0', it must be a sequence"),
        ([], "layers is empty"),
    ],
)
def test_modules_that_are_not_there(layers: Any, message: str, tmp_path: Path) -> None:
    """Before the first step, not as a warning after it."""
    with pytest.raises(Misconfiguration, match=f"ActivationMonitor: .*{message}"):
        fit(tmp_path, Plain(), [ActivationMonitor(layers=layers, every_n_epochs=1)])


def test_no_logger(tmp_path: Path) -> None:
    with pytest.raises(Misconfiguration, match="HessianConditionMonitor has no logger"):
        fit(tmp_path, Plain(), [hessian(every_n_epochs=1)], logger=False)
    monitor = hessian(every_n_epochs=1, log=False)
    run = fit(tmp_path, Plain(), [monitor], logger=False)
    assert run.callback_metrics["hessian/lambda_max"] == torch.tensor(monitor.history[-1][1]["hessian/lambda_max"])


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "options", "steps"),
    [
        ({"every_n_train_steps": 3}, {}, [3, 6, 9, 12, 15]),
        ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 4}, [1, 2, 3, 4]),
        ({"every_n_train_steps": 3}, {"accumulate_grad_batches": 3}, [3, 6]),  # 3 steps an epoch
        ({"every_n_epochs": 1}, {}, [8, 16]),
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [16, 32]),
        ({"every_n_epochs": 1}, {"limit_train_batches": 3, "accumulate_grad_batches": 2}, [2, 4]),
        ({"every_n_train_steps": 4}, {"fast_dev_run": 5}, [4]),
    ],
)
def test_steps(schedule: dict[str, int], options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    """Whatever log_every_n_steps says."""
    monitor = hessian(**schedule)
    run = fit(tmp_path, Plain(), [monitor], log_every_n_steps=1000, **options)
    assert [step for step, _ in monitor.history] == steps
    if "fast_dev_run" not in options:
        assert [step for step, _ in run.logger.of("hessian/")] == steps


def test_a_schedule_of_ones_own_and_a_second_fit(tmp_path: Path) -> None:
    class Powers(HessianConditionMonitor):
        def should_update(self, *, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None and (step_idx + 1).bit_count() == 1

    monitor = Powers(every_n_epochs=1, num_steps=2, num_probes=0)
    fit(tmp_path, Plain(), [monitor], accumulate_grad_batches=2)
    assert [step for step, _ in monitor.history] == [1, 2, 4, 8]
    run = fit(tmp_path, Plain(), [monitor], max_epochs=1)  # another trainer starts from zero
    assert [step for step, _ in monitor.history[4:]] == [1, 2, 4, 8]
    run.fit_loop.max_epochs = 2
    run.fit(Plain(), loader())  # this one goes on
    assert [step for step, _ in monitor.history[8:]] == [16]


# ---- where the numbers go ------------------------------------------------------------------------


def test_csv_and_several_loggers(tmp_path: Path) -> None:
    recorder = Recorder()
    logs = [pl.loggers.CSVLogger(tmp_path), recorder]
    fit(tmp_path, Plain(), monitors(every_n_train_steps=6), logger=logs, log_every_n_steps=5)
    with (Path(logs[0].log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key in (
        "hessian/kappa_mean",
        "learning_rate/max",
        "layers/net.0/kappa",
        "activations/net.0/mean_to_std",
        "step/gradient/relative_loss/0.1",
    ):
        found = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        assert found == [(step, row[key]) for step, row in recorder.rows if key in row]
        assert [step for step, _ in found] == [6, 12]
    assert recorder.experiment.drawn == [
        (figure, step) for step in (6, 12) for figure in ("spectrum", "activations", "relative_loss")
    ]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    fit(tmp_path, Plain(), [hessian(every_n_train_steps=5)], logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [e.step for e in events.Scalars("hessian/kappa_mean")] == [5, 10, 15]
    assert [e.step for e in events.Images("spectrum")] == [5, 10, 15]


class Validated(Plain):
    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self(batch[0]).mean())


def test_early_stopping_sees_the_values(tmp_path: Path) -> None:
    """Before and after validations and the ends of epochs, which reset what is logged by a module."""
    seen: list[float] = []

    class Look(pl.Callback):  # type: ignore[misc, name-defined]
        def look(self, trainer: Any, *args: Any) -> None:
            seen.append(float(trainer.callback_metrics.get("hessian/lambda_max", -1)))

        on_validation_end = on_train_epoch_end = on_train_epoch_start = look

    monitor = hessian(every_n_epochs=2)
    stop = pl.callbacks.EarlyStopping("hessian/lambda_max", divergence_threshold=0.0, strict=False)
    run = trainer(tmp_path, [stop, Look(), monitor], max_epochs=7, num_sanity_val_steps=0)
    run.fit(Validated(), loader(), loader(shuffle=False))
    assert run.current_epoch == 2  # stopped at the first estimate
    value = monitor.history[0][1]["hessian/lambda_max"]
    assert seen == [-1, -1, -1, -1, *[pytest.approx(value)] * 2]


def test_two_monitors_of_a_class(tmp_path: Path) -> None:
    pair = [hessian(every_n_train_steps=4, log_key_prefix=f"{name}/", seed=i) for i, name in enumerate("ab")]
    run = fit(tmp_path, Plain(), pair)
    assert {"a/hessian/kappa_mean", "b/hessian/kappa_mean"} <= set(run.callback_metrics)
    assert pair[0].state_key != pair[1].state_key
    assert [step for step, _ in run.logger.of("a/hessian/")] == [4, 8, 12, 16]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HessianConditionMonitor`"):
        trainer(tmp_path, [hessian(every_n_epochs=1), hessian(every_n_epochs=1)])


# ---- failing estimates ---------------------------------------------------------------------------


class Failing(HessianConditionMonitor):
    how = ""

    def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Any:
        if self.how == "error":
            raise KeyError("missing")
        if self.how == "type":
            return None
        loss = nn.functional.cross_entropy(pl_module(batch[0]), batch[1])
        return {"nan": loss * float("nan"), "no grad": loss.detach(), "vector": loss.expand(2)}[self.how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", "KeyError: 'missing'"),
        ("type", "TypeError: a closure returned a NoneType"),
        ("nan", "ValueError: loss is nan, it must be finite"),
        ("no grad", "ValueError: loss does not require grad"),
        ("vector", "ValueError: loss has shape"),
        ("empty", "ValueError: dataloader list gave no batch"),
    ],
)
def test_a_failing_estimate_warns_once_and_changes_nothing(how: str, message: str, tmp_path: Path) -> None:
    plain = Plain("BNP-AdamW")
    expected = left_behind(fit(tmp_path, plain), plain)
    monitor = Failing(every_n_train_steps=1, dataloader=[] if how == "empty" else None)
    monitor.how = how
    module = Plain("BNP-AdamW")
    with pytest.warns(UserWarning, match=message) as found:
        run = fit(tmp_path, module, [monitor])
    (text,) = (str(w.message) for w in found if "could not estimate" in str(w.message))
    assert text.startswith("Failing could not estimate at step 1, and training goes on without")
    assert same(left_behind(run, module), expected)
    assert monitor.history == [] and not run.logger.of(*OURS)


def test_a_skipped_batch(tmp_path: Path) -> None:
    class Skipping(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index % 2 else super().training_step(batch, index)

    monitor = hessian(every_n_train_steps=1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(tmp_path, Skipping(), [monitor])
    (text,) = (str(w.message) for w in found if "could not estimate" in str(w.message))
    assert "training_step returned NoneType without a loss" in text
    assert monitor.history


def test_reentrant_checkpoints(tmp_path: Path) -> None:
    class Checkpointed(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            x = batch[0].requires_grad_()
            out = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=True)
            return nn.functional.cross_entropy(out, batch[1])

    plain, module = Checkpointed("BNP-SGD"), Checkpointed("BNP-SGD")
    expected = left_behind(fit(tmp_path, plain), plain)
    hessian, _, layers, *_ = monitors()
    with pytest.warns(UserWarning, match="could not estimate") as found:
        after = left_behind(fit(tmp_path, module, [hessian, layers]), module)
    assert same(after, expected)
    (text,) = (str(w.message) for w in found if "could not estimate" in str(w.message))
    assert text.startswith("HessianConditionMonitor") and "use_reentrant=False" in text
    # inputs are seen all the same, gradients not
    assert "layers/net.0/kappa_preconditioned" in layers.history[-1][1]
    assert not any("gradient" in key for key in layers.history[-1][1])


# ---- progress bars -------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_bars_show_the_estimate_and_then_what_they_showed(
    bar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[str]] = {"during": [], "after": []}

    def description(run: Any) -> str:
        it = run.progress_bar_callback
        return str(it.train_progress_bar.desc if bar == "TQDMProgressBar" else it.train_progress_bar.description)

    class Loud(HessianConditionMonitor):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Any:
            shown["during"].append(description(pl_module.trainer))
            return super().loss(pl_module, batch, batch_idx)

    class Look(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            shown["after"].append(description(trainer))

    monkeypatch.setattr("lightning_callbacks._progress._INTERVAL", 0.0)
    callbacks = [getattr(pl.callbacks, bar)(), Loud(every_n_train_steps=2, num_steps=3, num_probes=1), Look()]
    run = trainer(tmp_path, callbacks, enable_progress_bar=True, max_epochs=1)
    reseed()
    run.fit(Plain(), loader())
    assert len(shown["after"]) == BATCHES
    assert all(text.strip().rstrip(": ").startswith("Epoch 0") for text in shown["after"]), shown["after"]
    assert len(set(shown["after"])) == 1
    assert sum("Loud 2/3" in text for text in shown["during"]) == BATCHES // 2
