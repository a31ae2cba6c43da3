"""Which inputs count, and when: forward hooks that hand a layer's samples to the step that uses their gradient.

One rule: a sample counts if and only if its gradient is in the weight's ``.grad`` when ``step()`` is called.
So samples are summed in the forward pass, *arrive* when a backward pass that goes on to the weight reaches that
forward's node, and are dropped when the weight's gradient is (``.grad`` is None again, or ``zero_grad`` of the
wrapper). A forward whose backward never runs, a discriminator judged for the generator's loss, a step skipped by
GradScaler, a recomputed checkpoint: none is counted, or counted twice.

Inside ``torch.compile`` there are no nodes to watch; samples go into fixed buffers when the forward runs and
count if the weight has a gradient at ``step()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from bnp_optim.layers import LayerAdapter, Rows, is_plain
from bnp_optim.moments import Moments, merge_moments, moments, statistics_dtype, thinned
from bnp_optim.spectral import Projection, project

__all__ = ["ForwardTap", "Gate", "Intake"]


class Gate:
    """Whether forwards are measured at present, and which gradients are gone; shared by all taps of a wrapper."""

    def __init__(self) -> None:
        self.paused = 0
        self.due = True
        self.era = 0  # counts the wrapper's calls of zero_grad

    @property
    def open(self) -> bool:
        """Whether the next forward is measured."""
        return self.due and not self.paused


class _Batch:
    """The samples of one forward call of one module; called by backward when it reaches that call."""

    __slots__ = ("arrive", "counted", "inside", "moments", "projection", "version")

    def __init__(self, moments: Moments, arrive: Callable[[_Batch], None]) -> None:
        self.moments = moments
        self.version = moments.mean._version
        self.projection: Projection | None = None
        self.counted = -1  # the lifetime of .grad in which these samples were counted
        self.inside = torch._C._current_graph_task_id()  # the backward pass that this forward runs inside of, or -1
        self.arrive = arrive

    def __call__(self, grads: Any) -> None:
        self.arrive(self)

    @property
    def intact(self) -> bool:
        """Whether what was kept as a view of the user's tensor is still what it was."""
        return self.moments.mean._version == self.version


class Intake:
    """The samples of one weight on their way from forward to step; tied modules share it.

    Args:
        rows: Geometry that samples must match; others are ignored.
        gate: The wrapper's.
        device: Where the layer is.
        dtype: Of the buffers for compiled graphs and of the spectral direction.
    """

    def __init__(self, rows: Rows, gate: Gate, *, device: torch.device, dtype: torch.dtype) -> None:
        self.channels = rows.statistics
        self._gate = gate
        self._era = gate.era
        self.direction: Tensor | None = None  # warm start of the spectral step scale, else None
        self.fired = False  # whether any forward was ever seen, measurable or not
        self.traced = False  # whether a compiled forward ran since the last step
        self.calls = 0  # measured so far, which thinning out goes round with
        self.broken: str | None = None  # why the layer is not measured any more
        self._batches: list[_Batch] = []  # those whose gradient is in .grad
        self._pass = -1  # the backward pass in which the last of them arrived
        self._lifetime = 0  # counts the gradients that .grad held one after the other
        self._weight: Tensor | None = None
        self._sink: Any = None  # the node that accumulates into the weight's .grad
        self._sink_of: tuple[torch.device, torch.dtype] | None = None
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

    def expect(self, moments: Moments, weight: Tensor, output: Tensor) -> _Batch | None:
        """Let samples arrive when backward reaches ``output`` on its way to ``weight``.

        NOTE: on a view (the 3-d output of Linear) the node of the base is taken: an in-place activation
        replaces the view's own node, which backward then never visits.
        """
        base = output._base if output._is_view() else output
        node = None if base is None else base.grad_fn
        if node is None:
            return None
        home = weight.device, weight.dtype
        if self._weight is not weight or self._sink_of != home:  # replaced, or moved: then torch makes a new node too
            self._weight, self._sink, self._sink_of = weight, get_gradient_edge(weight).node, home
        batch = _Batch(moments, self._arrive)
        node.register_prehook(batch)
        return batch

    def stop(self) -> None:
        """Let no sample arrive any more, until the next forward."""
        self._weight = self._sink = self._sink_of = None

    def trace(self, m: Moments) -> None:
        """Merge samples into the fixed buffers, with tensor operations only (for compiled graphs)."""
        assert m.variance is not None
        n = self.traced_counts[1]
        total = n + m.observations
        delta = m.mean - self.traced_mean
        self.traced_m2 += m.variance * m.observations + delta * delta * (n * m.observations / total)
        self.traced_mean += delta * (m.observations / total)
        self.traced_counts[0] += m.samples
        self.traced_counts[1] += m.observations

    def take(self) -> tuple[Moments | None, Projection | None]:
        """The samples whose gradient is in ``.grad`` now, once: they are gone afterwards."""
        batches = self._batches if self._era == self._gate.era else []
        self.discard()
        if not self.traced:
            if not batches:
                return None, None
            if len(batches) == 1 and batches[0].intact:
                return batches[0].moments, batches[0].projection
        parts = [b.moments for b in batches if b.intact]
        if self.traced:
            samples, observations = self.traced_counts.clone()
            variance = self.traced_m2 / observations
            parts.append(Moments(samples, observations, self.traced_mean.clone(), variance))
            self.clear_trace()
        total = None
        for b in batches:
            if b.projection is not None:
                total = b.projection if total is None else total + b.projection
        return merge_moments(parts) if parts else None, total

    def discard(self) -> None:
        """The gradient is gone, and with it the samples that it was made of."""
        self._era = self._gate.era
        self._batches = []
        self._lifetime += 1

    def clear_trace(self) -> None:
        """Empty the buffers of compiled graphs."""
        self.traced = False
        self.traced_counts.zero_()
        self.traced_mean.zero_()
        self.traced_m2.zero_()

    def _arrive(self, batch: _Batch) -> None:
        if self._weight is None or not _reaches(self._sink):
            return  # a gradient with respect to something before this layer
        if self._era != self._gate.era:
            self.discard()
        task = torch._C._current_graph_task_id()
        # NOTE: a reentrant checkpoint runs a pass inside of another, which has delivered nothing yet
        if self._batches and task != self._pass != batch.inside and self._weight.grad is None:
            self.discard()  # what earlier passes had left in .grad was dropped
        self._pass = task
        if batch.counted != self._lifetime:
            batch.counted = self._lifetime
            self._batches.append(batch)


def _reaches(sink: Any) -> bool:
    """Whether the backward pass that is running delivers the gradient of that leaf."""
    try:
        return bool(torch._C._will_engine_execute_node(sink))
    except RuntimeError:  # torch.autograd.grad, which returns this gradient instead of accumulating it
        return True


class ForwardTap:
    """The forward hook on one module.

    A copy of it (deepcopy or pickle of the model) is inert and takes itself off the copied module at its first
    call: a copied model never writes into the original's statistics.
    """

    def __init__(self, adapter: LayerAdapter, intake: Intake, gate: Gate, limit: int | None = None) -> None:
        self._adapter = adapter
        self._weight_name = adapter.weight_name
        self._intake = intake
        self._gate = gate
        self._limit = limit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Measure the call that just happened, or do nothing."""
        if not self._gate.open or self._intake.broken or not torch.is_grad_enabled():
            return
        weight = module._parameters.get(self._weight_name)
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
            # what a layer before has made is saved for backward: whoever changes it in place makes autograd complain
            fixed, input = input.requires_grad, input.detach()
            values, size = self._adapter.samples(module, input)
            if values.numel() == 0 or values.shape[1] != intake.channels:
                return
            if self._limit is not None:
                values = thinned(values, self._limit, intake.calls)
                intake.calls += 1
            batch = intake.expect(moments(values, size, statistics_dtype(weight), view=fixed), weight, output)
            if intake.direction is not None and batch is not None:
                batch.projection = _project_exactly(
                    self._adapter, module, input, intake.direction.to(input.device, statistics_dtype(weight))
                )
        except Exception as error:  # the user's forward comes first
            intake.broken = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"BNPreconditioner could not read the input of a {type(module).__name__} and stops measuring that "
                f"layer; training continues with the statistics it has so far ({intake.broken})",
                stacklevel=2,
            )

    def _trace(self, module: nn.Module, input: Tensor) -> None:
        values, size = self._adapter.samples(module, input.detach())
        if values.numel() and values.shape[1] == self._intake.channels:
            values = thinned(values, self._limit, 0)  # always the same ones: a graph has no memory of its calls
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
