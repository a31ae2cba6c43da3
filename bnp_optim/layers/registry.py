"""Which adapter serves a module: by its class, or by the name of a class that need not be installed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from bnp_optim.layers.base import ModuleAdapter

__all__ = ["Match", "adapter_for", "register_by_name", "register_layer"]

_REGISTRY: dict[type[nn.Module], ModuleAdapter] = {}
_BY_NAME: dict[tuple[str, str], ModuleAdapter] = {}


class Match(NamedTuple):
    """What was found for a module.

    Args:
        adapter: The adapter.
        exact: Whether it was registered for this very class. A subclass may do something else with its weight.
    """

    adapter: ModuleAdapter
    exact: bool


def register_layer(module_type: type[nn.Module], adapter: ModuleAdapter) -> None:
    """Teach the preconditioner a layer type; subclasses of ``module_type`` are matched too.

    A later registration for the same type replaces the earlier one. Wrappers that exist already keep what they
    found; call their ``rescan()``.

    Raises:
        TypeError: if ``module_type`` is no ``nn.Module`` class or ``adapter`` no :class:`ModuleAdapter`.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if not isinstance(adapter, ModuleAdapter):
        raise TypeError(
            f"adapter must be an instance of LayerAdapter (or ModuleAdapter), got {adapter!r}: pass MyAdapter()"
        )
    _REGISTRY[module_type] = adapter


def register_by_name(package: str, class_name: str, adapter: ModuleAdapter) -> None:
    """The same for a class of a package that is not imported here."""
    _BY_NAME[package, class_name] = adapter


def adapter_for(module: nn.Module) -> Match | None:
    """The adapter of the nearest registered class of ``module``, or None."""
    for cls in type(module).__mro__:
        found = _REGISTRY.get(cls) or _BY_NAME.get((cls.__module__.partition(".")[0], cls.__name__))
        if found is not None:
            return Match(found, cls is type(module))
    return None
