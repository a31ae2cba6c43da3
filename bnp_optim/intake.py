"""Which samples count, and when: from a forward call, by way of backward, to the step that uses their gradient.

One rule: a sample counts if and only if its gradient is in the weight's ``.grad`` when ``step()`` is called.
So a forward call leaves its samples behind unread; they *arrive*, and are summed up, when a backward pass that goes on
to the weight reaches that forward's node, and are dropped when the weight's gradient is (``.grad`` is None again, or
``zero_grad`` of the wrapper). A forward whose backward never runs, a discriminator judged for the generator's loss, a
step skipped by GradScaler, a recomputed checkpoint: none is counted, or counted twice.

Inside ``torch.compile`` there are no nodes to watch; samples go into fixed buffers when the forward runs and
count if the weight has a gradient at ``step()``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from bnp_optim.layers import Rows
from bnp_optim.moments import Moments, merge_moments
from bnp_optim.sharding.fsdp import Managed
from bnp_optim.spectral import Projection

__all__ = ["Arrival", "Gate", "Intake"]

Measure = Callable[["Arrival"], None]


class Gate:
    """Whether forwards are measured at present, and which gradients are gone; shared by all taps of a wrapper."""

    def __init__(self) -> None:
        self.paused = 0
        self.due = True
        self.follows = False  # whether anybody asks what reads data
        self.era = 0  # counts the wrapper's calls of zero_grad

    @property
    def open(self) -> bool:
        """Whether the next forward is measured."""
        return self.due and not self.paused


class Arrival:
    """What one forward call multiplied one weight with, and later its samples; called when backward reaches the call.

    Args:
        number: Which of its module's weights.
        measure: Fills in ``moments`` and ``projection``.
    """

    __slots__ = ("_measure", "counted", "inside", "intake", "moments", "number", "projection", "version")
    __torch_unserializable__ = True  # an output that is saved goes without its hooks, silently

    def __init__(self, intake: Intake, number: int, measure: Measure) -> None:
        self._measure: Measure | None = measure
        self.intake = intake
        self.number = number
        self.moments: Moments | None = None
        self.projection: Projection | None = None
        self.version = 0
        self.counted = -1  # the lifetime of .grad in which these samples were counted
        self.inside = torch._C._current_graph_task_id()  # the backward pass that this forward runs inside of, or -1

    def come_by(self, output: Tensor) -> None:
        """Be called when backward reaches ``output``."""
        base = output._base if output._is_view() else None
        if base is not None and base.grad_fn is not None:
            # NOTE: an in-place activation replaces the view's own node (the 3-d output of Linear), which backward
            # then never visits; its base's stays
            base.grad_fn.register_prehook(self)
        elif output.grad_fn is not None:
            # what Tensor.register_hook does, but for the handle, which costs more than all the rest
            hooks = output._backward_hooks
            if hooks is None:
                output._backward_hooks = hooks = OrderedDict()
                output.grad_fn._register_hook_dict(output)
            hooks[-id(self)] = self

    def __call__(self, grad: Any) -> None:
        """Arrive: the gradient is about to be in ``.grad``, unless the pass is for something before this layer."""
        intake = self.intake
        weight = intake.weight
        if weight is None:
            return
        try:
            if not torch._C._will_engine_execute_node(intake.sink):
                return
        except RuntimeError:  # torch.autograd.grad, which returns the weight's gradient instead of accumulating it
            pass
        if intake.era != intake.gate.era:
            intake.discard()
        task = torch._C._current_graph_task_id()
        # NOTE: a reentrant checkpoint runs a pass inside of another, which has delivered nothing yet
        if intake.batches and task != intake.task != self.inside and weight.grad is None and intake.is_empty:
            intake.discard()  # what earlier passes had left in .grad was dropped
        intake.task = task
        if self.counted != intake.lifetime:
            self.counted = intake.lifetime
            self.measure()
            intake.batches.append(self)

    def measure(self) -> None:
        """Sum the samples up, once."""
        if self._measure is not None:
            measure, self._measure = self._measure, None  # and with it what it keeps
            measure(self)
            self.version = 0 if self.moments is None else self.moments.mean._version

    @property
    def intact(self) -> bool:
        """Whether there are samples, and those kept as a view of the user's tensor are still what they were."""
        return self.moments is not None and self.moments.mean._version == self.version


class Intake:
    """The samples of one weight on their way from forward to step; tied modules share it.

    Args:
        rows: Geometry that samples must match.
        shape: Of the weight.
        gate: The wrapper's.
        device: Where the layer is.
        dtype: Of the buffers for compiled graphs and of the spectral direction.
    """

    def __init__(self, rows: Rows, shape: torch.Size, gate: Gate, *, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = rows
        self.channels = rows.statistics
        self.shape = shape
        self.gate = gate
        self.direction: Tensor | None = None  # warm start of the spectral step scale, else None
        self.fired = False  # whether any forward was ever seen, measurable or not
        self.reads_data: bool | None = None  # whether no input ever needed a gradient; None: not known
        self.traced = False  # whether a compiled forward ran since the last step
        self.calls = 0  # measured so far, which thinning out goes round with
        self.broken: str | None = None  # why the layer is not measured any more
        self.error: str | None = None  # what is wrong with its adapter, which the next step says
        self.batches: list[Arrival] = []  # those whose gradient is in .grad
        self.task = -1  # the backward pass in which the last of them arrived
        self.lifetime = 0  # counts the gradients that .grad held one after the other
        self.era = gate.era
        self.weight: Tensor | None = None
        self.sink: Any = None  # the node that accumulates into the weight's .grad
        self._sink_of: tuple[torch.device, torch.dtype] | None = None
        self.managed: Managed | None = None  # FSDP's, where gradients wait for their reduction
        self.traced_counts = torch.zeros(2, device=device, dtype=dtype)  # samples, observations
        self.traced_mean = torch.zeros(rows.statistics, device=device, dtype=dtype)
        self.traced_m2 = torch.zeros(rows.statistics, device=device, dtype=dtype)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow the layer to another device or dtype."""
        if self.traced_counts.is_meta:  # a model that was built without memory has it now
            self.traced_counts, self.traced_mean, self.traced_m2 = (
                torch.zeros_like(x, device=device, dtype=dtype)
                for x in (self.traced_counts, self.traced_mean, self.traced_m2)
            )
        self.traced_counts = self.traced_counts.to(device, dtype)
        self.traced_mean = self.traced_mean.to(device, dtype)
        self.traced_m2 = self.traced_m2.to(device, dtype)
        if self.direction is not None:
            self.direction = self.direction.to(device, dtype)

    @property
    def is_empty(self) -> bool:
        """Whether the gradient is nowhere else, if it is not in the weight's ``.grad``."""
        return self.managed is None or not self.managed.has_gradient

    def follow(self, weight: Tensor) -> None:
        """Know the weight as it is now, and the node that accumulates into its gradient."""
        home = weight.device, weight.dtype
        if self.weight is not weight or self._sink_of != home:  # replaced, or moved: then torch makes a new node too
            self.weight, self.sink, self._sink_of = weight, get_gradient_edge(weight).node, home

    def stop(self) -> None:
        """Let no sample arrive any more, until the next forward."""
        self.weight = self.sink = self._sink_of = None

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
        batches = self.batches if self.era == self.gate.era else []
        self.discard()
        if len(batches) == 1 and not self.traced and batches[0].intact:
            return batches[0].moments, batches[0].projection
        parts = [b.moments for b in batches if b.moments is not None and b.intact]
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
        self.era = self.gate.era
        self.batches = []
        self.lifetime += 1

    def clear_trace(self) -> None:
        """Empty the buffers of compiled graphs."""
        self.traced = False
        self.traced_counts.zero_()
        self.traced_mean.zero_()
        self.traced_m2.zero_()
