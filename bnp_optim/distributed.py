"""The processes that train one model together: who they are, and that they mean the same.

Their samples of a step are pooled by one collective (:mod:`bnp_optim.exchange`), so that statistics, and with equal
gradients parameters, are the same on all ranks to the last bit. Before the first exchange, and when a rank's layers
change, the ranks compare what they have: different layers or options end in the same error everywhere, not in a
collective that waits forever.
"""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from bnp_optim.exchange import CHANGED, FAILED, WELL, Batches, Exchange, Shared, Shelves
from bnp_optim.sharding.meshes import NOT_SHARDED, sharing_group

__all__ = ["Ranks", "Synchronization", "checked_group", "group_for"]


class Synchronization(NamedTuple):
    """What a step exchanges with other processes.

    Args:
        ranks: Processes that share their samples.
        bytes: What each of them contributes to the one collective of a step: 8 per input channel of float32 layers,
            and 16 per layer for the counts.
    """

    ranks: int
    bytes: int


def group_for(explicit: Any, wrapper: nn.Module | None, model: nn.Module) -> Any:
    """The process group that shares samples, or None for a process that trains alone.

    In this order: the user's; that of the DistributedDataParallel around the model; of a sharded model, what its
    meshes say; the default group (trainers hand out the module inside their wrapper).

    Raises:
        ValueError: if the model's meshes do not tell.
    """
    if explicit is not None:
        group = explicit
    elif wrapper is not None:
        group = wrapper.process_group
    else:
        group = sharing_group(model)
        group = torch.distributed.group.WORLD if group is NOT_SHARDED else group
    return group if group is not None and group.size() > 1 else None


def checked_group(group: Any) -> Any:
    """Refuse what is no process group of this process."""
    if group is not None:
        kind = getattr(torch.distributed, "ProcessGroup", None)
        if kind is None or not isinstance(group, kind):
            raise TypeError(
                f"process_group is {group!r}, it must be a torch.distributed.ProcessGroup that this process is a "
                "member of, or None for the default: see torch.distributed.new_group"
            )
    return group


class Ranks:
    """The processes that train the model with this one; looked up by the steps, since trainers start them late.

    A copy keeps the group that was given. A pickle cannot, and forgets it; but who was alone stays alone.

    Args:
        group: The user's process group, or None.
        alone: Whether to share nothing, whatever there is.
    """

    def __init__(self, group: Any = None, *, alone: bool = False) -> None:
        self.explicit = group
        self._alone = alone or (group is not None and group.size() == 1)
        self._default: Any = None  # the default group for which the next two were found
        self._group: Any = None
        self._wrapper: Callable[[], nn.Module | None] = lambda: None
        self._exchange: Exchange | None = None
        self._agreed: dict[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self.explicit, alone=self._alone)

    def __reduce__(self) -> tuple[Callable[..., Ranks], tuple[bool]]:
        return _forgetful, (self._alone,)

    def group(self, model: nn.Module) -> Any:
        """The group that this step's samples are shared in, or None.

        Raises:
            RuntimeError: inside DistributedDataParallel's ``join()``.
        """
        if self._alone or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        default = torch.distributed.group.WORLD
        if default is not self._default:
            wrapper = _wrapper_of(model) if torch.distributed.get_world_size() > 1 else None
            self._default, self._group = default, group_for(self.explicit, wrapper, model)
            self._exchange = None
            if wrapper is not None:
                self._wrapper = weakref.ref(wrapper)
        wrapper = self._wrapper()
        if self._group is not None and getattr(getattr(wrapper, "_join_config", None), "enable", False):
            raise RuntimeError(
                "DistributedDataParallel.join() lets ranks stop early, but every rank must take part in a step's "
                "exchange of statistics: give all ranks equally many batches (DistributedSampler, drop_last), "
                "an empty one where a rank has none"
            )
        return self._group

    @property
    def synchronization(self) -> Synchronization | None:
        """What a step exchanges, as of the last one."""
        if self._group is None or self._exchange is None:
            return None
        return Synchronization(self._group.size(), self._exchange.bytes)

    def share(
        self,
        shelves: Shelves,
        batches: Batches,
        *,
        on_host: bool,
        error: str | None,
        about: Mapping[str, Any],
        steps: int,
    ) -> Shared:
        """The samples of all ranks, in place of this one's ``batches``.

        Args:
            shelves: Where the layers are kept.
            batches: This rank's samples.
            on_host: Whether the host may read what depends on the data.
            error: Why this rank cannot go on, if so.
            about: What must be the same on all ranks, besides the layers.
            steps: Taken so far; like the statistics so far, the same on all ranks at the beginning.

        Raises:
            ValueError: on all ranks, if they have different layers or options, or if one of them has an ``error``.
            RuntimeError: if another rank has ended.
        """
        status = WELL if error is None else FAILED
        exchange = self._exchange
        if exchange is None:
            self._agree(_layers(shelves, about), {"an error": str(error), "steps": str(steps)} | _statistics(shelves))
            if error is not None:
                raise ValueError(error)
            exchange = Exchange(shelves, self._group, on_host=on_host)
        elif exchange.shelves is not shelves:
            changed = _layers(shelves, about) != self._agreed
            if changed and on_host:
                status = status or CHANGED  # by the old buffers, since only all ranks together can go to new ones
            else:
                if changed:  # where nobody reads what ranks say, all must have changed at once
                    self._agree(_layers(shelves, about))
                exchange = Exchange(shelves, self._group, on_host=on_host)
        while True:
            said: list[int]
            shared: Shared | None
            said, shared = self._together(exchange, batches, status)
            self._exchange = exchange
            if FAILED in said or error is not None:
                raise ValueError(error or f"rank {_names(self._group)[said.index(FAILED)]} cannot go on: see its error")
            if shared is not None:
                return shared
            self._agree(_layers(shelves, about))
            status, exchange = WELL, Exchange(shelves, self._group, on_host=on_host)

    def _agree(self, *parts: Mapping[str, str]) -> None:
        """Raise the same error on all ranks if they differ in anything."""
        mine = {key: value for part in parts for key, value in part.items()}
        digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
        if len(set(self._gathered(digest))) > 1:
            everybodys = self._gathered(mine)
            raise ValueError(_difference(everybodys, _names(self._group)))
        self._agreed = dict(parts[0])

    def _gathered(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self._group.size()
        self._together(torch.distributed.all_gather_object, found, mine, group=self._group)
        return found

    def _together(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            raise RuntimeError(
                "BNPreconditioner could not exchange statistics with the other ranks: one of them has ended, or does "
                "not call step() as often as this one. Ranks that train on their own need a process_group of their "
                "own rank alone; after a rank has failed, restart all from a checkpoint"
            ) from error


def _forgetful(alone: bool) -> Ranks:
    return Ranks(alone=alone)


def _names(group: Any) -> list[int]:
    """The group's members as the user counts them."""
    return list(torch.distributed.get_process_group_ranks(group))


def _wrapper_of(model: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel that the model is, has, or is in; which knows it, but not the other way round."""
    ddp = nn.parallel.DistributedDataParallel
    inside = [m for m in model.modules() if isinstance(m, ddp)]
    if inside:
        return inside[0]
    for found in gc.get_objects():
        if issubclass(type(found), ddp) and any(m is model for m in found.modules()):
            return found  # type: ignore[no-any-return]
    return None


def _difference(everybodys: Iterable[Mapping[str, str]], names: list[int]) -> str:
    """What is different, by the first rank that differs from the first."""
    first, *others = everybodys
    for name, other in zip(names[1:], others, strict=True):
        for key in dict.fromkeys((*first, *other)):
            if first.get(key) != other.get(key):
                return (
                    f"ranks differ in {key}: rank {names[0]} has {first.get(key, 'none')}, rank {name} has "
                    f"{other.get(key, 'none')}. Build the same model and optimizer on all ranks, and load the same "
                    "checkpoint; ranks that train on their own need a process_group of their own rank alone"
                )
    raise AssertionError("digests differ, contents do not")


def _layers(shelves: Shelves, about: Mapping[str, Any]) -> dict[str, str]:
    """What must always be the same on all ranks."""
    found = {key: repr(value) for key, value in about.items()}
    for place in (place for shelf in shelves for place in shelf):
        layer, weight = place.layer, place.layer.weight
        kind = type(layer.uses[0].module).__name__
        what = "" if weight is None else f" {tuple(weight.shape)} {weight.dtype} on {weight.device.type}"
        bias = "without" if layer.bias is None else "with"
        found[f"layer {layer.name!r}"] = f"{kind}{what} {bias} bias, {layer.rows}"
    return found


def _statistics(shelves: Shelves) -> dict[str, str]:
    """What must be the same on all ranks when they start."""
    found = {}
    for place in (place for shelf in shelves for place in shelf):
        mean, variance, count = vars(place.bank.statistics(place.row)).values()
        sums = ", ".join(f"{name} {float(x.double().sum())!r}" for name, x in (("Σμ", mean), ("Σσ²", variance)))
        found[f"statistics of layer {place.layer.name!r}"] = f"{int(count)} observations, {sums}"
    return found
