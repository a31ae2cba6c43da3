"""What the checks of DistributedDataParallel share, and where they are found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.distributed import training
from tests.distributed.training import (
    MODELS,
    adamw,
    batches,
    build,
    flat,
    joined,
    parallel,
    same_everywhere,
    sgd,
    shared,
    statistics,
    wrap,
)

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gradient form, momentum": ("mlp", sgd, {"mode": "gradient"}),
    "momentum": ("mlp", sgd, {}),
    "two-sided AdamW": ("mlp", adamw, {}),
    "one q for all layers": ("mlp", adamw, {"step_scale": "common"}),
    "spectral": ("mlp", sgd, {"step_scale": "spectral", "mode": "gradient"}),
    "spectral, two-sided": ("wide", sgd, {"step_scale": "spectral"}),
    "fan_in, paper": ("wide", sgd, {"step_scale": "fan_in", "debias": False, "mode": "gradient"}),
    "convolutions": ("convolutions", sgd, {"mode": "gradient"}),
    "convolutions, spectral": ("convolutions", sgd, {"step_scale": "spectral"}),
    "every third step": ("mlp", sgd, {"stat_interval": 3}),
}
CHECKS: dict[str, Callable[[int, int], Any]] = {}


def check(function: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    CHECKS[function.__name__] = function
    return function


def race(case: str, sizes: Callable[[int], list[int]], group: Any = None, **ddp: Any) -> dict[str, Any]:
    """50 steps of all ranks, and of this process with all the data."""
    name, base, options = CASES[case]
    model, single = build(name), build(name)
    optimizer = wrap(model, base, process_group=group, **options)
    reference = wrap(single, base, process_group=training.alone, **options)
    front = parallel(model, **ddp)
    for parts in batches(50, MODELS[name][1], sizes):
        shared(parts, front, optimizer)
        joined(parts, single, reference)
    return {
        "same": same_everywhere(flat(model)),
        "same_statistics": same_everywhere(statistics(optimizer)),
        "from_joined": float((flat(model) - flat(single)).abs().max()),
        "counts": [int(s.count) for s in optimizer.statistics.values()],
        "expected_counts": [int(s.count) for s in reference.statistics.values()],
        "synchronization": list(optimizer.synchronization or ()),
        "flat": flat(model),
    }
