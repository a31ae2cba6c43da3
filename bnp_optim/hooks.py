"""Which modules have which tap, for as long as their tracker lives."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from bnp_optim.capture import ForwardTap, LazyTap, Tapped, drop_inert_taps
from bnp_optim.discovery import Layer, Use
from bnp_optim.intake import Gate, Intake
from bnp_optim.layers import ModuleAdapter
from bnp_optim.sharding.localized import LocalInputs

__all__ = ["Hooks"]


class Hooks:
    """The forward hooks of one tracker. They know only their intakes, and vanish with it.

    Args:
        tracker: Whose they are; held weakly.
        gate: Its gate.
        max_observations: See :class:`bnp_optim.BNPreconditioner`.
    """

    def __init__(self, tracker: Any, gate: Gate, max_observations: int | None) -> None:
        self._tracker = weakref.ref(tracker)
        self._gate = gate
        self._max_observations = max_observations
        self._handles: list[RemovableHandle] = []
        # the list is shared, not copied: whatever is attached later is detached too
        weakref.finalize(tracker, _remove, self._handles).atexit = False

    def attach(self, layers: Iterable[tuple[Layer, Intake]], lazy: Iterable[nn.Module]) -> None:
        """Let each layer's modules fill its intake, and each lazy module announce its first forward."""
        tapped: dict[nn.Module, tuple[ModuleAdapter, list[Tapped]]] = {}
        for layer, intake in layers:
            for use in layer.uses:
                taps = tapped.setdefault(use.module, (_reader(layer, use), []))[1]
                taps.append(Tapped(use.number, use.part, use.exact, intake))
        for module, (adapter, taps) in tapped.items():
            # NOTE: before the hooks of FSDP and tensor parallel, which take away the weight and cast or move the output
            first = isinstance(adapter, LocalInputs)
            self._put(module, ForwardTap(adapter, taps, self._gate, self._max_observations), first=first)
        for module in lazy:
            self._put(module, LazyTap(self._tracker))

    def _put(self, module: nn.Module, tap: ForwardTap | LazyTap, *, first: bool = False) -> None:
        drop_inert_taps(module)
        self._handles.append(module.register_forward_hook(tap, with_kwargs=True, prepend=first))

    def detach(self) -> None:
        """Remove them all."""
        _remove(self._handles)


def _reader(layer: Layer, use: Use) -> ModuleAdapter:
    """How the inputs of a use are read: those of a sharded weight may be sharded, too."""
    return use.adapter if layer.block is None else LocalInputs(use.adapter, bool(layer.block.input_groups))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
