"""Which streaming runs there are, and which rates the tuning seed chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.progressive import StreamRun
from benchmarks.evidence.streams import Inputs

_BNP = tuple(f"BNP-{base}{fold}" for base in ("SGD", "momentum", "AdamW") for fold in ("", ", folded"))
_CLIPPED = "BNP-momentum, clipped, folded"
_FOLLOWING = tuple(f"BNP-{of}, following, folded" for of in ("SGD", "momentum", "momentum, clipped", "AdamW"))
NETS = (
    *("SGD", *_BNP[:2], _FOLLOWING[0], "momentum", *_BNP[2:4], _CLIPPED, *_FOLLOWING[1:3]),
    *("AdamW", *_BNP[4:], _FOLLOWING[3], "ON + SGD", "ON + AdamW"),
)
FOLDED, FOLD_AFTER = ", folded", 20
INPUTS: tuple[Inputs, ...] = ("raw", "scaled")
TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
QUICK = {"ImageSegments": 1000, "Phishing": 1250}


def rates_of(net: str) -> tuple[float, ...]:
    """Its grid."""
    return CONTENDERS[net.removesuffix(FOLDED)].rates


def run_of(net: str, stream: str, inputs: Inputs, rate: float, seed: int, samples: int) -> StreamRun:
    """A run of one of NETS; the folded ones call :func:`bnp_optim.fold_normalization` after FOLD_AFTER samples."""
    contender, fold = CONTENDERS[net.removesuffix(FOLDED)], FOLD_AFTER if net.endswith(FOLDED) else 0
    return StreamRun(stream, inputs, contender, rate, seed, samples, fold)


def net_of(run: StreamRun) -> str:
    """The reverse."""
    return run.contender.name + FOLDED * bool(run.fold)


def all_runs(streams: Mapping[str, int], nets: Sequence[str], seeds: Sequence[int]) -> list[StreamRun]:
    """Every net at every rate."""
    return [
        run_of(net, stream, inputs, rate, seed, samples)
        for net in nets
        for stream, samples in streams.items()
        for inputs in INPUTS
        for seed in seeds
        for rate in rates_of(net)
    ]


class Rates(NamedTuple):
    """Of a net on a stream, all chosen on the tuning seed.

    Args:
        tuned: Best on this stream.
        one: The one rate for all streams, raw and scaled.
        kind: The one rate for all streams with the same inputs.
    """

    tuned: float
    one: float
    kind: float


def chosen_rates(
    results: Mapping[StreamRun, Mapping[str, Any]], streams: Mapping[str, int], nets: Sequence[str]
) -> dict[tuple[str, str, str], Rates]:
    """Per (net, stream, inputs); nets whose grid is not complete are left out.

    One rate has the least mean of log(error / least error of the net on that stream).
    """
    chosen = {}
    for net in nets:
        rates = rates_of(net)
        grid = {
            (stream, inputs): [
                results.get(run_of(net, stream, inputs, r, TUNING_SEED, samples), {}).get("error") for r in rates
            ]
            for stream, samples in streams.items()
            for inputs in INPUTS
        }
        if any(error is None for errors in grid.values() for error in errors):
            continue

        def one_rate(grids: Sequence[Sequence[float]], rates: Sequence[float] = rates) -> float:
            excess = [sum(math.log((g[i] + 1e-3) / (min(g) + 1e-3)) for g in grids) for i in range(len(rates))]
            return rates[excess.index(min(excess))]

        one = one_rate(list(grid.values()))
        kinds = {inputs: one_rate([g for place, g in grid.items() if place[1] == inputs]) for inputs in INPUTS}
        for (stream, inputs), errors in grid.items():
            chosen[net, stream, inputs] = Rates(rates[errors.index(min(errors))], one, kinds[inputs])
    return chosen


def without_curve(
    results: Mapping[StreamRun, Mapping[str, Any]], streams: Mapping[str, int], nets: Sequence[str]
) -> list[StreamRun]:
    """Runs at the one rate of which only the error was published, at a time when another rate was the one."""
    chosen = chosen_rates(results, streams, nets)
    return [
        run
        for run, result in results.items()
        if (rates := chosen.get((net_of(run), run.stream, run.inputs)))
        and run.learning_rate == rates.one
        and "blocks" not in result
    ]
