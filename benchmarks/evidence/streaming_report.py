"""The streaming tables and figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.documents import compact, environment
from benchmarks.evidence.progressive import OTHERS, OtherRun, StreamRun
from benchmarks.evidence.runner import Cache
from benchmarks.evidence.streaming_plan import (
    INPUTS,
    TUNING_SEED,
    Rates,
    all_runs,
    chosen_rates,
    net_of,
    rates_of,
    run_of,
)
from benchmarks.evidence.streams import SAMPLES, load
from benchmarks.report import dot, made_with, mean_and_error

Results = Mapping[Any, Mapping[str, Any]]
Chosen = Mapping[tuple[str, str, str], Rates]
COLORS = {
    "SGD": ("#56B4E9", "--"),
    "BNP-SGD": ("#0072B2", "-"),
    "BNP-SGD, folded": ("#0072B2", ":"),
    "BNP-SGD, following, folded": ("#0072B2", "-."),
    "momentum": ("#8FD6C0", "--"),
    "BNP-momentum": ("#009E73", "-"),
    "BNP-momentum, folded": ("#009E73", ":"),
    "BNP-momentum, clipped, folded": ("#000000", ":"),
    "BNP-momentum, following, folded": ("#009E73", "-."),
    "BNP-momentum, clipped, following, folded": ("#000000", "-."),
    "AdamW": ("#E69F00", "--"),
    "BNP-AdamW": ("#D55E00", "-"),
    "BNP-AdamW, folded": ("#D55E00", ":"),
    "BNP-AdamW, following, folded": ("#D55E00", "-."),
    "ON + SGD": ("#999999", "--"),
    "ON + AdamW": ("#666666", "-."),
}


def write(
    streams: Mapping[str, int], nets: Sequence[str], seeds: Sequence[int], cache: Cache, output: Path, *, quick: bool
) -> str:
    """Write JSON, Markdown and PNG; returns the Markdown."""
    results: dict[Any, dict[str, Any]] = {**cache.found(all_runs(streams, nets, (TUNING_SEED, *seeds)))}
    chosen = chosen_rates(results, streams, nets)
    results |= cache.found([OtherRun(stream, name, n) for stream, n in streams.items() for name in OTHERS])
    document = {
        "benchmark": "streaming",
        "configuration": {
            "model": "MLP 32-32, ReLU, torch's default initialization, one step per sample",
            "samples": dict(streams),
            "full_protocol": {name: SAMPLES[name] for name in streams},
            "seeds": {"tuning": 0, "reporting": list(seeds)},
            "one_rate": {net: rates.one for (net, _, _), rates in chosen.items()},
        },
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results.values()), 1),
        "runs": [
            {"key": run.key, **run.describe(), **_name(run), "result": _slim(run, r, chosen)}
            for run, r in results.items()
        ],
    }
    stem = "streaming_quick" if quick else "streaming"
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(streams, seeds, chosen, results, document)
    (output / f"{stem}.json").write_text(compact(document) + "\n")
    (output / f"{stem}.md").write_text(text)
    if chosen:
        figure(streams, seeds, chosen, results, output / f"{stem}.png")
    return text


def _name(run: Any) -> dict[str, str]:
    return {"method": net_of(run)} if isinstance(run, StreamRun) else {}


def _slim(run: Any, result: dict[str, Any], chosen: Chosen) -> dict[str, Any]:
    """Without the course of the error but for what the figure shows: thousands of runs are published."""
    rates = chosen.get((net_of(run), run.stream, run.inputs)) if isinstance(run, StreamRun) else None
    if rates is not None and run.learning_rate != rates.one:
        return {k: v for k, v in result.items() if k != "blocks"}
    return result


def errors_of(
    net: str, stream: str, inputs: str, rate: float, samples: int, seeds: Sequence[int], results: Results
) -> list[float]:
    """Progressive errors by reporting seed."""
    runs = [run_of(net, stream, inputs, rate, s, samples) for s in seeds]  # type: ignore[arg-type]
    return [results[run]["error"] for run in runs if run in results]


def markdown(
    streams: Mapping[str, int],
    seeds: Sequence[int],
    chosen: Chosen,
    results: Results,
    document: Mapping[str, Any],
) -> str:
    """The tables, with how they were had."""
    full = ", ".join(f"{name} {SAMPLES[name]:,}" for name, n in streams.items() if n != SAMPLES[name])
    lines = [
        "# Streams",
        "",
        "Predict, then learn, batch size 1. Progressive error: the share of wrong predictions over the whole stream; "
        "on TrumpApproval the mean absolute error. Mean ± standard error over reporting seeds "
        f"({', '.join(map(str, seeds))}; of the initial weights; the streams are what they are). Less is better. "
        "Samples: "
        + ", ".join(f"{name} {n:,}" for name, n in document["configuration"]["samples"].items())
        + "."
        + (f" **Trimmed**: the full protocol has {full}." if full else ""),
        "",
        "## One rate for all streams, raw and scaled",
        "",
        "The rate with the least mean of log(error / the net's least error there), seed 0.",
        "",
        *_table(streams, seeds, chosen, results, "one"),
        "",
        "## One rate for all raw streams, one for all scaled ones",
        "",
        *_table(streams, seeds, chosen, results, "kind"),
        "",
        "## A rate for each stream",
        "",
        "The best of the grid on seed 0, in brackets; *: at the edge of the grid.",
        "",
        *_table(streams, seeds, chosen, results, "tuned"),
        "",
        "## Whole curves",
        "",
        "Mean over the reporting seeds.",
        "",
        *_grids(streams, seeds, chosen, results),
        "",
        "BNP with all its defaults; folded: the first 20 samples are predicted and kept, then fold_normalization sees "
        "them and the net learns them in their order. target scaled: by river's TargetStandardScaler, which its models "
        "get too; errors are in the original units. ON: Online Normalization after every hidden layer. scaled: river's "
        "StandardScaler, running. river's models with their defaults; the linear one sees scaled inputs always.",
        "",
        made_with(document["environment"], document["cpu_seconds"]),
        "",
    ]
    return "\n".join(lines)


def _table(
    streams: Mapping[str, int], seeds: Sequence[int], chosen: Chosen, results: Results, which: str
) -> Iterable[str]:
    nets = list(dict.fromkeys(net for net, _, _ in chosen))
    first, others = next(iter(streams)), OTHERS if which == "one" else ()
    head = [f"{net}, {chosen[net, first, 'raw'].one:g}" if which == "one" else net for net in nets]
    yield "| stream | inputs | " + " | ".join([*head, *others]) + " |"
    yield "| --- | --- |" + " --- |" * (len(nets) + len(others))
    for stream, samples in streams.items():
        for inputs in INPUTS:
            errors = {
                n: errors_of(n, stream, inputs, getattr(chosen[n, stream, inputs], which), samples, seeds, results)
                for n in nets
            }
            best = min((fmean(e) for e in errors.values() if e), default=0.0)
            texts = []
            for net, found in errors.items():
                text = "not run"
                if found:
                    mean, error = mean_and_error(found)
                    text = dot(mean) + (f" ± {dot(error)}" if len(found) > 1 else "")
                    text = f"**{text}**" if mean == best else text
                    text += "" if len(found) == len(seeds) else f", {len(found)} seeds"
                    if which != "one":
                        rate, rates = getattr(chosen[net, stream, inputs], which), rates_of(net)
                        text += f" ({rate:g}{'*' if rate in (rates[0], rates[-1]) else ''})"
                texts.append(text)
            for name in others:
                other = results.get(OtherRun(stream, name, samples))
                seen = other is not None and (inputs == "raw") != (name == "scaler + linear model")
                texts.append(dot(other["error"]) if seen and other is not None else "")
            yield f"| {stream} | {inputs} | " + " | ".join(texts) + " |"


def _grids(streams: Mapping[str, int], seeds: Sequence[int], chosen: Chosen, results: Results) -> Iterable[str]:
    nets = list(dict.fromkeys(net for net, _, _ in chosen))
    for kind in dict.fromkeys(rates_of(net) for net in nets):
        yield "| method | stream | inputs | " + " | ".join(f"{r:g}" for r in kind) + " |"
        yield "| --- | --- | --- |" + " --- |" * len(kind)
        for net in (n for n in nets if rates_of(n) == kind):
            for stream, samples in streams.items():
                for inputs in INPUTS:
                    texts = []
                    for rate in kind:
                        runs = [run_of(net, stream, inputs, rate, s, samples) for s in seeds]
                        found = [results[run] for run in runs if run in results]
                        mark = "†" * any(r["diverged"] for r in found)
                        texts.append(dot(fmean(r["error"] for r in found)) + mark if found else "not run")
                    yield f"| {net} | {stream} | {inputs} | " + " | ".join(texts) + " |"
        yield ""
    yield "†: at least one seed diverged; from there on it scores as a guess."


def figure(streams: Mapping[str, int], seeds: Sequence[int], chosen: Chosen, results: Results, path: Path) -> None:
    """Progressive error against samples: a column per stream, raw above, scaled below, each net at its one rate."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    columns = min(5, len(streams))
    rows = -(-len(streams) // columns) * 2
    grid, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.5 * rows), squeeze=False)
    for i, (stream, n) in enumerate(streams.items()):
        for j, inputs in enumerate(INPUTS):
            ax = axes[2 * (i // columns) + j, i % columns]
            for net in dict.fromkeys(net for net, _, _ in chosen):
                rate = chosen[net, stream, inputs].one
                runs = [run_of(net, stream, inputs, rate, s, n) for s in seeds]
                blocks = [results[run]["blocks"] for run in runs if "blocks" in results.get(run, ())]
                if blocks:
                    mean = np.mean(blocks, axis=0)
                    running = np.cumsum(mean) / np.arange(1, len(mean) + 1)
                    color, line = COLORS[net]
                    ax.plot(
                        np.linspace(n / len(mean), n, len(mean)), running, line, color=color, label=f"{net}, {rate:g}"
                    )
            ax.set_title(f"{stream}, {inputs}", fontsize=9)
            ax.grid(True, alpha=0.3)
            if not load(stream, inputs, n).classes:
                ax.set_yscale("log")
    for ax in axes.flat:
        if not ax.has_data():
            ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("error so far")
    for ax in axes[-1]:
        ax.set_xlabel("samples")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    grid.legend(handles, labels, loc="lower center", ncols=6 if columns > 2 else 3, frameon=False)
    grid.tight_layout(rect=(0, 0.07 if columns > 2 else 0.12, 1, 1))
    grid.savefig(path, dpi=100)
    plt.close(grid)
