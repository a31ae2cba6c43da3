"""The one guard under which extra passes leave no trace in the training that they watch."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.diagnostics.state import ModuleState, RandomState
from bnp_optim.nn import GammaMeter
from lightning_callbacks._manual import Losses, manual_stand_ins

__all__ = ["Probe", "RankMean", "num_samples_of", "optimizer_names", "probe", "unwrapped"]

T = TypeVar("T")


class Probe:
    """Evaluates the module, each time from the same state. Made by :func:`probe`.

    Attributes:
        trainer: The trainer.
        pl_module: The module itself, not what a strategy has wrapped around it.
        optimizers: The optimizers by name, as LearningRateMonitor names them without its "lr-".
        optimizer_index: Under manual optimization, whose loss :meth:`training_loss` returns.
    """

    def __init__(self, trainer: Any, pl_module: Any, restore: Callable[[], None], losses: Losses | None) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        optimizers = [unwrapped(x) for x in trainer.optimizers]
        self.optimizers = dict(zip(optimizer_names(optimizers), optimizers, strict=True))
        self.optimizer_index = 0
        self._restore = restore
        self._losses = losses

    def evaluate(self, function: Callable[..., T], batch: Any, *args: Any) -> T:
        """``function(pl_module, batch, *args)`` on a copy of the batch, in the precision of training steps.

        The state of the module and the random numbers are at each call what they were when the probe was made.
        """
        self._restore()
        with self.trainer.strategy.precision_plugin.train_step_context():
            return function(self.pl_module, _copy(batch), *args)

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """What ``training_step`` makes of the batch; the loss of optimizer ``optimizer_index`` where it steps itself.

        Raises:
            ValueError: if it skips the batch (returns None) or returns no loss.
        """
        if self._losses is not None:
            self._losses.clear()
        arguments = (batch, batch_idx) if _takes_index(self.pl_module.training_step) else (batch,)
        output = self.pl_module.training_step(*arguments)
        if self._losses is not None:
            return self._losses.of(self.optimizer_index)
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step returned {type(output).__name__} without a loss for this batch")
        return loss

    def to_device(self, batch: Any) -> Any:
        """A batch of a loader as training would see it."""
        strategy = self.trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = self.pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)

    def on_all_ranks(self, prepare: Callable[[], T]) -> T:
        """``prepare()``, or an error on every rank if one of them has one: the others would wait for it forever."""
        error: Exception | None = None
        try:
            result = prepare()
        except Exception as e:
            error = e
        if self.trainer.world_size > 1:
            fine: bool = self.trainer.strategy.reduce_boolean_decision(error is None, all=True)
            if not fine and error is None:
                raise RuntimeError("another rank could not evaluate its batch")
        if error is not None:
            raise error
        return result

    def of_rank_zero(self, prepare: Callable[[], T]) -> T:
        """``prepare()`` on all ranks, since a module may wait for the others; its result is rank zero's."""
        mine = self.on_all_ranks(prepare)
        return self.trainer.strategy.broadcast(mine) if self.trainer.world_size > 1 else mine


class RankMean:
    """A change of coordinates that is none, but averages products over the ranks of data-parallel training.

    Given as the last coordinates, so that what Lanczos sees is the same on every rank: the mean of ``SᵀHS``.

    Args:
        trainer: Its strategy reduces.
        num_samples: Of this rank's batches; ranks count by it. None: all count the same.
    """

    description = "mean over ranks"

    def __init__(self, trainer: Any, num_samples: int | None) -> None:
        self._strategy = trainer.strategy
        mine = torch.tensor([float(num_samples or 0), float(num_samples is None)], device=self._strategy.root_device)
        total, unknown = self._strategy.reduce(mine.clone(), reduce_op="sum").tolist()
        self.num_samples = None if unknown else int(total)
        self._weight = 1 / trainer.world_size if unknown else float(num_samples or 0) / total

    def from_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors."""
        return list(tensors)

    def to_z(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their mean over the ranks, in one reduction."""
        flat = torch.cat([t.reshape(-1) for t in tensors]) * self._weight
        flat = self._strategy.reduce(flat, reduce_op="sum")
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


@contextmanager
def probe(trainer: Any, pl_module: Any) -> Iterator[Probe]:
    """Whatever runs inside, training goes on as if it had not.

    Kept and put back: the random numbers of torch (CPU and CUDA), Python and numpy, and all that :class:`ModuleState`
    names: buffers, metrics, modes, gradients, plain attributes. Meanwhile no BNPreconditioner or GammaMeter measures,
    ``self.log`` and the loggers are silent, optimizers under manual optimization do not step, attention runs on the
    kernel that has second derivatives, and compiled modules run as they were written.

    Not covered: what a training step does to files, to objects of its own, or to parameters other than by
    ``self.optimizers()``.
    """
    with ExitStack() as stack:
        losses = None
        patches: dict[str, Any] = {"log": _nothing, "log_dict": _nothing, "print": _nothing}
        made = Probe(trainer, pl_module, lambda: None, None)
        for optimizer in _preconditioners(made.optimizers.values()):
            stack.enter_context(optimizer.pause_statistics())
        for meter in [hook for m in pl_module.modules() for hook in m._forward_hooks.values()]:
            if isinstance(meter, GammaMeter):
                stack.enter_context(meter.pause())
        if not pl_module.automatic_optimization:
            losses = Losses(len(made.optimizers))
            patches |= stack.enter_context(manual_stand_ins(trainer, pl_module, losses))
        stack.enter_context(_silenced(trainer))
        stack.enter_context(_patched(pl_module, patches))
        rng, state = RandomState(), ModuleState(pl_module)  # after the patches, which they keep
        stack.callback(rng.restore)
        stack.callback(state.close)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))

        def restore() -> None:
            state.restore()
            rng.restore()

        made._restore, made._losses = restore, losses
        yield made


@contextmanager
def _patched(root: nn.Module, patches: dict[str, Any]) -> Iterator[None]:
    """``patches`` as attributes of every LightningModule in ``root``."""
    modules = [m for m in root.modules() if m is root or hasattr(m, "_current_fx_name")]
    before = [{name: m.__dict__[name] for name in patches if name in m.__dict__} for m in modules]
    for m in modules:
        m.__dict__.update(patches)
    try:
        yield
    finally:
        for m, kept in zip(modules, before, strict=True):
            for name in patches:
                m.__dict__.pop(name, None)
            m.__dict__.update(kept)


@contextmanager
def _silenced(trainer: Any) -> Iterator[None]:
    loggers, should_stop = trainer.loggers, trainer.should_stop
    trainer.loggers = [_Silence() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop


class _Silence:
    """A logger, its experiment, and whatever they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Silence:
        return self

    def __getitem__(self, key: Any) -> _Silence:
        return self


def unwrapped(optimizer: Any) -> Optimizer:
    """What Lightning and DeepSpeed wrap."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]


def optimizer_names(optimizers: Iterable[Any]) -> list[str]:
    """The class of each; from the second of a class on with a number, as LearningRateMonitor has it."""
    seen: Counter[str] = Counter()
    names = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _preconditioners(optimizers: Iterable[Any]) -> Iterator[BNPreconditioner]:
    for optimizer in optimizers:
        if isinstance(optimizer, BNPreconditioner):
            yield optimizer
        inner = getattr(optimizer, "optimizers", ())  # one that combines several
        yield from _preconditioners(inner if isinstance(inner, (list, tuple)) else ())


def num_samples_of(batch: Any) -> int | None:
    """The first dimension of the first tensor in ``batch``; None if it has none."""
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(len(t) if t.dim() else 1))
    return sizes[0] if sizes else None


def _copy(batch: Any) -> Any:
    """Copies of its tensors: a step may change its batch, and tensors of inference mode take no part in graphs."""

    def copied(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(t.requires_grad)

    return apply_to_collection(batch, Tensor, copied)


def _takes_index(training_step: Any) -> bool:
    """Whether it takes a batch index beside the batch, whatever that is called."""
    parameters = inspect.signature(training_step).parameters
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 or "batch_idx" in parameters or any(p.kind is p.VAR_POSITIONAL for p in positional)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``log``."""
