"""Forward hooks: they see a module's inputs, and have the samples summed up for the step that uses their gradient."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnp_optim.intake import Arrival, Gate, Intake
from bnp_optim.layers import ModuleAdapter, Part, Samples, contradiction, is_readable
from bnp_optim.moments import Moments, behind_taps, moments, side_by_side, statistics_dtype, thinned
from bnp_optim.spectral import Projection, project

__all__ = ["ForwardTap", "LazyTap", "Tapped", "drop_inert_taps"]

# Which hooks pack what autograd saves; torch 2.6 does not tell yet, so there inputs are read at once
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Tapped(NamedTuple):
    """One weight of a tapped module.

    Args:
        number: Which of the adapter's parts it is.
        part: That part.
        exact: Whether the adapter was registered for the module's very class.
        intake: Where its samples go.
    """

    number: int
    part: Part
    exact: bool
    intake: Intake


_Live = tuple[int, Intake, Tensor]  # number, intake, weight


class Reading:
    """What one forward call of a module multiplied; read once for all of the module's weights."""

    __slots__ = ("_kept", "_measured", "_samples", "_tap", "_versions", "fixed", "module")

    def __init__(self, tap: ForwardTap, module: nn.Module, kept: tuple[Any, ...]) -> None:
        self._tap = tap
        self.module = module
        # what a layer before has made: whoever changes it in place before backward makes autograd complain
        alone = len(kept) == 1 and isinstance(kept[0], Tensor)
        self.fixed: bool = alone and kept[0].requires_grad
        self._kept = (kept[0].detach(),) if alone else _detached(kept)
        # ... but of an output it is unknown whether autograd keeps it
        self._versions = () if alone else _versions(self._kept)
        self._samples: Sequence[Samples | None] | None = None
        self._measured: dict[int, Moments] = {}

    def __call__(self, arrival: Arrival) -> None:
        """Fill ``arrival`` with what was read for its weight; where that fails, stop measuring and say so."""
        intake = arrival.intake
        weight = intake.weight
        if weight is None or intake.broken:
            return
        try:
            samples = self._read(arrival.number)
            if samples is None:
                return
            if not _plainly_right(samples, intake.channels):
                wrong = contradiction(samples, intake.rows)
                if wrong is not None:
                    self._tap.refuse(self.module, arrival, weight, wrong)
                    return
            arrival.moments = self._moments(samples, intake, statistics_dtype(weight))
            if arrival.moments is not None and intake.direction is not None:
                arrival.projection = self._project(samples, intake.direction, statistics_dtype(weight))
        except Exception as error:  # the user's run comes first
            self._tap.give_up(self.module, [intake], error)

    def _read(self, number: int) -> Samples | None:
        if self._samples is None:
            if self._versions and _versions(self._kept) != self._versions:
                self._samples = [None] * (number + 1)
            else:
                self._samples = self._tap.adapter.read(self.module, self._kept)
            self._kept = ()
        return self._samples[number] if number < len(self._samples) else None

    def _moments(self, samples: Samples, intake: Intake, dtype: torch.dtype) -> Moments | None:
        values, size, occupancy = samples
        if not isinstance(values, tuple):
            found = self._measure(values, size, intake, dtype)
            return found if found is None or occupancy is None else behind_taps(found, occupancy)
        each = []
        for group in values:  # attention's three projections often see one input
            known = self._measured.get(id(group)) or self._measure(group, size, intake, dtype)
            if known is None:
                return None
            self._measured[id(group)] = known
            each.append(known)
        return side_by_side(each)

    def _measure(self, values: Tensor, size: int, intake: Intake, dtype: torch.dtype) -> Moments | None:
        if values.numel() == 0:
            return None
        limit = self._tap.limit
        if limit is not None:
            values = thinned(values, limit, intake.calls)
            intake.calls += 1
        return moments(values, size, dtype, view=self.fixed)

    def _project(self, samples: Samples, direction: Tensor, dtype: torch.dtype) -> Projection:
        groups = _groups(samples)
        device = groups[0].device
        direction = direction.to(device, dtype)
        if not _autocasting(groups[0]):
            return project(self._tap.adapter, self.module, samples.values, direction)
        with torch.autocast(device.type, enabled=False):  # it would make these products half precision
            return project(self._tap.adapter, self.module, samples.values, direction)


class ForwardTap:
    """The forward hook on one module.

    A copy of it (deepcopy or pickle of the model) is inert and takes itself off the copied module at its first
    call: a copied model never writes into the original's statistics.
    """

    def __init__(self, adapter: ModuleAdapter, tapped: Sequence[Tapped], gate: Gate, limit: int | None = None) -> None:
        self.adapter = adapter
        self.limit = limit
        self._tapped = tuple(tapped)
        self._gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Measure the call that just happened, or do nothing."""
        gate = self._gate
        if gate.paused or not gate.due or not torch.is_grad_enabled():
            return
        live: list[_Live] = []
        for number, part, _, intake in self._tapped:
            weight = module._parameters.get(part.weight) if not part.owner else part.find(module, part.weight)
            if weight is not None and weight.requires_grad and intake.broken is None:
                live.append((number, intake, weight))
        if not live:
            return
        try:
            kept = self.adapter.keep(module, args, kwargs, output)
            if kept is None:
                return
            for _, intake, _ in live:
                intake.fired = True
                if gate.follows and intake.reads_data is not False:
                    intake.reads_data = not _needs_gradient(kept)
            if torch.compiler.is_compiling():
                self._trace(module, live, kept)
            elif (
                is_readable(kept)
                and not torch._C._are_functorch_transforms_active()
                and torch._C._get_tracing_state() is None
            ):
                self._observe(module, live, kept, output)
        except Exception as error:  # the user's forward comes first
            self.give_up(module, [x[1] for x in live], error)

    def _observe(self, module: nn.Module, live: Sequence[_Live], kept: tuple[Any, ...], output: Any) -> None:
        """Measure now, or better when backward comes by: it reads the input anyway, and not every forward has one."""
        reading = Reading(self, module, kept)
        outputs = (output,) if isinstance(output, Tensor) else tuple(_tensors(output))
        if not outputs:
            return
        later = _saved_tensor_hooks is not None and _saved_tensor_hooks(True) is None and not _autocasting(outputs[0])
        for number, intake, weight in live:
            intake.follow(weight)
            arrival = Arrival(intake, number, reading)
            for tensor in outputs:
                arrival.come_by(tensor)
            if not later:
                arrival.measure()

    def refuse(self, module: nn.Module, arrival: Arrival, weight: Tensor, wrong: str) -> None:
        """Samples of a wrong shape: the next step will say so, or where nobody promised better, they do not count."""
        tapped = next(t for t in self._tapped if t.number == arrival.number)
        if weight.shape != arrival.intake.shape:
            return  # the layer has grown, and will be looked up again
        message = f"{type(self.adapter).__name__} does not fit the {type(module).__name__}: {wrong}"
        if tapped.exact:
            arrival.intake.error = message
        else:
            self.give_up(module, [arrival.intake], ValueError(message))

    def give_up(self, module: nn.Module, intakes: Sequence[Intake], error: Exception) -> None:
        """Measure these no more, and say so."""
        for intake in intakes:
            intake.broken = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"BNPreconditioner could not read the input of a {type(module).__name__} and stops measuring that "
            f"layer; training continues with the statistics it has so far ({intakes[0].broken})",
            stacklevel=2,
        )

    def _trace(self, module: nn.Module, live: Sequence[_Live], kept: tuple[Any, ...]) -> None:
        read = self.adapter.read(module, _detached(kept))
        for number, intake, _ in live:
            samples = read[number]
            if samples is None or contradiction(samples, intake.rows) is not None:
                continue
            dtype = intake.traced_mean.dtype
            # always the same ones: a graph has no memory of its calls
            each = [moments(thinned(v, self.limit, 0), samples.size, dtype) for v in _groups(samples) if v.numel()]
            if each:
                total = each[0] if len(each) == 1 else side_by_side(each)
                intake.trace(total if samples.occupancy is None else behind_taps(total, samples.occupancy))
                intake.traced = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _InertTap:
        return _InertTap()

    def __reduce__(self) -> tuple[Callable[[], _InertTap], tuple[()]]:
        return _InertTap, ()


class LazyTap:
    """The hook on a module whose parameters its first forward makes: then its layers are looked up, and tapped."""

    def __init__(self, tracker: weakref.ref[Any]) -> None:
        self._tracker = tracker

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Let the taps be made, and have this first call too."""
        tracker = self._tracker()
        if tracker is None or torch.compiler.is_compiling():
            return
        try:
            tracker.rescan()
        except ValueError as error:  # an adapter that does not fit: the user's forward comes first
            warnings.warn(f"{error}: the {type(module).__name__} passes through", stacklevel=2)
        for hook in tuple(module._forward_hooks.values()):
            if isinstance(hook, ForwardTap):
                hook(module, args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _InertTap:
        return _InertTap()

    def __reduce__(self) -> tuple[Callable[[], _InertTap], tuple[()]]:
        return _InertTap, ()


class _InertTap:
    """What a copied module carries in place of its original's tap."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            for inner in module.modules():  # a child that is never called (attention's out_proj) would keep its own
                drop_inert_taps(inner)


def drop_inert_taps(module: nn.Module) -> None:
    """Remove what a copy of a tapped module inherited."""
    _drop(module, [k for k, hook in module._forward_hooks.items() if isinstance(hook, _InertTap)])


def _drop(module: nn.Module, keys: list[int]) -> None:
    for key in keys:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def _plainly_right(samples: Samples, channels: int) -> bool:
    """Whether the shape is right beyond question; ``contradiction`` takes longer to say."""
    values, _, occupancy = samples
    return isinstance(values, Tensor) and occupancy is None and values.dim() > 1 and values.shape[1] == channels


def _groups(samples: Samples) -> tuple[Tensor, ...]:
    return samples.values if isinstance(samples.values, tuple) else (samples.values,)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, by any of which backward may come."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for x in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(x)


def _needs_gradient(kept: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in kept)


def _detached(kept: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in kept)


def _versions(kept: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(x._version for x in kept if isinstance(x, Tensor))


def _autocasting(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
