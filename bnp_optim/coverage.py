"""Which parameters are preconditioned, which pass through, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnp_optim.discovery import Layer, clean_name
from bnp_optim.sharding.fsdp import managed_parameters
from bnp_optim.tracking import Tracker

__all__ = ["Coverage", "CoverageRow", "coverage_of"]


@dataclass(frozen=True)
class CoverageRow:
    """One parameter.

    Args:
        name: As in ``model.named_parameters()``; "group 0, parameter 3" for one that the model does not have.
        shape: Its shape.
        preconditioned: Whether its gradient goes through P.
        why: How it is preconditioned, or why not.
    """

    name: str
    shape: tuple[int, ...]
    preconditioned: bool
    why: str


@dataclass(frozen=True)
class Coverage:
    """All parameters of the model and of the optimizer; ``str()`` is a table."""

    rows: tuple[CoverageRow, ...]

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> CoverageRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def preconditioned(self) -> tuple[str, ...]:
        """Names of the parameters that go through P."""
        return tuple(row.name for row in self.rows if row.preconditioned)

    def __str__(self) -> str:
        head = ("parameter", "shape", "gradient", "how, or why not")
        cells = [
            (r.name, "×".join(map(str, r.shape)), "preconditioned" if r.preconditioned else "passed through", r.why)
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
            for line in (head, *cells)
        ]
        lines.insert(1, "  ".join("-" * w for w in (*widths, max(len(c[3]) for c in (head, *cells)))))
        return "\n".join([*lines, f"{len(self.preconditioned)} of {len(self.rows)} parameters preconditioned"])


def coverage_of(model: nn.Module, tracker: Tracker, groups: Iterable[dict[str, Any]], *, started: bool) -> Coverage:
    """What ``tracker`` does with the parameters of ``model`` and of the optimizer's ``groups``.

    Before the first step (``started`` False) that is what it is going to do; afterwards a layer whose input was never
    seen, such as attention's ``out_proj`` in a compiled graph, passes through.
    """
    owned = {id(p) for group in groups for p in group["params"]}
    role: dict[int, str] = {}
    waiting: dict[int, str] = {}
    sharded = {id(m.unsharded): m.sharded for m in managed_parameters(model) if m.unsharded is not None}
    parameters = [(clean_name(name), sharded.get(id(p), p)) for name, p in model.named_parameters()]
    names = {id(p): name for name, p in parameters}
    for layer in tracker.layers:
        weight, bias = layer.weight, layer.bias
        if weight is None or id(weight) not in owned or not weight.requires_grad:
            continue
        if started and layer not in tracker.ready:
            broken = tracker.broken(layer)
            why = f"no longer measured ({broken})" if broken else "its layer's input was never seen so far"
            waiting |= {id(p): why for p in (weight, bias) if p is not None}
            continue
        takes_part = bias is not None and id(bias) in owned and bias.requires_grad
        role[id(weight)] = ("P" if takes_part else f"rank-one P: {_why_alone(layer, owned)}") + _state(layer, tracker)
        if bias is not None and takes_part:
            role[id(bias)] = f"P, with {names.get(id(weight), layer.name)}"
    rows = []
    for name, p in parameters:
        shape = () if is_lazy(p) else tuple(p.shape)
        why = role.get(id(p)) or waiting.get(id(p)) or _why_not(p, tracker, owned)
        rows.append(CoverageRow(name, shape, id(p) in role, why))
    known = names.keys()
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in known:
                rows.append(
                    CoverageRow(f"group {g}, parameter {i}", tuple(p.shape), False, "no parameter of the model")
                )
    return Coverage(tuple(rows))


def _state(layer: Layer, tracker: Tracker) -> str:
    broken = tracker.broken(layer)
    if broken:
        return f"; no longer measured ({broken})"
    return "" if layer in tracker.ready else "; no samples yet, passes through until then"


def _why_alone(layer: Layer, owned: set[int]) -> str:
    bias = layer.bias
    if bias is None:
        without = all(use.part.find(use.module, use.part.bias) is None for use in layer.uses)
        return "no bias" if without else "its tied biases differ"
    return "its bias is frozen" if not bias.requires_grad else "its bias is not in this optimizer"


def _why_not(parameter: Tensor, tracker: Tracker, owned: set[int]) -> str:
    if not parameter.requires_grad:
        return "frozen"
    if id(parameter) not in owned:
        return "not in this optimizer's parameter groups"
    return tracker.reasons.get(id(parameter), "its layer's weight is not in this optimizer, or frozen")
