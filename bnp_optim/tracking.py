"""The layers of one model that one optimizer owns: their taps, their pending samples, their statistics."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnp_optim.capture import ForwardTap, Gate, Intake, drop_inert_taps
from bnp_optim.discovery import Layer, SkipRule, find_layers
from bnp_optim.moments import statistics_dtype
from bnp_optim.spectral import Projection, initial_direction, power_step
from bnp_optim.statistics import LayerStatistics, StatisticsBank, StatisticsOptions, shelves
from bnp_optim.transform import Factors

__all__ = ["LiveLayer", "Tracker"]

Home = tuple[torch.device, torch.dtype]


@dataclass(eq=False)
class _Place:
    """Where the samples and the statistics of one layer are kept."""

    layer: Layer
    intake: Intake
    bank: StatisticsBank
    row: int
    home: Home


class LiveLayer(NamedTuple):
    """A layer whose weight has a gradient at this step.

    Args:
        bias: The bias that takes part in P, or None: then the rank-one form serves the weight alone.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    weight_grad: Tensor
    bias_grad: Tensor | None


class Tracker:
    """Owns hooks and statistics; the hooks know only their intake and vanish with the tracker.

    Args:
        owned: Ids of the optimizer's parameters.
        squared: Whether the transforms apply P Pᵀ; otherwise P and Pᵀ.
    """

    def __init__(
        self,
        model: nn.Module,
        skip: Collection[SkipRule],
        options: StatisticsOptions,
        owned: Collection[int],
        *,
        squared: bool,
    ) -> None:
        self.gate = Gate()
        self.options = options
        self._model = model
        self._skip = tuple(skip)
        self._squared = squared
        self._handles: list[RemovableHandle] = []
        # the list is shared, not copied: whatever is attached later is detached too
        weakref.finalize(self, _detach, self._handles).atexit = False
        self._places: dict[Layer, _Place] = {}
        self._attach(owned)

    def _attach(self, owned: Collection[int]) -> None:
        known = {(id(x.modules[0]), x.rows): place.intake for x, place in self._places.items()}
        self.attached = True
        findings = find_layers(self._model, self._skip)
        self._owned = frozenset(owned)
        self.reasons = findings.reasons
        self.layers = [x for x in findings.layers if x.weight is not None and id(x.weight) in owned]
        self.ready: set[Layer] = set()
        intakes = []
        for i, layer in enumerate(self.layers):
            device, dtype = _home(layer)
            intake = known.pop((id(layer.modules[0]), layer.rows), None)  # with what waits in it
            if intake is None:
                intake = Intake(layer.rows, device=device, dtype=dtype)
                if self.options.step_scale == "spectral":
                    intake.direction = self._initial_direction(i, device, dtype)
            intakes.append(intake)
            for module in layer.modules:
                drop_inert_taps(module)
                tap = ForwardTap(layer.adapter, intake, self.gate, self.options.max_observations)
                self._handles.append(module.register_forward_hook(tap, with_kwargs=True))
        for intake in known.values():
            intake.stop()
        self._settle(intakes)

    def rescan(self, owned: Collection[int]) -> None:
        """Look for layers again; those that were known keep their statistics and their pending samples."""
        kept = [(layer, self.snapshot(layer)) for layer in self.layers if layer in self.ready]
        _detach(self._handles)
        self._attach(owned)
        for old, snapshot in kept:
            for new in self.layers:
                if new.modules[0] is old.modules[0] and new.rows == old.rows:
                    self.restore(new, snapshot)

    def detach(self) -> None:
        """Remove every hook; the statistics stay as they are."""
        self.attached = False
        _detach(self._handles)
        for place in self._places.values():
            place.intake.stop()

    def live(self, owned: Collection[int]) -> list[LiveLayer]:
        """The layers whose weight has a gradient and is among the ``owned`` parameters (ids), as of now."""
        live = []
        for layer in self.layers:
            weight, bias = layer.weight, layer.bias
            if weight is None or id(weight) not in owned:
                continue
            weight_grad = _dense_grad(weight)
            if weight_grad is None:
                continue
            bias_grad = None if bias is None or id(bias) not in owned else _dense_grad(bias)
            live.append(LiveLayer(layer, weight, None if bias_grad is None else bias, weight_grad, bias_grad))
        return live

    def fired(self, layer: Layer) -> bool:
        """Whether a forward of the layer was ever seen."""
        return self._places[layer].intake.fired

    def broken(self, layer: Layer) -> str | None:
        """Why the layer's input is no longer measured, or None."""
        return self._places[layer].intake.broken

    def discard(self) -> None:
        """The gradients were zeroed, and with them go the samples they were made of."""
        for place in self._places.values():
            place.intake.discard()

    def commit(self, live: Sequence[LiveLayer]) -> None:
        """Commit the samples behind the gradients of ``live``; what waits in other layers has lost its gradient."""
        if any(_home_of(x.weight) != self._places[x.layer].home for x in live):
            self._move()
        by_layer = {x.layer: x for x in live}
        taken = {}
        for layer, place in self._places.items():
            if layer in by_layer:
                taken[layer] = place.intake.take()
            else:
                place.intake.discard()
                place.intake.clear_trace()
        batches = [[taken[x][0] if x in taken else None for x in layers] for layers, _ in self._banks]
        if not any(m is not None for batch in batches for m in batch):
            return
        totals = [bank.gather(batch) for (_, bank), batch in zip(self._banks, batches, strict=True)]
        for (layers, bank), batch in zip(self._banks, batches, strict=True):
            total = totals[0] if len(totals) == 1 else sum((t.to(bank.q2) for t in totals[1:]), totals[0].to(bank.q2))
            if not bank.commit(total):
                continue
            bank.refresh()
            self.ready.update(layer for layer, m in zip(layers, batch, strict=True) if m is not None)
            if self.options.step_scale == "spectral":
                for layer in layers:
                    if layer in by_layer:
                        self._power_step(by_layer[layer], taken[layer][1])
                bank.refresh()

    def _power_step(self, live: LiveLayer, projection: Projection | None) -> None:
        """Let the layer's q² follow the largest eigenvalue."""
        place = self._places[live.layer]
        direction = place.intake.direction
        if projection is None or direction is None:
            return
        touched = place.bank.ledger.touched
        active = None if touched is None else touched[place.row]
        factors = place.bank.factors(place.row)
        affine = live.bias is not None
        q2 = power_step(projection, factors, affine=affine, direction=direction, active=active)
        place.bank.set_q2(place.row, q2)

    def factors(self, layer: Layer) -> Factors:
        """P of the layer, from the statistics as committed."""
        place = self._places[layer]
        return place.bank.factors(place.row)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Copies, by layer name."""
        return {x.name: place.bank.statistics(place.row) for x, place in self._places.items()}

    def snapshot(self, layer: Layer) -> dict[str, Tensor]:
        """Everything that the layer's future steps depend on, as fresh tensors."""
        place = self._places[layer]
        snapshot = place.bank.snapshot(place.row)
        if place.intake.direction is not None:
            snapshot["direction"] = place.intake.direction.clone()
        return snapshot

    def expected_shapes(self, layer: Layer) -> dict[str, torch.Size]:
        """The shapes of a snapshot; "direction" only where it is in use."""
        return {key: value.shape for key, value in self.snapshot(layer).items()}

    def restore(self, layer: Layer, snapshot: dict[str, Tensor]) -> None:
        """Put a snapshot back (of matching shapes)."""
        place = self._places[layer]
        place.bank.restore(place.row, snapshot)
        if place.intake.direction is not None and "direction" in snapshot:
            place.intake.direction.copy_(snapshot["direction"])
        self.ready.add(layer)

    def reset(self) -> None:
        """Forget all statistics and pending samples."""
        for i, (layer, place) in enumerate(self._places.items()):
            place.intake.take()
            if place.intake.direction is not None:
                place.intake.direction.copy_(self._initial_direction(i, *_home(layer)))
        self.ready.clear()
        self._settle([place.intake for place in self._places.values()])

    def _initial_direction(self, i: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Where the power step of layer ``i`` starts; a bias that takes no part has no entry in it."""
        layer = self.layers[i]
        direction = initial_direction(layer.rows, i, device=device, dtype=dtype)
        bias = layer.bias
        if bias is None or id(bias) not in self._owned:
            direction[:, 0] = 0
        return direction

    def _settle(self, intakes: Sequence[Intake]) -> None:
        """Give every layer its row in a bank of its device and dtype."""
        homes: dict[Home, list[int]] = {}
        for i, layer in enumerate(self.layers):
            homes.setdefault(_home(layer), []).append(i)
        on_host = all(device.type == "cpu" for device, _ in homes)
        self._banks: list[tuple[list[Layer], StatisticsBank]] = []
        places = {}
        for (device, dtype), members in homes.items():
            for shelf in shelves([self.layers[i].rows.statistics for i in members]):
                layers = [self.layers[members[k]] for k in shelf]
                bank = StatisticsBank(
                    [x.rows for x in layers],
                    self.options,
                    device=device,
                    dtype=dtype,
                    squared=self._squared,
                    on_host=on_host,
                )
                self._banks.append((layers, bank))
                places |= {
                    x: _Place(x, intakes[members[k]], bank, row, _home_of(x.weight))
                    for row, (x, k) in enumerate(zip(layers, shelf, strict=True))
                }
        self._places = {x: places[x] for x in self.layers}

    def _move(self) -> None:
        """The model went to another device or dtype after it was wrapped: follow it."""
        snapshots = {layer: self.snapshot(layer) for layer in self.ready}
        self._settle([place.intake for place in self._places.values()])
        for layer, place in self._places.items():
            place.intake.move(*_home(layer))
        for layer, snapshot in snapshots.items():
            self.restore(layer, snapshot)


def _home_of(weight: Tensor | None) -> Home:
    """A layer's device and dtype."""
    return (torch.device("cpu"), torch.float32) if weight is None else (weight.device, weight.dtype)


def _home(layer: Layer) -> Home:
    """Where a layer's statistics live: its device, float32, or float64 where the layer is."""
    weight = layer.weight
    return _home_of(None) if weight is None else (weight.device, statistics_dtype(weight))


def _dense_grad(parameter: Tensor) -> Tensor | None:
    """The gradient, if it can be changed in place; one whose entries share memory gets its own."""
    grad = parameter.grad
    if grad is None or grad.layout != torch.strided:
        return None
    if not grad.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)
    ):
        parameter.grad = grad = grad.clone(memory_format=torch.contiguous_format)
    return grad


def _detach(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
