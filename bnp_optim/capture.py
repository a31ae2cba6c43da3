"""Forward hooks: they see a layer's input, and have its samples summed up for the step that uses their gradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnp_optim.intake import Arrival, Gate, Intake
from bnp_optim.layers import LayerAdapter, is_plain
from bnp_optim.moments import moments, statistics_dtype, thinned
from bnp_optim.spectral import Projection, project

__all__ = ["ForwardTap", "drop_inert_taps"]

# Which hooks pack what autograd saves; torch 2.6 does not tell yet, so there inputs are read at once
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


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
        intake, gate = self._intake, self._gate
        if gate.paused or not gate.due or intake.broken or not torch.is_grad_enabled():
            return
        weight = module._parameters.get(self._weight_name)
        input = args[0] if args else kwargs.get("input")
        if weight is None or not weight.requires_grad or not isinstance(input, Tensor):
            return
        intake.fired = True
        if torch.compiler.is_compiling():
            self._trace(module, input)
        elif (
            isinstance(output, Tensor)
            and is_plain(input)
            and not torch._C._are_functorch_transforms_active()
            and torch._C._get_tracing_state() is None
        ):
            self._observe(module, weight, input, output)

    def _observe(self, module: nn.Module, weight: Tensor, input: Tensor, output: Tensor) -> None:
        """Measure now, or better when backward comes by: it reads the input anyway, and not every forward has one."""
        try:
            arrival = Arrival(self._intake, input, functools.partial(self._measure, module))
            self._intake.expect(arrival, weight, output)
        except Exception as error:  # the user's forward comes first
            self._give_up(module, error)
            return
        if not _kept_for_backward(input):
            arrival.measure()

    def _measure(self, module: nn.Module, arrival: Arrival, input: Tensor) -> None:
        """Fill ``arrival`` with what ``input`` holds; where that fails, stop measuring and say so."""
        intake = self._intake
        try:
            weight = intake.weight
            values, size = self._adapter.samples(module, input)
            if weight is None or values.numel() == 0 or values.shape[1] != intake.channels:
                return
            if self._limit is not None:
                values = thinned(values, self._limit, intake.calls)
                intake.calls += 1
            arrival.moments = moments(values, size, statistics_dtype(weight), view=arrival.fixed)
            if intake.direction is not None:
                direction = intake.direction.to(input.device, statistics_dtype(weight))
                arrival.projection = _project_exactly(self._adapter, module, input, direction)
        except Exception as error:  # the user's run comes first
            self._give_up(module, error)

    def _give_up(self, module: nn.Module, error: Exception) -> None:
        self._intake.broken = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"BNPreconditioner could not read the input of a {type(module).__name__} and stops measuring that "
            f"layer; training continues with the statistics it has so far ({self._intake.broken})",
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


def _kept_for_backward(input: Tensor) -> bool:
    """Whether autograd holds ``input`` itself until backward, unchanged: not a cast, packed or recomputed one."""
    return _saved_tensor_hooks is not None and _saved_tensor_hooks(True) is None and not _autocasting(input)


def _project_exactly(adapter: LayerAdapter, module: nn.Module, input: Tensor, direction: Tensor) -> Projection:
    """Autocast would make these products half precision."""
    if not _autocasting(input):
        return project(adapter, module, input, direction)
    with torch.autocast(input.device.type, enabled=False):
        return project(adapter, module, input, direction)


def _autocasting(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
