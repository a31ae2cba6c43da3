"""Find in a model what can be preconditioned, and say of everything else why not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnp_optim.layers import LayerAdapter, Rows, adapter_for

__all__ = ["Findings", "Layer", "SkipRule", "find_layers"]

SkipRule = type[nn.Module] | str | nn.Module


@dataclass(eq=False)
class Layer:
    """One weight, and the modules that apply it (several where it is tied).

    Parameters are looked up anew each time: clients replace them (FSDP2, accelerate, growing heads).
    """

    names: list[str]
    modules: list[nn.Module]
    adapter: LayerAdapter
    rows: Rows
    shape: torch.Size
    _known: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """The first module's name in the model."""
        return self.names[0]

    @property
    def weight(self) -> Tensor | None:
        """The weight as it is now; None if the modules no longer share one of the shape that was found."""
        weight = self._shared(self.adapter.weight_name)
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
        return self._shared(self.adapter.bias_name)

    def _shared(self, name: str) -> Tensor | None:
        first = self.modules[0]._parameters.get(name)
        if len(self.modules) > 1 and any(m._parameters.get(name) is not first for m in self.modules):
            return None
        return first


@dataclass
class Findings:
    """Layers that can be preconditioned, and for parameters (by id) that cannot, the reason."""

    layers: list[Layer] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)


def find_layers(model: nn.Module, skip: Collection[SkipRule] = ()) -> Findings:
    """Match every module of ``model`` against the registered layer types.

    Args:
        model: Any module.
        skip: Module classes, names (as in ``named_modules``; a name covers what is inside it) or instances that
            are left alone.
    """
    findings = Findings()
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    candidates: dict[int, list[tuple[str, nn.Module, LayerAdapter]]] = {}
    for raw_name, module in model.named_modules():
        name = clean_name(raw_name)
        skipped = any(_matches(rule, name, module) for rule in skip)
        adapter = None if skipped else adapter_for(module)
        weight = None if adapter is None else module._parameters.get(adapter.weight_name)
        reason = _why_not(name, module, adapter, weight, skipped)
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
                if reason is not None:
                    findings.reasons.setdefault(id(parameter), reason)
        if adapter is not None and weight is not None and reason is None:
            candidates.setdefault(id(weight), []).append((name, module, adapter))

    for key, group in candidates.items():
        if key in findings.reasons:
            name, other = next((n, m) for n, m in users[key] if all(m is not g[1] for g in group))
            reason = f"shared with {type(other).__name__} {name!r}"
        elif len({(g[2].rows(g[1]), type(g[2])) for g in group}) > 1:
            reason = "tied to a layer of another geometry"
        else:
            findings.layers.append(_layer(group))
            continue
        for _, module, _ in group:
            for parameter in module._parameters.values():
                if parameter is not None:
                    findings.reasons[id(parameter)] = reason
    return findings


def clean_name(name: str) -> str:
    """A module or parameter name without the prefix of ``torch.compile``'s wrapper."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")


def _layer(group: list[tuple[str, nn.Module, LayerAdapter]]) -> Layer:
    _, module, adapter = group[0]
    weight = module._parameters[adapter.weight_name]
    assert weight is not None
    return Layer([g[0] for g in group], [g[1] for g in group], adapter, adapter.rows(module), weight.shape)


def _why_not(
    name: str, module: nn.Module, adapter: LayerAdapter | None, weight: Tensor | None, skipped: bool
) -> str | None:
    """Why the parameters of ``module`` itself pass through, or None."""
    if skipped:
        return "skipped by the user"
    if "parametrizations" in name.split("."):
        return "behind a parametrization"
    if adapter is None:
        return f"no rule for {type(module).__name__}"
    if weight is not None and is_lazy(weight):
        return "not initialized yet: run one forward pass, then call rescan()"
    if weight is None:
        return f"{adapter.weight_name!r} is not a parameter of the {type(module).__name__} (parametrized or pruned)"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}, which is not supported yet"
    if not weight.is_floating_point():
        return f"not a real floating-point weight ({str(weight.dtype).removeprefix('torch.')})"
    return None


def _matches(rule: SkipRule, name: str, module: nn.Module) -> bool:
    if isinstance(rule, str):
        return name == rule or name.startswith(rule + ".")
    if isinstance(rule, nn.Module):
        return any(module is inner for inner in rule.modules())
    return isinstance(module, rule)
