"""Manual optimization: run a training step that calls optimizers, and learn whose loss is whose instead of stepping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Losses", "manual_stand_ins"]


class Losses:
    """The loss behind each optimizer's first step: what went backward since its last ``zero_grad`` or step."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.clear()

    def clear(self) -> None:
        """Forget everything, before a training step."""
        self._pending: list[list[Tensor]] = [[] for _ in range(self._number)]
        self._found: dict[int, Tensor] = {}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In the place of ``manual_backward``."""
        for pending in self._pending:
            pending.append(loss)

    def zero_grad(self, index: int) -> None:
        """Optimizer ``index`` drops its gradients."""
        self._pending[index].clear()

    def step(self, index: int) -> None:
        """Optimizer ``index`` steps."""
        pending = self._pending[index]
        if pending:
            self._found.setdefault(index, sum(pending[1:], start=pending[0]))
        pending.clear()

    def of(self, index: int) -> Tensor:
        """The loss of optimizer ``index``.

        Raises:
            ValueError: if it made no step on a loss given to ``manual_backward``.
        """
        if index not in self._found:
            raise ValueError(
                f"optimizer {index} made no step in training_step on a loss that went through manual_backward: call "
                "self.manual_backward(loss), or override the callback's loss()"
            )
        return self._found[index]


class _StandIn(Optimizer):
    """Looks like the optimizer and does not step."""

    def __init__(self, real: Any, losses: Losses, index: int) -> None:
        self.__dict__.update(_real=real, _losses=losses, _index=index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)

    @property
    def optimizer(self) -> Optimizer:
        return self

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        result = None if closure is None else closure()
        self._losses.step(self._index)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._losses.zero_grad(self._index)

    def state_dict(self) -> Any:
        return self._real.state_dict()

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        module = self._real._strategy.lightning_module
        module.toggle_optimizer(self)
        yield
        module.untoggle_optimizer(self)


class _StandInScheduler:
    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


@contextmanager
def manual_stand_ins(trainer: Any, pl_module: Any, losses: Losses) -> Iterator[dict[str, Any]]:
    """Inside, ``trainer.optimizers`` and ``self.optimizers()`` give stand-ins.

    Yields:
        What else to put in the module's place: ``manual_backward``, ``lr_schedulers``, ``clip_gradients``.
    """
    strategy = trainer.strategy
    real: tuple[Sequence[Any], Sequence[Any]] = (strategy._optimizers, strategy._lightning_optimizers)
    stand_ins = [_StandIn(optimizer, losses, i) for i, optimizer in enumerate(real[1])]
    schedulers = [_StandInScheduler(config.scheduler) for config in trainer.lr_scheduler_configs]
    one = schedulers[0] if len(schedulers) == 1 else (schedulers or None)
    strategy._optimizers = strategy._lightning_optimizers = stand_ins
    try:
        yield {
            "manual_backward": losses.backward,
            "lr_schedulers": lambda: one,
            "clip_gradients": lambda *args, **kwargs: None,
        }
    finally:
        strategy._optimizers, strategy._lightning_optimizers = real
