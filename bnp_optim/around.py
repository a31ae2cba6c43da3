"""An optimizer that is another one's front: what clients read and assign are the base's own objects."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from bnp_optim.bases import become_optimizer

__all__ = ["AroundOptimizer"]


class AroundOptimizer(Optimizer):
    """``param_groups``, ``state`` and ``defaults`` are those of ``base_optimizer``; hooks are its own.

    ``Optimizer.__init__`` is not called: it would make groups of its own. Lightning assigns to the three, so they need
    setters; and no blanket ``__getattr__``: GradScaler would find what a fused base can do, and hand it the scale.
    """

    base_optimizer: Optimizer

    def _go_around(self, base: Optimizer) -> None:
        self.base_optimizer = base
        become_optimizer(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state (statistics are not in it)."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value
