"""Find in a model what can be preconditioned, and say of everything else why not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnp_optim.layers import LayerAdapter, Match, ModuleAdapter, Part, Rows, adapter_for, checked_parts
from bnp_optim.sharding.blocks import Block, is_dtensor
from bnp_optim.sharding.fsdp import Managed, managed_parameters
from bnp_optim.sharding.layouts import block_of

__all__ = ["Findings", "Layer", "ShardedLayer", "SkipRule", "Use", "clean_name", "find_layers", "matches"]

SkipRule = type[nn.Module] | str | nn.Module
_SKIPPED = "skipped by the user"


class Use(NamedTuple):
    """A module that multiplies its input by a weight.

    Args:
        name: Of the module in the model, and what tells this weight from its others.
        module: The module, whose forward calls are watched.
        adapter: How it is read.
        exact: Whether the adapter was registered for its very class.
        number: Which of its parts the weight is.
        part: That part.
    """

    name: str
    module: nn.Module
    adapter: ModuleAdapter
    exact: bool
    number: int
    part: Part


@dataclass(eq=False)
class Layer:
    """One weight, and the modules that apply it (several where it is tied).

    Parameters are looked up anew each time: clients replace them (FSDP2, accelerate, growing heads).
    """

    uses: list[Use]
    shape: torch.Size
    block: Block | None = field(default=None, init=False, repr=False)  # of a sharded weight, what this rank holds
    _known: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        use = self.uses[0]
        # the common case, looked up at every step
        self._only = use.module if len(self.uses) == 1 and not use.part.owner else None
        self._names = use.part.weight, use.part.bias or ""

    @property
    def name(self) -> str:
        """The first use's name."""
        return self.uses[0].name

    @property
    def adapter(self) -> ModuleAdapter:
        """How its weight is seen as rows."""
        return self.uses[0].adapter

    @property
    def rows(self) -> Rows:
        """The weight's geometry."""
        return self.uses[0].part.rows

    @property
    def geometry(self) -> Rows:
        """The geometry of what this process holds of the weight."""
        return self.uses[0].part.rows

    @property
    def identity(self) -> tuple[int, str, Rows]:
        """What tells it from other layers for as long as its module lives."""
        use = self.uses[0]
        return id(use.module), use.part.label, use.part.rows

    @property
    def weight(self) -> Tensor | None:
        """The weight as it is now; None if the modules no longer share one of the shape that was found."""
        weight = self._shared(0)
        if weight is None or weight.shape != self.shape:
            return None
        if weight is not self._known:  # the check is slow, and seldom has news
            if is_traceable_wrapper_subclass(weight):
                return None
            self._known = weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias; None where there is none, or where tied weights come with different ones."""
        return self._shared(1)

    @property
    def outgrown(self) -> bool:
        """Whether the weight has another shape or kind by now, so that the layers must be looked up again."""
        weight = self._shared(0)
        return weight is not None and (weight.shape != self.shape or is_dtensor(weight))

    def _shared(self, which: int) -> Tensor | None:
        """The weight (0) or the bias (1), if all uses have the same."""
        if self._only is not None:
            return self._only._parameters.get(self._names[which])
        found = [use.part.find(use.module, (use.part.weight, use.part.bias)[which]) for use in self.uses]
        return found[0] if all(p is found[0] for p in found) else None


class ShardedLayer(Layer):
    """A layer whose weight (or bias) is a ``DTensor``.

    Under FSDP its modules hold other tensors during forward and backward; here it is always the sharded ones.
    """

    def __init__(self, uses: list[Use], shape: torch.Size, block: Block, managed: Sequence[Managed | None]) -> None:
        super().__init__(uses, shape)
        self.block: Block = block
        self.managed = tuple(managed)

    @property
    def geometry(self) -> Rows:
        """See :class:`Layer`."""
        return self.block.geometry

    @property
    def weight(self) -> Tensor | None:
        """The sharded weight; None if the modules no longer share one of the shape that was found."""
        weight = self._shared(0)
        if weight is None or weight.shape != self.shape or not (is_dtensor(weight) or is_dtensor(self.bias)):
            return None
        return weight

    @property
    def outgrown(self) -> bool:
        """See :class:`Layer`."""
        return self._shared(0) is not None  # asked only where there is no weight as it was found

    def _shared(self, which: int) -> Tensor | None:
        found, managed = super()._shared(which), self.managed[which]
        return managed.sharded if managed is not None and managed.is_one_of(found) else found


@dataclass
class Findings:
    """Layers that can be preconditioned, and for parameters (by id) that cannot, the reason.

    Args:
        lazy: Modules that will have their parameters after their first forward pass.
    """

    layers: list[Layer] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    lazy: list[nn.Module] = field(default_factory=list)


def find_layers(model: nn.Module, skip: Collection[SkipRule] = ()) -> Findings:
    """Match every module of ``model`` against the registered layer types.

    Args:
        model: Any module.
        skip: Module classes, names (as in ``named_modules``; a name covers what is inside it) or instances that
            are left alone.

    Raises:
        ValueError: if an adapter contradicts a module of the class that it was registered for.
    """
    findings = Findings()
    managed = {id(m.sharded): m for m in managed_parameters(model)}
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    candidates: dict[int, list[Use]] = {}
    for raw_name, module in model.named_modules():
        name = clean_name(raw_name)
        match = adapter_for(module)
        own = {id(p): n for n, p in module._parameters.items() if p is not None}
        for key in own:
            users.setdefault(key, []).append((name, module))
        lazy = any(is_lazy(p) for p in module._parameters.values())
        if lazy and match is not None:
            findings.lazy.append(module)
        skipped = any(matches(rule, name, module) for rule in skip)
        reason = _why_none(name, module, match, skipped, lazy)
        hidden = match is None or lazy or _computed(module, match)
        parts, why = ((), reason) if match is None or hidden else checked_parts(name, module, match)
        if reason is not None:  # it speaks for what the module applies of its children's, too
            for key in (*own, *(id(p) for part in parts for p in _both(module, part))):
                findings.reasons.setdefault(key, reason)
            continue
        assert match is not None
        for index, part in enumerate(parts):
            weight = part.find(module, part.weight)
            why_not = _why_not(weight, part, module)
            if weight is None or why_not is not None:
                why = why_not
                continue
            full = ".".join(filter(None, (name, part.label if len(parts) > 1 else "")))
            candidates.setdefault(id(weight), []).append(Use(full, module, match.adapter, match.exact, index, part))
            for p in _both(module, part):
                own.pop(id(p), None)
        for key, parameter in own.items():
            unruled = match.adapter.reason(module, parameter) or why
            findings.reasons.setdefault(key, unruled or f"no rule for the {parameter} of {type(module).__name__}")

    for key, uses in candidates.items():
        if key in findings.reasons:
            others = [(n, m) for n, m in users[key] if all(m is not u.module for u in uses)]
            reason = findings.reasons[key]
            if others and reason != _SKIPPED:
                reason = f"shared with {type(others[0][1]).__name__} {others[0][0]!r}"
        elif len({_geometry(use) for use in uses}) > 1:
            reason = "tied to a layer of another geometry"
        else:
            layer = _layer(uses, managed)
            if isinstance(layer, Layer):
                findings.layers.append(layer)
                continue
            reason = layer
        for use in uses:
            for p in _both(use.module, use.part):
                findings.reasons[id(p)] = reason
    return findings


def _layer(uses: list[Use], managed: dict[int, Managed]) -> Layer | str:
    """The layer of one weight, or why it cannot be one."""
    use = uses[0]
    weight = use.part.find(use.module, use.part.weight)
    assert weight is not None
    layer = Layer(uses, weight.shape)
    bias = layer.bias
    if not (is_dtensor(weight) or is_dtensor(bias)):
        return layer
    by_fsdp = managed.get(id(weight))
    dims = () if by_fsdp is None else by_fsdp.data_parallel_dims
    block = block_of(use.adapter, use.part.rows, weight, bias, dims)
    if isinstance(block, str):
        return block
    return ShardedLayer(uses, weight.shape, block, (by_fsdp, managed.get(id(bias))))


def clean_name(name: str) -> str:
    """A module or parameter name without the prefix of ``torch.compile``'s wrapper."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")


def _both(module: nn.Module, part: Part) -> list[Tensor]:
    found = (part.find(module, part.weight), part.find(module, part.bias))
    return [p for p in found if p is not None]


def _geometry(use: Use) -> tuple[Rows, tuple[int, ...]]:
    """What uses of one weight must agree in."""
    weight = use.part.find(use.module, use.part.weight)
    assert weight is not None
    if is_dtensor(weight):
        weight = torch.empty(weight.shape, device="meta")
    try:
        return use.part.rows, use.adapter.matrix(use.part.rows, weight).stride()
    except RuntimeError:  # a layout without a matrix view
        return use.part.rows, ()


def _why_none(name: str, module: nn.Module, match: Match | None, skipped: bool, lazy: bool) -> str | None:
    """Why no parameter of ``module`` itself is preconditioned, or None."""
    if skipped:
        return _SKIPPED
    if "parametrizations" in name.split("."):
        return "behind a parametrization"
    if match is None:
        return f"no rule for {type(module).__name__}"
    if _computed(module, match):
        return "parametrized: its weight is computed from other parameters"
    return "not initialized yet: preconditioned from its first forward pass on" if lazy else None


def _computed(module: nn.Module, match: Match) -> bool:
    """Whether to look at the module's only weight, as adapters do, would be to compute it."""
    return isinstance(match.adapter, LayerAdapter) and is_parametrized(module, match.adapter.weight_name)


def _why_not(weight: Tensor | None, part: Part, module: nn.Module) -> str | None:
    if weight is None:
        return f"{part.weight!r} is not a parameter of the {type(module).__name__} (parametrized or pruned)"
    if is_traceable_wrapper_subclass(weight) and not is_dtensor(weight):
        return f"its weight is a {type(weight).__name__}, which is not supported yet"
    if not weight.is_floating_point():
        return f"not a real floating-point weight ({str(weight.dtype).removeprefix('torch.')})"
    return None


def matches(rule: SkipRule, name: str, module: nn.Module) -> bool:
    """Whether a rule of ``skip`` speaks of ``module``, which is called ``name``."""
    if isinstance(rule, str):
        return name == rule or name.startswith(rule + ".")
    if isinstance(rule, nn.Module):
        return any(module is inner for inner in rule.modules())
    return isinstance(module, rule)
