"""How a net gets over one absurd sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from benchmarks.evidence.progressive import AFTER, StreamRun
from benchmarks.evidence.question import StreamQuestion
from benchmarks.evidence.streams import ABSURD
from benchmarks.report import dot

Results = Mapping[StreamRun, Mapping[str, Any]]


def table(question: StreamQuestion, seeds: tuple[int, ...], results: Results) -> Iterator[str]:
    """Errors AFTER the absurd sample, at the rate that is best on the stream as it is; one table per stream."""
    streams = [stream for stream, _ in question.places if stream in ABSURD]
    for source in dict.fromkeys(ABSURD[stream][0] for stream in streams):
        own = [stream for stream in streams if ABSURD[stream][0] == source]
        spans = [f"{first}–{last}" for first, last in AFTER]
        yield f"{source}: error in the samples {' and '.join(spans)} after the one that is absurd, at the rate that is"
        yield f"best on the stream as it is; †: nets that died there, of {len(seeds)}."
        yield ""
        yield "| | rate | " + " | ".join(f"{stream.removeprefix(source + ', ')}" for stream in own) + " |"
        yield "| --- | --- |" + " --- |" * len(own)
        for name, (contender, fold) in question.contenders.items():
            runs = [r for r in question.runs("full", seeds) if (r.contender, r.fold) == (contender, fold)]
            if any(r not in results for r in runs):
                continue
            calm = [r for r in runs if ABSURD[r.stream][:2] == (source, 1)]
            rate = min(contender.rates, key=lambda x: fmean(_of(results, calm, x, "error")))
            cells = [_cell(results, [r for r in runs if r.stream == stream], rate) for stream in own]
            yield f"| {name} | {rate:g} | " + " | ".join(cells) + " |"
        yield ""


def _of(results: Results, runs: list[StreamRun], rate: float, key: str) -> list[Any]:
    return [results[r][key] for r in runs if r.learning_rate == rate]


def _cell(results: Results, runs: list[StreamRun], rate: float) -> str:
    means = [dot(fmean(column)) for column in zip(*_of(results, runs, rate, "after"), strict=True)]
    dead = sum(_of(results, runs, rate, "diverged"))
    return ", ".join(means) + (f" †{dead}" if dead else "")
