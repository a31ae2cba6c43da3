"""Which live modules own given parameters: for clients that hand an optimizer nothing but ``model.parameters()``."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from bnp_optim.discovery import clean_name

__all__ = ["Ownerless", "find_model"]


class Ownerless(nn.Module):
    """Stands for the model where no live module owns the parameters."""


def find_model(parameters: Collection[Tensor], names: Iterable[str] = ()) -> nn.Module:
    """The smallest live module that contains every module which owns one of ``parameters``.

    Of several, it is the smallest that knows all ``names``, as of modules in it: what a configuration calls
    "net.head" speaks of the module around "net".

    If no single one does, as with two networks under one optimizer, an ``nn.ModuleList`` of the smallest that
    together do; an :class:`Ownerless` if nobody owns any.

    Looks through all objects that the garbage collector knows (some .1 s in a large process), so it does not see
    modules that ``gc.freeze()`` has hidden.

    Raises:
        ValueError: if modules without a common parent own the same parameter.
    """
    wanted = {id(p) for p in parameters}
    roots, disputed = _roots(wanted, set(names))
    if disputed:  # perhaps only by what waits for the garbage collector: let go of it
        roots, disputed = [], None
        gc.collect()
        roots, disputed = _roots(wanted, set(names))
    if disputed:
        first, second = disputed
        raise ValueError(
            f"params: the {clean_name(_parameter_name(first, wanted))} of a {type(first).__name__} is also that of a "
            f"{type(second).__name__}, and no live module contains both, so the model cannot be told from the "
            "parameters: name it with model=, or drop the one that is no longer used"
        )
    if not roots:
        return Ownerless()
    return roots[0] if len(roots) == 1 else nn.ModuleList(roots)


def _roots(wanted: set[int], names: set[str]) -> tuple[list[nn.Module], tuple[nn.Module, nn.Module] | None]:
    """The smallest modules that cover all owners, and two owners of one parameter that are in none together."""
    # NOTE: the type is asked, not the object: isinstance would wake proxies and lazily imported modules
    live = [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and "_parameters" in x.__dict__]
    owners = [m for m in live if not wanted.isdisjoint(map(id, m._parameters.values()))]
    above: dict[int, list[nn.Module]] = {}
    for parent in live:
        for child in parent.__dict__.get("_modules", {}).values():
            above.setdefault(id(child), []).append(parent)

    # each candidate, a module at or above an owner, with the owners in it
    covered: dict[int, set[int]] = {}
    candidates: dict[int, nn.Module] = {}
    for owner in owners:
        waiting, seen = [owner], {id(owner)}
        while waiting:
            m = waiting.pop()
            candidates[id(m)] = m
            covered.setdefault(id(m), set()).add(id(owner))
            for parent in above.get(id(m), ()):
                if id(parent) not in seen:
                    seen.add(id(parent))
                    waiting.append(parent)

    roots: list[nn.Module] = []
    home: dict[int, int] = {}  # owner → its root
    ranks = {key: _rank(m, names) for key, m in candidates.items()}
    while left := {id(owner) for owner in owners} - home.keys():
        best = max(covered, key=lambda key: (len(covered[key] & left), *ranks[key]))
        home |= dict.fromkeys(covered[best] & left, len(roots))
        roots.append(candidates[best])

    first: dict[int, nn.Module] = {}
    for owner in owners:
        for key in wanted & set(map(id, owner._parameters.values())):
            other = first.setdefault(key, owner)
            if home[id(other)] != home[id(owner)]:
                return roots, (other, owner)
    return roots, None


def _rank(module: nn.Module, names: set[str]) -> tuple[bool, int]:
    """Better if it knows the names, and if it is small."""
    inside = [clean_name(name) for name, _ in module.named_modules()]
    return names <= set(inside), -len(inside)


def _parameter_name(module: nn.Module, wanted: Iterable[int]) -> str:
    keys = set(wanted)
    return next(name for name, p in module._parameters.items() if id(p) in keys)
