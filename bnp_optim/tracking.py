"""The layers of one model that one optimizer owns: their taps, their pending samples, their statistics."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnp_optim.capture import ForwardTap, Gate, Intake, drop_inert_taps
from bnp_optim.discovery import Layer, SkipRule, find_layers
from bnp_optim.spectral import initial_direction, power_step
from bnp_optim.statistics import LayerStatistics, StatisticsBank, StatisticsOptions, statistics_dtype
from bnp_optim.transform import Factors

__all__ = ["LiveLayer", "Tracker"]


@dataclass(frozen=True)
class LiveLayer:
    """A layer whose weight has a gradient at this step.

    Args:
        bias: The bias that takes part in P, or None: then the rank-one form serves the weight alone.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None


class Tracker:
    """Owns hooks and statistics; the hooks know only their intake and vanish with the tracker."""

    def __init__(
        self, model: nn.Module, skip: Collection[SkipRule], options: StatisticsOptions, owned: Collection[int]
    ) -> None:
        self.gate = Gate()
        self.options = options
        self._model = model
        self._skip = tuple(skip)
        self._handles: list[RemovableHandle] = []
        self._watching: list[Intake] = []
        # the lists are shared, not copied: whatever is attached later is detached too
        weakref.finalize(self, _detach, self._handles, self._watching).atexit = False
        self._intakes: dict[Layer, Intake] = {}
        self._attach(owned)

    def _attach(self, owned: Collection[int]) -> None:
        known = {(id(x.modules[0]), x.rows): intake for x, intake in self._intakes.items()}
        self.attached = True
        findings = find_layers(self._model, self._skip)
        self._owned = frozenset(owned)
        self.reasons = findings.reasons
        self.layers = [x for x in findings.layers if x.weight is not None and id(x.weight) in owned]
        self.ready: set[Layer] = set()
        self._intakes = {}
        for i, layer in enumerate(self.layers):
            device, dtype = _home(layer)
            intake = known.get((id(layer.modules[0]), layer.rows))  # with what waits in it
            if intake is None:
                intake = Intake(layer.rows, device=device, dtype=dtype)
                if self.options.step_scale == "spectral":
                    intake.direction = self._initial_direction(i, device, dtype)
            self._intakes[layer] = intake
            self._watching.append(intake)
            for module in layer.modules:
                drop_inert_taps(module)
                tap = ForwardTap(layer.adapter, intake, self.gate)
                self._handles.append(module.register_forward_hook(tap, with_kwargs=True))
        self._build_banks()

    def rescan(self, owned: Collection[int]) -> None:
        """Look for layers again; those that were known keep their statistics and their pending samples."""
        kept = [(layer, self.snapshot(layer)) for layer in self.layers if layer in self.ready]
        before = list(self._watching)
        self._watching.clear()
        _detach(self._handles, [])
        self._attach(owned)
        for intake in before:
            if not any(intake is other for other in self._watching):
                intake.unwatch()
        for old, snapshot in kept:
            for new in self.layers:
                if new.modules[0] is old.modules[0] and new.rows == old.rows:
                    self.restore(new, snapshot)

    def detach(self) -> None:
        """Remove every hook; the statistics stay as they are."""
        self.attached = False
        _detach(self._handles, self._watching)

    def live(self, owned: Collection[int]) -> list[LiveLayer]:
        """The layers whose weight has a gradient and is among the ``owned`` parameters (ids), as of now."""
        live = []
        for layer in self.layers:
            weight, bias = layer.weight, layer.bias
            if weight is None or id(weight) not in owned or not _has_dense_grad(weight):
                continue
            takes_part = bias is not None and id(bias) in owned and _has_dense_grad(bias)
            live.append(LiveLayer(layer, weight, bias if takes_part else None))
        return live

    def fired(self, layer: Layer) -> bool:
        """Whether a forward of the layer was ever seen."""
        return self._intakes[layer].fired

    def broken(self, layer: Layer) -> str | None:
        """Why the layer's input is no longer measured, or None."""
        return self._intakes[layer].broken

    def discard(self) -> None:
        """The gradients were zeroed, and with them go the samples they were made of."""
        for intake in self._intakes.values():
            intake.discard()

    def commit(self, live: Sequence[LiveLayer]) -> None:
        """Commit the samples behind the gradients of ``live``; what waits in other layers has lost its gradient."""
        if any((x.weight.device, x.weight.dtype) != self._seen_at.get(x.layer) for x in live):
            self._move_banks()
        by_layer = {x.layer: x for x in live}
        taken = {}
        for layer, intake in self._intakes.items():
            if layer in by_layer:
                taken[layer] = intake.take()
            else:
                intake.discard()
                intake.clear_trace()
        batches = [[taken[x][0] if x in taken else None for x in layers] for layers, _ in self._banks]
        if all(m is None for batch in batches for m in batch):
            return
        finite = [bank.gather(batch) for (_, bank), batch in zip(self._banks, batches, strict=True)]
        for k, (layers, bank) in enumerate(self._banks):
            everywhere = finite[k]
            for other in finite[:k] + finite[k + 1 :]:
                everywhere = everywhere & other.to(everywhere.device)
            active = bank.commit(everywhere)
            for i, layer in enumerate(layers):
                if layer not in taken or batches[k][i] is None:
                    continue
                self.ready.add(layer)
                projection, direction = taken[layer][1], self._intakes[layer].direction
                if projection is not None and direction is not None:
                    affine = by_layer[layer].bias is not None
                    factors = bank.factors(i)
                    q2 = power_step(projection, factors, affine=affine, direction=direction, active=active[i])
                    bank.q2[i] = torch.where(active[i], q2, bank.q2[i])

    def factors(self, layer: Layer) -> Factors:
        """P of the layer, from the statistics as committed."""
        bank, i = self._slots[layer]
        return bank.factors(i)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Copies, by layer name."""
        result = {}
        for layer in self.layers:
            bank, i = self._slots[layer]
            count = bank.count[i].clone()
            result[layer.name] = LayerStatistics(bank.means[i].clone(), bank.variances[i].clone(), count)
        return result

    def snapshot(self, layer: Layer) -> dict[str, Tensor]:
        """Everything that the layer's future steps depend on, as fresh tensors."""
        bank, i = self._slots[layer]
        snapshot = {
            "mean": bank.means[i].clone(),
            "variance": bank.variances[i].clone(),
            "count": bank.count[i].clone(),
            "mass": bank.mass[i].clone(),
            "q2": bank.q2[i].clone(),
        }
        direction = self._intakes[layer].direction
        if direction is not None:
            snapshot["direction"] = direction.clone()
        return snapshot

    def expected_shapes(self, layer: Layer) -> dict[str, torch.Size]:
        """The shapes of a snapshot; "direction" only where it is in use."""
        return {key: value.shape for key, value in self.snapshot(layer).items()}

    def restore(self, layer: Layer, snapshot: dict[str, Tensor]) -> None:
        """Put a snapshot back (of matching shapes)."""
        bank, i = self._slots[layer]
        bank.means[i].copy_(snapshot["mean"])
        bank.variances[i].copy_(snapshot["variance"])
        for key in ("count", "mass", "q2"):
            getattr(bank, key)[i] = snapshot[key]
        direction = self._intakes[layer].direction
        if direction is not None and "direction" in snapshot:
            direction.copy_(snapshot["direction"])
        self.ready.add(layer)
        bank.refresh()

    def reset(self) -> None:
        """Forget all statistics and pending samples."""
        for i, layer in enumerate(self.layers):
            intake = self._intakes[layer]
            intake.take()
            if intake.direction is not None:
                intake.direction.copy_(self._initial_direction(i, *_home(layer)))
        self.ready.clear()
        self._build_banks()

    def _initial_direction(self, i: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Where the power step of layer ``i`` starts; a bias that takes no part has no entry in it."""
        layer = self.layers[i]
        direction = initial_direction(layer.rows, i, device=device, dtype=dtype)
        bias = layer.bias
        if bias is None or id(bias) not in self._owned:
            direction[:, 0] = 0
        return direction

    def _build_banks(self) -> None:
        """One bank per device and dtype."""
        homes: dict[tuple[torch.device, torch.dtype], list[Layer]] = {}
        self._seen_at: dict[Layer, tuple[torch.device, torch.dtype]] = {}
        for layer in self.layers:
            homes.setdefault(_home(layer), []).append(layer)
            weight = layer.weight
            if weight is not None:
                self._seen_at[layer] = (weight.device, weight.dtype)
        self._banks = [
            (layers, StatisticsBank([x.rows for x in layers], self.options, device=device, dtype=dtype))
            for (device, dtype), layers in homes.items()
        ]
        self._slots = {x: (bank, i) for layers, bank in self._banks for i, x in enumerate(layers)}

    def _move_banks(self) -> None:
        """The model went to another device or dtype after it was wrapped: follow it."""
        snapshots = {layer: self.snapshot(layer) for layer in self.ready}
        self._build_banks()
        for layer, intake in self._intakes.items():
            intake.move(*_home(layer))
        for layer, snapshot in snapshots.items():
            self.restore(layer, snapshot)


def _home(layer: Layer) -> tuple[torch.device, torch.dtype]:
    """Where a layer's statistics live: its device, float32, or float64 where the layer is."""
    weight = layer.weight
    if weight is None:
        return torch.device("cpu"), torch.float32
    return weight.device, statistics_dtype(weight)


def _has_dense_grad(parameter: Tensor) -> bool:
    """Whether there is a gradient that can be changed in place; one whose entries share memory gets its own."""
    grad = parameter.grad
    if grad is None or grad.layout != torch.strided:
        return False
    if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
        parameter.grad = grad.clone(memory_format=torch.contiguous_format)
    return True


def _detach(handles: list[RemovableHandle], watching: list[Intake]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    for intake in watching:
        intake.unwatch()
    watching.clear()
