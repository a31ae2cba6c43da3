"""When to estimate, on which batches, and where the numbers go: the base of all monitors."""

from __future__ import annotations

import math
import re
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import torch

from lightning_callbacks._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_callbacks._probe import Probe, probe
from lightning_callbacks._progress import progress_in

__all__ = ["Findings", "Monitor", "checked_count"]

IndexedBatch: TypeAlias = "tuple[Any, int]"
Progress: TypeAlias = Callable[[int, int], None]


@dataclass
class Findings:
    """What an estimate found.

    Args:
        values: Numbers by key, without the prefix; NaN is not logged.
        figures: Draw matplotlib figures, by key; called only where a logger takes them.
    """

    values: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Callable[[], Any]] = field(default_factory=dict)


class Monitor(Callback):
    """Base of the monitors: every so often, estimates something and logs it, and leaves no trace in training.

    The estimate runs at the end of a training batch, on the weights after the optimizer's step. Its values go to
    every logger at ``step=trainer.global_step``, the number of optimizer steps behind those weights, whatever
    ``log_every_n_steps`` says, and into ``trainer.callback_metrics``, so that ``EarlyStopping(monitor=...)`` sees
    them. If it fails, one warning for each kind of error says so, and training goes on.

    All ranks compute, and rank zero logs.

    Args:
        every_n_train_steps: Estimate when so many optimizer steps have gone by; batches that only accumulate gradients
            do not count.
        every_n_epochs: Estimate at the last batch of every so many epochs. Exactly one of the two must be given.
        num_batches: On how many batches: the last ones of training, which are held in memory if more than one; or the
            first ones of ``dataloader``.
        dataloader: Where to take batches from instead of training.
        log: Send values to the loggers. False: only to ``callback_metrics`` and ``history``.
        log_key_prefix: Begins every key. It also tells two monitors of one class apart.
        show_progress: In the trainer's progress bar.

    Attributes:
        history: The values of each estimate with its step, without the prefix.

    Raises:
        MisconfigurationException: if an argument is out of its range, both schedules or none are given, or (at the
            start of training) there is no logger although ``log`` is True.
    """

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_batches: int = 1,
        dataloader: Iterable[Any] | None = None,
        log: bool = True,
        log_key_prefix: str = "",
        show_progress: bool = True,
    ) -> None:
        super().__init__()
        if (every_n_train_steps is None) == (every_n_epochs is None):
            raise MisconfigurationException(
                f"every_n_train_steps is {every_n_train_steps!r} and every_n_epochs is {every_n_epochs!r}: give "
                "exactly one of them"
            )
        if every_n_train_steps is not None:
            checked_count("every_n_train_steps", every_n_train_steps)
        if every_n_epochs is not None:
            checked_count("every_n_epochs", every_n_epochs)
        checked_count("num_batches", num_batches)
        if not isinstance(log_key_prefix, str):
            raise MisconfigurationException(f"log_key_prefix is {log_key_prefix!r}, it must be a string")
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.num_batches = num_batches
        self.dataloader = dataloader
        self.to_loggers = log  # NOTE: Lightning itself sets an attribute `log` on every callback
        self.log_key_prefix = log_key_prefix
        self.show_progress = show_progress
        self.history: list[tuple[int, dict[str, float]]] = []
        self._probe: Probe | None = None  # while an estimate runs
        self._recent: deque[IndexedBatch] = deque(maxlen=num_batches)
        self._seen_step = 0  # the optimizer step after which should_update was last asked
        self._latest_step = 0  # the one after which an estimate was last made
        self._warned: set[tuple[str, str]] = set()

    # To override

    def should_update(self, *, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to estimate now; asked after every optimizer step and at the last batch of every epoch.

        Args:
            step_idx: Index of the optimizer step just made, from zero; None at the end of an epoch.
            epoch_idx: Index of the epoch that ends, from zero; None after a step.
        """
        if step_idx is not None and self.every_n_train_steps is not None:
            # several optimizers make several steps in a batch, which may jump over the multiple
            return (step_idx + 1) // self.every_n_train_steps > self._latest_step // self.every_n_train_steps
        if epoch_idx is not None and self.every_n_epochs is not None:
            return (epoch_idx + 1) % self.every_n_epochs == 0
        return False

    @abstractmethod
    def estimate(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> Findings:
        """Make the estimate, inside the guard.

        Args:
            probe: Evaluates the module; knows the trainer, the module and the optimizers.
            batches: Pairs (batch, batch index) on the module's device.
            progress: To call with (done, of how many).
        """
        raise NotImplementedError

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a logger, and start counting where the trainer stands."""
        if stage != "fit":
            return
        if self.to_loggers and not trainer.loggers:
            raise MisconfigurationException(
                f"{type(self).__name__} has no logger to log to: give the Trainer one, or the callback log=False"
            )
        self._seen_step = self._latest_step = trainer.global_step
        self._recent.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate if it is time."""
        if self.dataloader is None and self.num_batches > 1:
            self._recent.append((batch, batch_idx))
        due = False
        if trainer.global_step > self._seen_step:
            self._seen_step = trainer.global_step
            due = self.should_update(step_idx=trainer.global_step - 1)
        if trainer.is_last_batch:
            due = self.should_update(epoch_idx=trainer.current_epoch) or due
        if due:
            self._latest_step = trainer.global_step
            self._record(trainer, pl_module, list(self._recent) or [(batch, batch_idx)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the batches."""
        self._recent.clear()

    @property
    def state_key(self) -> str:
        """Tells monitors of one class apart by their schedule and prefix."""
        return self._generate_state_key(
            every_n_train_steps=self.every_n_train_steps,
            every_n_epochs=self.every_n_epochs,
            log_key_prefix=self.log_key_prefix,
        )

    def state_dict(self) -> dict[str, Any]:
        """The step of the last estimate."""
        return {"latest_step": self._latest_step, "seen_step": self._seen_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._latest_step = int(state_dict["latest_step"])
        self._seen_step = int(state_dict["seen_step"])

    # One estimate

    def _record(self, trainer: Trainer, pl_module: LightningModule, recent: list[IndexedBatch]) -> None:
        try:
            with (
                progress_in(trainer, type(self).__name__, enabled=self.show_progress) as progress,
                probe(trainer, pl_module) as made,
            ):
                self._probe = made
                batches = made.on_all_ranks(lambda: self._batches(made, recent))
                findings = self.estimate(made, batches, progress)
            self._publish(trainer, findings)
        except Exception as error:  # a monitor must not end the training that it watches
            self._warn(trainer, error)
        finally:
            self._probe = None

    def _batches(self, made: Probe, recent: list[IndexedBatch]) -> list[IndexedBatch]:
        if self.dataloader is None:
            return recent
        read = islice(self.dataloader, self.num_batches)
        batches = [(made.to_device(batch), i) for i, batch in enumerate(read)]
        if not batches:
            raise ValueError(f"dataloader {type(self.dataloader).__name__} gave no batch")
        return batches

    def _publish(self, trainer: Trainer, findings: Findings) -> None:
        step = trainer.global_step
        known = {key: x for key, x in findings.values.items() if not math.isnan(x)}
        self.history.append((step, known))
        values = {f"{self.log_key_prefix}{key}": x for key, x in known.items()}
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({key: torch.tensor(x, device=device) for key, x in values.items()})
        if not self.to_loggers or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)
        experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        takers: list[Any] = [x for x in experiments if callable(getattr(x, "add_figure", None))]
        for key, draw in findings.figures.items() if takers and _has_matplotlib() else ():
            for experiment in takers:
                experiment.add_figure(f"{self.log_key_prefix}{key}", draw(), global_step=step)

    def _warn(self, trainer: Trainer, error: Exception) -> None:
        """Once for errors that differ in numbers only."""
        kind = (type(error).__name__, re.sub(r"\d[\d.e+-]*|\bnan\b|\binf\b", "#", str(error)))
        if kind in self._warned or not trainer.is_global_zero:
            return
        self._warned.add(kind)
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"{type(self).__name__} could not estimate at step {trainer.global_step}, and training goes on without: "
            f"{kind[0]}: {reason}",
            stacklevel=2,
        )


def checked_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        MisconfigurationException: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationException(f"{name} is {value!r}, it must be a whole number of at least {least}")


def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True
