"""Statistics in a ``state_dict``: merged into the base's on the way out, split off on the way in.

They travel per parameter, as ``state[i]["bnp_mean"]`` and so on of the layer's weight: clients that rename or
reshard optimizer state keep per-parameter entries. They never enter the base's own ``state``: Adam takes a
parameter with any state for one that has stepped, and ``load_state_dict`` would cast them to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bnp_optim.discovery import Layer
from bnp_optim.sharding.blocks import local
from bnp_optim.tracking import Tracker

__all__ = ["FORMAT_VERSION", "Loaded", "check_form", "is_rehearsal", "merge", "split"]

FORMAT_VERSION = 2  # a new one brings its reader of the old, and a file in tests/data (see tests/stored.py)
_PREFIX = "bnp_"
_REQUIRED = ("mean", "variance", "count", "mass", "q2")


class Loaded(NamedTuple):
    """A checkpoint taken apart.

    Args:
        base: What the base optimizer loads.
        snapshots: Statistics by layer.
        steps: Steps taken, modulo ``stat_interval``; 0 if the checkpoint does not say.
        foreign: Whether it looks like a checkpoint of the plain base, without a trace of statistics.
        form: "gradient" or "two_sided": where the base's moments were collected. From format 2 on.
        version: Of the format; 0 if the checkpoint does not say.
    """

    base: dict[str, Any]
    snapshots: dict[Layer, dict[str, Tensor]]
    steps: int
    foreign: bool
    form: str | None
    version: int


def is_rehearsal(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether a step without samples is the one that torch.distributed.checkpoint takes so that the base has a state.

    That has zero learning rates and zero gradients, may be taken by one rank alone, and is no step of the training.
    """
    groups = list(groups)
    rates = [group.get("lr", 1) for group in groups]
    if any((isinstance(r, Tensor) and r.is_cuda) or float(r) != 0 for r in rates):
        return False
    return not any(p.grad is not None and bool(local(p.grad).any()) for group in groups for p in group["params"])


def merge(
    base: Mapping[str, Any],
    groups: Iterable[dict[str, Any]],
    tracker: Tracker,
    header: Mapping[str, Any],
    *,
    started: bool,
) -> dict[str, Any]:
    """The base's ``state_dict()`` with the statistics in it; ``base`` is not changed.

    The "steps" of ``header`` are modulo ``stat_interval``, hence 0 unless that is above 1: torch.distributed.checkpoint
    drops what belongs to no parameter. ``started`` says whether the base has taken a step, be it not of the training.
    """
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in base["state"].items()}
    index = _indices(groups)
    stateless = not state and started
    for layer in tracker.layers:
        weight = layer.weight
        if weight is None or id(weight) not in index:
            continue
        i = index[id(weight)]
        # NOTE: torch.distributed.checkpoint fills a freshly stepped optimizer and wants every entry there, cold ones
        # too; but where the base has no state for a parameter, a lone entry of ours would make Adam fail
        if layer in tracker.ready or i in state or stateless:
            entries = {_PREFIX + key: value for key, value in tracker.snapshot(layer).items()}
            state.setdefault(i, {}).update(entries)
    if stateless and state:
        state = {i: state.get(i, {}) for i in sorted(set(index.values()))}
    return {**base, "state": state, "bnp": {"version": FORMAT_VERSION, **header}}


def split(state_dict: Mapping[str, Any], groups: Iterable[dict[str, Any]], tracker: Tracker) -> Loaded:
    """Take ``state_dict`` apart and check it against the layers at hand; nothing is changed.

    Raises:
        ValueError: if it holds statistics of other layers or shapes, or of a newer format, or is damaged.
    """
    header = state_dict.get("bnp", {"version": FORMAT_VERSION, "steps": 0, "form": None})
    least = {"version": 1, "steps": 0}
    whole = isinstance(header, dict) and all(_whole(header.get(key), low) for key, low in least.items())
    if not whole or header.get("form") not in (None, "gradient", "two_sided"):
        raise ValueError(
            f"state_dict['bnp'] is {header!r}, it must hold whole numbers 'version' (at least 1) and 'steps' (at "
            "least 0), and a 'form', 'gradient' or 'two_sided', if any: it is damaged, save it anew"
        )
    if header["version"] > FORMAT_VERSION:
        raise ValueError(
            f"state_dict has statistics in format version {header['version']}, this bnp_optim reads up to "
            f"{FORMAT_VERSION}: upgrade bnp_optim to load it"
        )
    # like torch.optim: the saved ids, numbers or names, stand for the parameters in the order of the groups
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    mine = [id(p) for group in groups for p in group["params"]]
    layer_of = {id(layer.weight): layer for layer in tracker.layers if layer.weight is not None}
    layer_at = {key: layer_of[p] for key, p in zip(saved, mine, strict=False) if p in layer_of}

    travelled = False
    base_state: dict[Any, Any] = {}
    snapshots: dict[Layer, dict[str, Tensor]] = {}
    for key, value in state_dict["state"].items():
        if not isinstance(value, dict):
            base_state[key] = value
            continue
        ours = {k.removeprefix(_PREFIX): v for k, v in value.items() if str(k).startswith(_PREFIX)}
        rest = {k: v for k, v in value.items() if not str(k).startswith(_PREFIX)}
        if rest:
            base_state[key] = rest
        if ours:
            if key not in layer_at:
                raise ValueError(
                    f"state_dict holds statistics for parameter {key}, which is not the weight of a preconditioned "
                    "layer here: build the model and wrap it with the same layers (and skip=) as when it was saved"
                )
            _check(layer_at[key], ours, tracker)
            if int(ours["count"]) > 0:
                snapshots[layer_at[key]] = ours
            travelled = True
    base = {k: v for k, v in state_dict.items() if k != "bnp"} | {"state": base_state}
    foreign = not travelled and "bnp" not in state_dict and bool(tracker.layers)
    version = header["version"] if "bnp" in state_dict else 0
    return Loaded(base, snapshots, header["steps"], foreign, header.get("form"), version)


def check_form(loaded: Loaded, form: str, *, chosen: bool, adaptive: bool) -> None:
    """Refuse a base's moments that were collected in the other form: they are in other coordinates.

    Files of format 1 do not say in which. "auto" was the gradient form around SGD with momentum then; who passes a
    ``mode`` (``chosen``) is believed.

    Raises:
        ValueError: naming the ``mode`` to pass.
    """
    saved = loaded.form
    if loaded.version == 1 and not chosen and not adaptive:
        saved = "gradient"
    entries = [e for e in loaded.base["state"].values() if isinstance(e, dict)]
    moments = any(isinstance(v, Tensor) and v.dim() for e in entries for v in e.values())
    if saved not in (None, form) and moments:
        raise ValueError(
            f"state_dict was saved in the form {saved!r}, and this optimizer has {form!r}: the base's moments in it "
            f"are in other coordinates. Pass mode={saved!r}"
        )


def _check(layer: Layer, snapshot: Mapping[str, Tensor], tracker: Tracker) -> None:
    for key in dict.fromkeys((*_REQUIRED, *snapshot)):
        if not isinstance(snapshot.get(key), Tensor):
            raise ValueError(
                f"state_dict has {snapshot.get(key)!r} for {_PREFIX}{key} of layer {layer.name!r}, where a tensor "
                "belongs: it is damaged, save it anew"
            )
    for key, shape in tracker.expected_shapes(layer).items():
        found = snapshot[key].shape if key in snapshot else shape
        if found != shape:
            raise ValueError(
                f"state_dict has {_PREFIX}{key} of shape {tuple(found)} for layer {layer.name!r}, which needs "
                f"{tuple(shape)}: load it into the model that it was saved from"
            )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _indices(groups: Iterable[dict[str, Any]]) -> dict[int, int]:
    """Parameter id → its number in ``state_dict()``, as torch.optim counts."""
    parameters = [p for group in groups for p in group["params"]]
    index: dict[int, int] = {}
    for i, p in enumerate(parameters):
        index.setdefault(id(p), i)
    return index
