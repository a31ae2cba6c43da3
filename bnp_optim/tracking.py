"""The layers of one model that one optimizer owns: their taps, their pending samples, their statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnp_optim.bank import StatisticsBank
from bnp_optim.common_scale import share_scale
from bnp_optim.discovery import Findings, Layer, ShardedLayer, SkipRule, find_layers
from bnp_optim.exchange import Batches, Shared
from bnp_optim.following import can_follow, follow
from bnp_optim.hooks import Hooks
from bnp_optim.intake import Gate, Intake
from bnp_optim.places import Home, LiveLayer, Origin, Place, dense_grad, home_of, live_shards, statistics_home
from bnp_optim.sharding.checks import check_not_sharded_since, check_whole_inputs
from bnp_optim.sharding.fsdp import reshard
from bnp_optim.sharding.localized import widened
from bnp_optim.spectral import initial_direction
from bnp_optim.statistics import LayerStatistics, StatisticsOptions, shelves
from bnp_optim.transform import Factors
from bnp_optim.units import units_of

__all__ = ["Tracker"]


class Tracker:
    """Owns hooks and statistics.

    Args:
        owned: Ids of the optimizer's parameters.
        squared: Whether the transforms apply P Pᵀ; otherwise P and Pᵀ.
        on_host: Whether the host may read numbers that depend on the data, where they are on the CPU.
        follows: Whether layers that read data follow its units.
    """

    def __init__(
        self,
        model: nn.Module,
        skip: Collection[SkipRule],
        options: StatisticsOptions,
        owned: Collection[int],
        *,
        squared: bool,
        on_host: bool = True,
        follows: bool = False,
    ) -> None:
        self.gate = Gate()
        self.gate.follows = follows
        self.options = options
        self._model = model
        self._skip = tuple(skip)
        self._squared = squared
        self._on_host = on_host
        self._hooks = Hooks(self, self.gate, options.max_observations)
        self._places: dict[Layer, Place] = {}
        reshard(model)
        self._attach(owned, self._find(owned))

    def _find(self, owned: Collection[int]) -> Findings:
        findings = find_layers(self._model, self._skip)
        if self.options.step_scale == "spectral":
            check_whole_inputs(x for x in findings.layers if id(x.weight) in owned)
        return findings

    def _attach(self, owned: Collection[int], findings: Findings) -> None:
        known = {x.identity: place.intake for x, place in self._places.items()}
        self.attached = True
        self._owned = frozenset(owned)
        self.reasons = findings.reasons
        self.awaited = any(id(p) in owned for m in findings.lazy for p in m.parameters(recurse=False))
        self.layers = [x for x in findings.layers if x.weight is not None and id(x.weight) in owned]
        self.ready: set[Layer] = set()
        self._sharded = [x for x in self.layers if isinstance(x, ShardedLayer)]
        intakes = []
        for i, layer in enumerate(self.layers):
            device, dtype = statistics_home(layer)
            intake = known.pop(layer.identity, None)  # with what waits in it
            seen = layer.rows if layer.block is None else layer.block.seen
            if intake is None or intake.rows != seen:
                intake = Intake(seen, layer.shape, self.gate, device=device, dtype=dtype)
                if self.options.step_scale == "spectral":
                    intake.direction = self._initial_direction(i, device, dtype)
            intake.shape = layer.shape
            intakes.append(intake)
            if isinstance(layer, ShardedLayer):
                intake.managed = layer.managed[0]
        self._hooks.attach(zip(self.layers, intakes, strict=True), findings.lazy)
        for intake in known.values():
            intake.stop()
        self._settle(intakes)

    def rescan(self, owned: Collection[int] | None = None) -> None:
        """Look for layers again; those that were known keep their statistics and their pending samples."""
        kept = [(layer, self.snapshot(layer)) for layer in self.layers if layer in self.ready]
        owned = self._owned if owned is None else owned
        findings = self._find(owned)  # may raise: then all stays as it is
        self._hooks.detach()
        self._attach(owned, findings)
        for old, snapshot in kept:
            for new in self.layers:
                if new.identity == old.identity:
                    self.restore(new, snapshot)

    def detach(self) -> None:
        """Remove every hook; the statistics stay as they are."""
        self.attached = False
        self._hooks.detach()
        for place in self._places.values():
            place.intake.stop()

    @property
    def sharded(self) -> bool:
        """Whether some layers are."""
        return bool(self._sharded)

    def live(self, owned: Collection[int]) -> list[LiveLayer]:
        """The layers whose weight has a gradient and is among the ``owned`` parameters (ids), as of now.

        Raises:
            RuntimeError: if the model was sharded after the optimizer was built; nothing has changed then.
        """
        live = []
        for layer, place in self._places.items():
            weight, bias = layer.weight, layer.bias
            if weight is None and self.attached and layer.outgrown:
                check_not_sharded_since(self._model, layer, owned)
                self.rescan(owned)
                return self.live(owned)
            if weight is not None and id(weight) not in owned:
                check_not_sharded_since(self._model, layer, owned)
                weight = None
            if self._sharded and isinstance(layer, ShardedLayer) and weight is not None:
                place.live = found = live_shards(layer, weight, bias if id(bias) in owned else None)
                live += [] if found is None else [found]
                continue
            weight_grad = None if weight is None else dense_grad(weight)
            if weight is None or weight_grad is None:
                place.live = None
                continue
            bias_grad = None if bias is None or id(bias) not in owned else dense_grad(bias)
            place.live = LiveLayer(layer, weight, None if bias_grad is None else bias, weight_grad, bias_grad)
            live.append(place.live)
        return live

    def release(self) -> None:
        """The step is over: hold no gradient any longer, or the next one would need memory of its own."""
        for place in self._places.values():
            place.live = place.seen = place.projection = None

    def fired(self, layer: Layer) -> bool:
        """Whether a forward of the layer was ever seen."""
        return self._places[layer].intake.fired

    def broken(self, layer: Layer) -> str | None:
        """Why the layer's input is no longer measured, or None."""
        return self._places[layer].intake.broken

    def discard(self) -> None:
        """The gradients were zeroed, and with them go the samples they were made of."""
        self.gate.era += 1

    @property
    def idle(self) -> bool:
        """Whether no sample waits for a step."""
        return not any(place.intake.batches or place.intake.traced for place in self._places.values())

    def commit(self, share: Callable[..., Shared] | None = None) -> None:
        """Commit the samples behind the gradients of the layers that ``live()`` has found.

        Args:
            share: Turns this process's samples into those of all; see :meth:`bnp_optim.distributed.Ranks.share`.

        Raises:
            ValueError: if an adapter contradicts the class that it was registered for; nothing has changed then.
        """
        error = next((p.intake.error for p in self._places.values() if p.intake.error is not None), None)
        if error is not None and share is None:
            raise ValueError(error)
        for place in self._places.values():
            weight = None if place.live is None else place.live.weight
            if weight is not None and (weight.dtype is not place.dtype or weight.device != place.device):
                self._move()
                break
        batches: Batches = [[place.take() for place in shelf] for shelf in self._shelves]
        if self._sharded:
            batches = widened(self._shelves, batches)
        counts: Sequence[Tensor | None] = [None] * len(batches)
        if share is not None and self._shelves:
            batches, counts = share(self._shelves, batches, on_host=self._reads, error=error)
        if not any(m is not None for batch in batches for m in batch):
            return
        if len(self.ready) < len(self.layers):
            # as late as this: DistributedDataParallel, built after the optimizer, hands out the first rank's
            for place in self._places.values():
                if place.layer not in self.ready:
                    place.bank.set_units(place.row, units_of(place.layer))
        banks = [shelf[0].bank for shelf in self._shelves]
        for bank, batch, n in zip(banks, batches, counts, strict=True):
            bank.propose(batch, n)
        if self.options.step_scale == "common":
            share_scale(banks)
        finite = [bank.conclude() for bank in banks]
        for shelf, bank, batch in zip(self._shelves, banks, batches, strict=True):
            everywhere = finite[0] if len(finite) == 1 else _all(finite, bank.now.q2.device)
            bank.settle(everywhere)
            if everywhere is False:
                continue
            if len(self.ready) < len(self.layers):
                # NOTE: where only the device knows whether any rank has samples, a layer without is one with P = I
                self.ready.update(
                    p.layer for p, m in zip(shelf, batch, strict=True) if m is not None and p.live is not None
                )
            if self.options.step_scale == "spectral":
                for place in shelf:
                    place.power_step(everywhere)
                bank.refresh()

    def follow_inputs(self) -> None:
        """Express the weights of layers that read data in the units of now; see :mod:`bnp_optim.following`."""
        for place in self._following:
            follow(place)

    def drop(self) -> None:
        """Let the samples behind the gradients go uncounted."""
        for place in self._places.values():
            place.take()

    def factors(self, layer: Layer) -> Factors:
        """P of the layer, from the statistics as committed."""
        place = self._places[layer]
        factors = place.bank.factors(place.row)
        return factors if layer.block is None else layer.block.factors(factors)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Copies, by layer name."""
        return {x.name: place.bank.statistics(place.row) for x, place in self._places.items()}

    def snapshot(self, layer: Layer) -> dict[str, Tensor]:
        """Everything that the layer's future steps depend on, as fresh tensors."""
        place = self._places[layer]
        snapshot = place.bank.snapshot(place.row)
        if place.intake.direction is not None:
            snapshot["direction"] = place.intake.direction.clone()
        if place.origin is not None:
            snapshot["origin"] = place.origin.snapshot()
        return snapshot

    def expected_shapes(self, layer: Layer) -> dict[str, torch.Size]:
        """The shapes of a snapshot; "direction" only where it is in use, "units" and "origin" always."""
        shapes = {key: value.shape for key, value in self.snapshot(layer).items()}
        return {**shapes, "units": shapes["mean"], "origin": torch.Size((4, *shapes["mean"]))}

    def restore(self, layer: Layer, snapshot: dict[str, Tensor]) -> None:
        """Put a snapshot back (of matching shapes)."""
        place = self._places[layer]
        place.bank.restore(place.row, snapshot)
        if place.intake.direction is not None and "direction" in snapshot:
            place.intake.direction.copy_(snapshot["direction"])
        if "origin" in snapshot:
            place.origin = Origin.of(snapshot["origin"], place.bank.now.mean)
        self.ready.add(layer)

    def reset(self) -> None:
        """Forget all statistics and pending samples."""
        for i, (layer, place) in enumerate(self._places.items()):
            place.intake.take()
            if place.intake.direction is not None:
                place.intake.direction.copy_(self._initial_direction(i, *statistics_home(layer)))
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
            homes.setdefault(statistics_home(layer), []).append(i)
        self._reads = self._on_host and all(device.type == "cpu" for device, _ in homes)
        self._shelves: list[list[Place]] = []  # the layers of each bank, by row
        for (device, dtype), members in homes.items():
            for shelf in shelves([self.layers[i].rows.statistics for i in members]):
                numbers = [members[k] for k in shelf]
                bank = StatisticsBank(
                    [self.layers[i].rows for i in numbers],
                    self.options,
                    device=device,
                    dtype=dtype,
                    squared=self._squared,
                    on_host=self._reads,
                )
                self._shelves.append(
                    [
                        Place(self.layers[i], intakes[i], bank, row, *home_of(self.layers[i].weight))
                        for row, i in enumerate(numbers)
                    ]
                )
        places = {place.layer: place for shelf in self._shelves for place in shelf}
        self._places = {x: places[x] for x in self.layers}
        follows = self.gate.follows
        self._following = [place for place in self._places.values() if follows and can_follow(place.layer)]

    def _move(self) -> None:
        """The model went to another device or dtype after it was wrapped: follow it."""
        snapshots = {layer: self.snapshot(layer) for layer in self.ready}
        before = self._places
        self._settle([place.intake for place in before.values()])
        for i, (layer, place) in enumerate(self._places.items()):
            place.live = before[layer].live
            if place.intake.direction is not None and place.intake.direction.is_meta:
                place.intake.direction = self._initial_direction(i, *statistics_home(layer))
            place.intake.move(*statistics_home(layer))
        for layer, snapshot in snapshots.items():
            self.restore(layer, snapshot)


def _all(finite: Sequence[Any], device: torch.device) -> Any:
    """Whether every bank's samples are finite, on ``device`` where it is no plain bool."""
    if all(isinstance(x, bool) for x in finite):
        return all(finite)
    return torch.stack([x.to(device) for x in finite]).all()
