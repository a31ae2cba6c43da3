"""CombinedOptimizer: several optimizers over disjoint parameters, seen as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bnp_optim.bases import become_optimizer, enter, leave, needs_closure
from bnp_optim.preconditioner import BNPreconditioner

__all__ = ["CombinedOptimizer"]


class CombinedOptimizer(Optimizer):
    """One ``torch.optim.Optimizer`` made of several over disjoint parameters, such as Muon and AdamW.

        muon = torch.optim.Muon(matrices, lr=1e-2)
        adamw = torch.optim.AdamW(others, lr=1e-3)
        optimizer = CombinedOptimizer([muon, adamw])
        optimizer = BNPreconditioner(optimizer, model)  # ties each weight to its bias, whoever steps them

    ``param_groups`` are the optimizers' own dicts in their order (the list is made anew at each access: add groups
    with ``add_param_group``); ``state`` is a view of theirs; ``state_dict()`` is flat, as if one optimizer held all
    groups. Schedulers act on all groups. ``OneCycleLR`` and ``CyclicLR`` cycle momenta only where all optimizers call
    it alike (``momentum`` or ``betas``); otherwise they say so: pass ``cycle_momentum=False``, or schedule each
    optimizer by itself, which works too. Step hooks of this optimizer and of each part fire once per step, global
    ones once in all.

    Around it, :class:`BNPreconditioner` takes the two-sided form if any of the optimizers wants it.

    Args:
        optimizers: At least one; kept, as a tuple, in ``optimizers``. Any but closure-driven ones (LBFGS) and
            BNPreconditioners: combine the plain optimizers and wrap the combination.

    Raises:
        TypeError: if ``optimizers`` is no collection of optimizers, or holds one of those.
        ValueError: if it is empty or two of them hold the same parameter.
    """

    optimizers: tuple[Optimizer, ...]

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        if isinstance(optimizers, Optimizer) or not isinstance(optimizers, Iterable):
            raise TypeError(f"optimizers must be a list of optimizers, got {type(optimizers).__name__}: write [...]")
        parts = tuple(optimizers)
        if not parts:
            raise ValueError("optimizers is empty: give at least one torch.optim.Optimizer")
        for i, part in enumerate(parts):
            _check_part(i, part)
        _check_disjoint(parts)
        self.__setstate__({"optimizers": parts})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizers = state["optimizers"]
        become_optimizer(self)

    @property
    def _bnp_parts(self) -> tuple[Optimizer, ...]:
        """What the wrapper looks into, unless a subclass brings an algorithm of its own."""
        own = inspect.unwrap(type(self).step) is inspect.unwrap(CombinedOptimizer.step)
        return self.optimizers if own else ()

    # Groups, state and defaults. Lightning assigns to them, so they need setters.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizers' own groups, in order."""
        return [group for part in self.optimizers for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, value: Sequence[dict[str, Any]]) -> None:
        for part, groups in zip(self.optimizers, self._distributed(value), strict=True):
            part.param_groups = groups

    @property
    def state(self) -> Any:
        """A view of the optimizers' states."""
        return _States(self.optimizers)

    @state.setter
    def state(self, value: Any) -> None:
        entries = dict(value)
        homes = {key: _States(self.optimizers).home(key) for key in entries}
        for part in self.optimizers:
            part.state.clear()
        for key, entry in entries.items():
            homes[key][key] = entry

    @property
    def defaults(self) -> dict[str, Any]:
        """What all optimizers have a default for; where they differ, the first one's. A copy."""
        common = set.intersection(*(set(part.defaults) for part in self.optimizers))
        return {key: value for key, value in self.optimizers[0].defaults.items() if key in common}

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        now = self.defaults
        changed = {key: v for key, v in value.items() if key not in now or now[key] is not v}
        for part in self.optimizers:
            part.defaults = part.defaults | changed

    def _distributed(self, groups: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """``groups`` by optimizer: each goes where it, or one of its parameters, is now; or to its old place."""
        places = [i for i, part in enumerate(self.optimizers) for _ in part.param_groups]
        home = {id(group): i for group, i in zip(self.param_groups, places, strict=True)}
        home |= {id(p): i for group, i in zip(self.param_groups, places, strict=True) for p in group["params"]}
        shares: list[list[dict[str, Any]]] = [[] for _ in self.optimizers]
        for number, group in enumerate(groups):
            homes = {home[id(x)] for x in (group, *group["params"]) if id(x) in home}
            if not homes and len(places) == len(groups):
                homes = {places[number]}
            if len(homes) != 1:
                raise ValueError(
                    f"param_groups[{number}] belongs to {len(homes)} of the combined optimizers, so where it goes is "
                    "unclear: change the groups in place, or use add_param_group"
                )
            shares[homes.pop()].append(group)
        return shares

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to one of the optimizers: that of its key "optimizer", a number or the object, else the last.

        Raises:
            ValueError: if the key names none of them, or another one holds one of the parameters already.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        part = self.optimizers[-1]
        if "optimizer" in param_group:
            part = self._named(param_group["optimizer"])
            param_group = {key: value for key, value in param_group.items() if key != "optimizer"}
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):  # of sets torch says what is wrong with them
            params = param_group["params"] = list(params)
        others = [group for other in self.optimizers if other is not part for group in other.param_groups]
        held = {id(p) for group in others for p in group["params"]}
        for entry in [params] if isinstance(params, Tensor) else params:
            p = entry[1] if isinstance(entry, tuple) else entry
            if id(p) in held:
                raise ValueError(
                    f"some parameters appear in more than one parameter group: the one of shape {tuple(p.shape)} is "
                    "in another of the combined optimizers. Leave it out"
                )
        part.add_param_group(param_group)

    def _named(self, which: Any) -> Optimizer:
        for i, part in enumerate(self.optimizers):
            if which is part or (isinstance(which, int) and not isinstance(which, bool) and which == i):
                return part
        kinds = ", ".join(f"{i} ({type(part).__name__})" for i, part in enumerate(self.optimizers))
        raise ValueError(f"param_group['optimizer'] is {which!r}: it must be one of {kinds}")

    # What an optimizer does

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let every optimizer step, in order.

        Args:
            closure: Computes the loss and its gradients; run once, with gradients enabled. Returned is its result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for run in [enter(part) for part in self.optimizers]:
            run()
        for part in self.optimizers:
            leave(part)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for part in self.optimizers:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer that holds all groups: parameters are numbered through."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = {"state": {}, "param_groups": []}
        start = 0
        for part in self.optimizers:
            saved = part.state_dict()
            keys = [key for group in saved["param_groups"] for key in group["params"]]
            number = {key: start + i for i, key in enumerate(keys)}
            state_dict["state"] |= {number.get(key, key): value for key, value in saved["state"].items()}
            for group in saved["param_groups"]:
                state_dict["param_groups"].append({**group, "params": [number[key] for key in group["params"]]})
            start += len(keys)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` of a combination of the same optimizers, in the same order.

        Raises:
            ValueError: if its groups have other sizes. Nothing is loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = state_dict["param_groups"]
        saved, mine = ([len(group["params"]) for group in x] for x in (groups, self.param_groups))
        if saved != mine:
            raise ValueError(
                f"state_dict has parameter groups of sizes {saved}, the combined optimizers have {mine}: build them "
                "over the same parameters, in the same order, as when it was saved"
            )
        known = {key for group in groups for key in group["params"]}
        start = 0
        for part in self.optimizers:
            share = groups[start : start + len(part.param_groups)]
            start += len(part.param_groups)
            others = known - {key for group in share for key in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key not in others}
            part.load_state_dict({"state": state, "param_groups": share})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(map(repr, self.optimizers))}])"


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as one; a missing entry is made where its parameter belongs."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self._parts = parts

    def home(self, key: Any) -> Any:
        """The state that holds ``key``, or in which it belongs; the first, if it is no parameter's."""
        for part in self._parts:
            if key in part.state:
                return part.state
        for part in self._parts:
            if any(p is key for group in part.param_groups for p in group["params"]):
                return part.state
        return self._parts[0].state

    def __getitem__(self, key: Any) -> Any:
        return self.home(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.home(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.home(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in part.state for part in self._parts)

    def __iter__(self) -> Iterator[Any]:
        return (key for part in self._parts for key in part.state)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)

    def get(self, key: Any, default: Any = None) -> Any:
        return self.home(key)[key] if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __repr__(self) -> str:
        return repr(dict(self))


def _check_part(i: int, part: Any) -> None:
    if not isinstance(part, Optimizer):
        raise TypeError(f"optimizers[{i}] is a {type(part).__name__}: give torch.optim.Optimizer objects")
    if isinstance(part, BNPreconditioner):
        raise TypeError(
            f"optimizers[{i}] is a BNPreconditioner: combine the plain optimizers and wrap the combination, "
            "BNPreconditioner(CombinedOptimizer([...]), model)"
        )
    if needs_closure(part):
        raise TypeError(
            f"optimizers[{i}], {type(part).__name__}, evaluates the loss several times a step, so it cannot share a "
            "step with others: use a first-order optimizer such as SGD or AdamW"
        )


def _check_disjoint(parts: Sequence[Optimizer]) -> None:
    held: dict[int, int] = {}
    for i, part in enumerate(parts):
        for number, p in enumerate(p for group in part.param_groups for p in group["params"]):
            j = held.setdefault(id(p), i)
            if j != i:
                raise ValueError(
                    f"optimizers[{j}] ({type(parts[j]).__name__}) and optimizers[{i}] ({type(part).__name__}) hold the "
                    f"same parameter, number {number} of the latter, of shape {tuple(p.shape)}: give each parameter "
                    "to one of them"
                )
