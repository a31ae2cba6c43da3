"""Which streaming runs there are, and which rates the tuning seed chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.progressive import StreamRun
from benchmarks.evidence.streams import Inputs

NETS = ("SGD", "BNP-SGD", "AdamW", "BNP-AdamW", "ON + SGD", "ON + AdamW")
INPUTS: tuple[Inputs, ...] = ("raw", "scaled")
TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
QUICK = {"ImageSegments": 1000, "Phishing": 1250}


def all_runs(streams: Mapping[str, int], nets: Sequence[str], seeds: Sequence[int]) -> list[StreamRun]:
    """Every net at every rate."""
    return [
        StreamRun(stream, inputs, CONTENDERS[net], rate, seed, samples)
        for net in nets
        for stream, samples in streams.items()
        for inputs in INPUTS
        for seed in seeds
        for rate in CONTENDERS[net].rates
    ]


def chosen_rates(
    results: Mapping[StreamRun, Mapping[str, Any]], streams: Mapping[str, int], nets: Sequence[str]
) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Per (net, stream, inputs): its rate for this stream, and its one rate for all streams.

    The one rate has the least mean of log(error / least error of the net on that stream). Nets whose grid is not
    complete are left out.
    """
    chosen = {}
    for net in nets:
        rates = CONTENDERS[net].rates
        grid = {
            (stream, inputs): [
                results.get(StreamRun(stream, inputs, CONTENDERS[net], r, TUNING_SEED, samples), {}).get("error")
                for r in rates
            ]
            for stream, samples in streams.items()
            for inputs in INPUTS
        }
        if any(error is None for errors in grid.values() for error in errors):
            continue
        excess = [sum(math.log((g[i] + 1e-3) / (min(g) + 1e-3)) for g in grid.values()) for i in range(len(rates))]
        one = rates[excess.index(min(excess))]
        for place, errors in grid.items():
            chosen[(net, *place)] = rates[errors.index(min(errors))], one
    return chosen
