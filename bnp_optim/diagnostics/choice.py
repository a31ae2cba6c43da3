"""Which modules of a model to watch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torch import nn

from bnp_optim.discovery import clean_name, find_layers

__all__ = ["LayerRule", "chosen_modules"]

LayerRule: TypeAlias = "str | type[nn.Module] | nn.Module"


def chosen_modules(model: nn.Module, layers: Iterable[LayerRule] | None) -> dict[str, nn.Module]:
    """The modules to watch by name, in the model's order.

    Raises:
        TypeError: if ``layers`` is a single rule, or one of them is of the wrong kind.
        ValueError: if a rule fits no module, or there is none to watch.
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    if layers is None:
        kept = {id(use.module) for layer in find_layers(model).layers for use in layer.uses}
        if not kept:
            raise ValueError(
                f"model is a {type(model).__name__} without a layer that BNP knows: say in layers which modules to "
                "watch, such as layers=(nn.ReLU,)"
            )
        return {name: module for name, module in modules.items() if id(module) in kept}
    if isinstance(layers, (str, type, nn.Module)):
        raise TypeError(
            f"layers is {layers!r}, it must be a sequence of names, classes or instances: write [{layers!r}]"
        )
    kept = set()
    for rule in layers:
        found = [module for name, module in modules.items() if _fits(rule, name, module)]
        if not found:
            raise ValueError(f"layers has {rule!r}, which fits no module of the model: it has {_some(modules)}")
        kept.update(map(id, found))
    if not kept:
        raise ValueError("layers is empty: name modules to watch, or leave it out for the layers that BNP knows")
    return {name: module for name, module in modules.items() if id(module) in kept}


def _fits(rule: object, name: str, module: nn.Module) -> bool:
    if isinstance(rule, str):
        return name == clean_name(rule)
    if isinstance(rule, nn.Module):
        return module is rule
    if isinstance(rule, type) and issubclass(rule, nn.Module):
        return isinstance(module, rule)
    raise TypeError(f"layers has {rule!r}, it must be a name as in named_modules(), a module class or a module")


def _some(names: Iterable[str], limit: int = 8) -> str:
    given = [repr(name) for name in names if name]
    return ", ".join(given[:limit]) + (f" and {len(given) - limit} more" if len(given) > limit else "")
