"""Which inputs count, and when: forward hooks that hand a layer's samples to the step that uses their gradient.

One rule: a sample counts if and only if its gradient is in the weight's ``.grad`` when ``step()`` is called.
So samples are summed in the forward pass, *arrive* when the backward pass reaches that forward's node, are
*confirmed* when the same pass delivers the weight's gradient, and are dropped when that gradient is (``.grad``
is None again, or ``zero_grad`` of the wrapper). A forward whose backward never runs, a discriminator judged for
the generator's loss, a step skipped by GradScaler, a recomputed checkpoint: none is counted, or counted twice.

Inside ``torch.compile`` there are no nodes to watch; samples go into fixed buffers when the forward runs and
count if the weight has a gradient at ``step()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnp_optim.layers import LayerAdapter, Rows, is_plain
from bnp_optim.spectral import Projection, project
from bnp_optim.statistics import Moments, merge_moments, moments, statistics_dtype

__all__ = ["ForwardTap", "Gate", "Intake"]


class Gate:
    """Whether forwards are measured at present; shared by all taps of a wrapper."""

    def __init__(self) -> None:
        self.paused = 0
        self.due = True

    @property
    def open(self) -> bool:
        """Whether the next forward is measured."""
        return self.due and not self.paused


class _Batch:
    """The samples of one forward call of one module."""

    __slots__ = ("counted", "moments", "projection")

    def __init__(self, moments: Moments, projection: Projection | None) -> None:
        self.moments = moments
        self.projection = projection
        self.counted = -1  # the lifetime of .grad in which these samples were counted


class Intake:
    """The samples of one weight on their way from forward to step; tied modules share it.

    Args:
        rows: Geometry that samples must match; others are ignored.
        device: Where the layer is.
        dtype: Of the buffers for compiled graphs and of the spectral direction.
    """

    def __init__(self, rows: Rows, *, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = rows
        self.direction: Tensor | None = None  # warm start of the spectral step scale, else None
        self.fired = False  # whether any forward was ever seen, measurable or not
        self.traced = False  # whether a compiled forward ran since the last step
        self.broken: str | None = None  # why the layer is not measured any more
        self._arrived: dict[int, list[_Batch]] = {}  # by backward pass: a reentrant one runs inside another
        self._confirmed: list[_Batch] = []
        self._lifetime = 0  # counts the gradients that .grad held one after the other
        self._watched: Tensor | None = None
        self._watch_handle: RemovableHandle | None = None
        self.traced_counts = torch.zeros(2, device=device, dtype=dtype)  # samples, observations
        self.traced_mean = torch.zeros(rows.statistics, device=device, dtype=dtype)
        self.traced_m2 = torch.zeros(rows.statistics, device=device, dtype=dtype)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow the layer to another device or dtype."""
        self.traced_counts = self.traced_counts.to(device, dtype)
        self.traced_mean = self.traced_mean.to(device, dtype)
        self.traced_m2 = self.traced_m2.to(device, dtype)
        if self.direction is not None:
            self.direction = self.direction.to(device, dtype)

    def watch(self, weight: Tensor) -> None:
        """Be told when ``weight``'s gradient is ready; follows a replaced parameter."""
        if self._watched is not weight:
            self.unwatch()
            self._watch_handle = weight.register_hook(self._confirm)  # type: ignore[no-untyped-call]
            self._watched = weight

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watch_handle is not None:
            self._watch_handle.remove()
        self._watch_handle = self._watched = None

    def expect(self, batch: _Batch, output: Tensor) -> None:
        """Let ``batch`` arrive when backward reaches ``output``.

        NOTE: on a view (the 3-d output of Linear) the node of the base is taken: an in-place activation
        replaces the view's own node, which backward then never visits.
        """
        base = output._base if output._is_view() else output
        node = None if base is None else base.grad_fn
        if node is not None:
            node.register_prehook(lambda grads: self._arrive(batch))

    def trace(self, m: Moments) -> None:
        """Merge samples into the fixed buffers, with tensor operations only (for compiled graphs)."""
        n = self.traced_counts[1]
        total = n + m.observations
        delta = m.mean - self.traced_mean
        self.traced_m2 += m.m2 + delta * delta * (n * m.observations / total)
        self.traced_mean += delta * (m.observations / total)
        self.traced_counts[0] += m.samples
        self.traced_counts[1] += m.observations

    def take(self) -> tuple[Moments | None, Projection | None]:
        """The samples whose gradient is in ``.grad`` now, once: they are gone afterwards."""
        batches = self._confirmed
        self.discard()
        parts = [b.moments for b in batches]
        if self.traced:
            counts = self.traced_counts.clone()
            parts.append(Moments(counts[0], counts[1], self.traced_mean.clone(), self.traced_m2.clone()))
            self.clear_trace()
        projections = [b.projection for b in batches if b.projection is not None]
        return merge_moments(parts) if parts else None, _total(projections)

    def discard(self) -> None:
        """The gradient is gone, and with it the samples that it was made of (never called inside a backward)."""
        self._forget_gradient()
        self._arrived.clear()

    def _forget_gradient(self) -> None:
        self._confirmed = []
        self._lifetime += 1

    def clear_trace(self) -> None:
        """Empty the buffers of compiled graphs."""
        self.traced = False
        self.traced_counts.zero_()
        self.traced_mean.zero_()
        self.traced_m2.zero_()

    def _arrive(self, batch: _Batch) -> None:
        self._arrived.setdefault(torch._C._current_graph_task_id(), []).append(batch)

    def _confirm(self, grad: Tensor) -> None:
        weight = self._watched
        if weight is not None and weight.grad is None and self._confirmed:
            self._forget_gradient()
        for batch in self._arrived.pop(torch._C._current_graph_task_id(), ()):
            if batch.counted != self._lifetime:
                batch.counted = self._lifetime
                self._confirmed.append(batch)


def _total(projections: list[Projection]) -> Projection | None:
    total = None
    for p in projections:
        total = p if total is None else total + p
    return total


class ForwardTap:
    """The forward hook on one module.

    A copy of it (deepcopy or pickle of the model) is inert and takes itself off the copied module at its first
    call: a copied model never writes into the original's statistics.
    """

    def __init__(self, adapter: LayerAdapter, intake: Intake, gate: Gate) -> None:
        self._adapter = adapter
        self._intake = intake
        self._gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Measure the call that just happened, or do nothing."""
        if not self._gate.open or self._intake.broken or not torch.is_grad_enabled():
            return
        weight = module._parameters.get(self._adapter.weight_name)
        input = args[0] if args else kwargs.get("input")
        if weight is None or not weight.requires_grad or not isinstance(input, Tensor):
            return
        self._intake.fired = True
        if torch.compiler.is_compiling():
            self._trace(module, input)
        elif isinstance(output, Tensor) and _observable(input):
            self._observe(module, weight, input, output)

    def _observe(self, module: nn.Module, weight: Tensor, input: Tensor, output: Tensor) -> None:
        intake = self._intake
        try:
            input = input.detach()
            values, size = self._adapter.samples(module, input)
            if values.numel() == 0 or values.shape[1] != intake.rows.statistics:
                return
            batch = _Batch(moments(values, size, statistics_dtype(weight)), None)
            if intake.direction is not None:
                batch.projection = _project_exactly(
                    self._adapter, module, input, intake.direction.to(input.device, statistics_dtype(weight))
                )
            intake.watch(weight)
            intake.expect(batch, output)
        except Exception as error:  # the user's forward comes first
            intake.broken = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"BNPreconditioner could not read the input of a {type(module).__name__} and stops measuring that "
                f"layer; training continues with the statistics it has so far ({intake.broken})",
                stacklevel=2,
            )

    def _trace(self, module: nn.Module, input: Tensor) -> None:
        values, size = self._adapter.samples(module, input.detach())
        if values.numel() and values.shape[1] == self._intake.rows.statistics:
            self._intake.trace(moments(values, size, self._intake.traced_mean.dtype))
            self._intake.traced = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _InertTap:
        return _InertTap()

    def __reduce__(self) -> tuple[Callable[[], _InertTap], tuple[()]]:
        return _InertTap, ()


class _InertTap:
    """What a copied module carries in place of its original's tap."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            _drop(module, [k for k, hook in module._forward_hooks.items() if hook is self])


def drop_inert_taps(module: nn.Module) -> None:
    """Remove what a copy of a tapped module inherited."""
    _drop(module, [k for k, hook in module._forward_hooks.items() if isinstance(hook, _InertTap)])


def _drop(module: nn.Module, keys: list[int]) -> None:
    for key in keys:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def _observable(input: Tensor) -> bool:
    return is_plain(input) and not torch._C._are_functorch_transforms_active() and torch._C._get_tracing_state() is None


def _project_exactly(adapter: LayerAdapter, module: nn.Module, input: Tensor, direction: Tensor) -> Projection:
    """Autocast would make these products half precision."""
    with torch.autocast(input.device.type, enabled=False):
        return project(adapter, module, input, direction)
