"""The layer-choices benchmark's summary, its Markdown and its figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.layer_conclusions import CONCLUSIONS, METHOD, WRITTEN
from benchmarks.report import mean_and_error

Result = dict[str, Any]
Scores = dict[int, dict[float, float]]  # by seed and rate

TITLES = {
    "cnn-no-bias": "CNN, no biases",
    "resnet8-bn": "ResNet-8 with BatchNorm, convolutions without bias",
    "resnet8": "ResNet-8 without normalization, no biases",
    "cnn": "CNN with biases",
    "text": "next token of source code",
}
# net, alternative, reference: what each question compares
QUESTIONS = {
    "1. Weights without bias: rank-one P or plain columns?": [
        ("cnn-no-bias", "columns", "bnp"),
        ("resnet8-bn", "columns", "bnp"),
        ("resnet8", "columns", "bnp"),
    ],
    "2. Zero padding: statistics of channels or of patches?": [
        ("cnn", "patch", "bnp"),
        ("cnn-no-bias", "patch", "bnp"),
    ],
    "3. Embeddings: passed through or scaled by token frequency?": [
        ("text", "frequency", "bnp"),
        ("text", "frequency", "faster"),
    ],
}
STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": "#7F7F7F", "linestyle": "--", "marker": "o"},
    "bnp": {"color": "#0072B2", "linestyle": "-", "marker": "D"},
    "columns": {"color": "#D55E00", "linestyle": "-", "marker": "^"},
    "patch": {"color": "#009E73", "linestyle": "-", "marker": "v"},
    "frequency": {"color": "#CC79A7", "linestyle": "-", "marker": "P"},
    "faster": {"color": "#E69F00", "linestyle": ":", "marker": "s"},
}


def label(net: str, base: str, variant: str) -> str:
    """A method as the tables call it."""
    if variant == "base":
        return base
    form = {"bnp": "rank-one P", "columns": "plain columns", "patch": "patch statistics"}
    if net == "cnn":
        form["bnp"] = "channel statistics"
    if net == "text":
        times = "×100" if base == "SGD" else "×10"
        form = {
            "bnp": "embedding passed through",
            "frequency": "embedding by frequency",
            "faster": f"embedding's rate {times}",
        }
    return f"BNP-{base}, {form[variant]}"


def scores_of(results: Sequence[Result], net: str, batch_size: int, base: str, variant: str) -> Scores:
    """Scores by seed and rate, of the seeds that have every rate."""
    found: Scores = {}
    for r in results:
        if (r["net"], r["batch_size"], r["base"], r["variant"]) == (net, batch_size, base, variant):
            found.setdefault(r["seed"], {})[r["learning_rate"]] = r["score"]
    rates = max((len(row) for row in found.values()), default=0)
    return {seed: row for seed, row in sorted(found.items()) if len(row) == rates}


def best_rate(scores: Scores, *, lower: bool, without: int | None = None) -> float:
    """The rate with the best mean over the seeds, or over the other seeds than ``without``, if there are any."""
    rows = [row for seed, row in scores.items() if seed != without] or list(scores.values())
    means = {rate: statistics.fmean(row[rate] for row in rows) for rate in rows[0]}
    return (min if lower else max)(means, key=means.__getitem__)


def at_best_rate(scores: Scores, *, lower: bool) -> dict[int, float]:
    """Every seed's score at the rate that is best on the *other* seeds: no seed chooses the rate it is judged at."""
    return {seed: row[best_rate(scores, lower=lower, without=seed)] for seed, row in scores.items()}


def compare(results: Sequence[Result], net: str, batch_size: int, base: str, pair: tuple[str, str]) -> Result | None:
    """``pair[0]`` minus ``pair[1]`` at each one's best rate, and averaged over the grid; paired by seed."""
    lower = net == "text"
    ours, theirs = (scores_of(results, net, batch_size, base, variant) for variant in pair)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    ours, theirs = ({s: x[s] for s in seeds} for x in (ours, theirs))
    best = [at_best_rate(x, lower=lower) for x in (ours, theirs)]
    grid = [{s: statistics.fmean(row.values()) for s, row in x.items()} for x in (ours, theirs)]
    found: Result = {"net": net, "batch_size": batch_size, "base": base, "pair": list(pair), "seeds": len(seeds)}
    for name, (a, b) in (("best", best), ("grid", grid)):
        found[name] = statistics.fmean(a.values()), statistics.fmean(b.values())
        found[f"{name}_difference"] = mean_and_error([a[s] - b[s] for s in seeds])
    found["rates"] = best_rate(ours, lower=lower), best_rate(theirs, lower=lower)
    return found


def _settings(results: Sequence[Result], net: str) -> list[tuple[int, str]]:
    sizes = sorted({r["batch_size"] for r in results if r["net"] == net}, reverse=True)
    return [(size, base) for base in ("SGD", "AdamW") for size in sizes]


def comparisons(results: Sequence[Result]) -> dict[str, list[Result]]:
    """All that the questions ask for and the runs allow, by question."""
    return {
        question: [
            found
            for net, *pair in rows
            for size, base in _settings(results, net)
            if (found := compare(results, net, size, base, (pair[0], pair[1]))) is not None
        ]
        for question, rows in QUESTIONS.items()
    }


def _pm(pair: Sequence[float], sign: str = "") -> str:
    """Mean ± standard error, where there is one."""
    mean, error = pair
    return f"{mean:{sign}.3f}" + ("" if error != error else f" ± {error:.3f}")


def rate_table(results: Sequence[Result], net: str, base: str, variants: Sequence[str]) -> list[str]:
    """Markdown: mean ± standard error of every cell, each row's best in bold."""
    cells = [r for r in results if (r["net"], r["base"]) == (net, base) and r["variant"] in variants]
    rates = sorted({r["learning_rate"] for r in cells})
    lines = [
        f"| {TITLES[net]}: {base} | batch | seeds | " + " | ".join(f"{r:g}" for r in rates) + " |",
        "| --- | --- | --- |" + " --- |" * len(rates),
    ]
    for size in sorted({r["batch_size"] for r in cells}, reverse=True):
        for variant in variants:
            scores = scores_of(results, net, size, base, variant)
            if not scores:
                continue
            best = best_rate(scores, lower=net == "text")
            texts = []
            for rate in rates:
                text = _pm(mean_and_error([row[rate] for row in scores.values()]))
                bad = sum(
                    r["diverged"]
                    for r in cells
                    if (r["batch_size"], r["variant"], r["learning_rate"]) == (size, variant, rate)
                    and r["seed"] in scores
                )
                text = f"**{text}**" if rate == best else text
                texts.append(text + (f" ({bad} diverged)" if bad else ""))
            lines.append(f"| {label(net, base, variant)} | {size} | {len(scores)} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def markdown(document: Mapping[str, Any], compared: Mapping[str, Sequence[Result]]) -> str:
    """The tables, how they were had, and what they say."""
    results, environment, configuration = document["runs"], document["environment"], document["configuration"]
    lines = ["# Layers without bias, zero padding, embeddings: three choices, measured", "", METHOD, ""]
    for question, rows in compared.items():
        nets = list(dict.fromkeys(row["net"] for row in rows))
        lines += [f"## {question}", "", CONCLUSIONS[question[0]], ""]
        lines += [
            "| net | base | batch | seeds | compared | at each one's best rate | difference | grid mean | difference |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            names = [label(row["net"], row["base"], v).partition(", ")[2] for v in row["pair"]]
            best, grid = (f"{row[k][0]:.3f} – {row[k][1]:.3f}" for k in ("best", "grid"))
            rates = f"({row['rates'][0]:g}, {row['rates'][1]:g})"
            texts = (
                TITLES[row["net"]], row["base"], str(row["batch_size"]), str(row["seeds"]), f"{names[0]} – {names[1]}",
                f"{best} {rates}", _pm(row["best_difference"], "+"), grid, _pm(row["grid_difference"], "+"),
            )  # fmt: skip
            lines.append("| " + " | ".join(texts) + " |")
        lines.append("")
        asked = QUESTIONS[question]
        for net in nets:
            variants = ["base", "bnp", *dict.fromkeys(v for n, *pair in asked if n == net for v in pair if v != "bnp")]
            for base in ("SGD", "AdamW"):
                lines += rate_table(results, net, base, variants)
    seeds = sorted({r["seed"] for r in results})
    lines += [
        f"{len(results)} of {configuration['runs_planned']} planned runs, seeds {seeds[0]}–{seeds[-1]}; "
        f"{environment['cpu']}, {environment['cores']} hyperthreads, one of them used, one thread; "
        f"Python {environment['python']}, torch {environment['torch']}, numpy {environment['numpy']}; "
        f"{environment['date'][:10]}; {document['cpu_seconds']:.0f} CPU seconds of training. "
        f"The conclusions are of the runs of {WRITTEN}.",
        "",
    ]
    return "\n".join(lines)


def write(document: Mapping[str, Any], output: Path) -> str:
    """Write the JSON and the Markdown; returns the latter."""
    compared = comparisons(document["runs"])
    text = markdown(document, compared)
    runs = ",\n".join(f"    {json.dumps(run)}" for run in document["runs"])  # a line per run
    head = json.dumps({**document, "comparisons": compared, "runs": []}, indent=2)
    (output / "layer_choices.json").write_text(head.replace('"runs": []', f'"runs": [\n{runs}\n  ]') + "\n")
    (output / "layer_choices.md").write_text(text)
    return text


def plot(results: Sequence[Result], path: Path) -> None:
    """Score over learning rate: a row per net, a column per base and batch size."""
    nets = [net for net in TITLES if any(r["net"] == net for r in results)]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(17, 3.5 * len(nets)), layout="constrained")
    for part, net in zip(figure.subfigures(len(nets), 1, squeeze=False)[:, 0], nets, strict=True):
        settings = _settings(results, net)
        axes = part.subplots(1, 4, sharey=True)
        part.suptitle(TITLES[net], fontweight="bold", x=0.01, ha="left")
        for ax, (size, base) in zip(axes, settings, strict=False):
            _panel(ax, results, net, size, base)
            if net == "text" or ax is axes[0]:  # elsewhere a row's panels show the same methods
                ax.legend(fontsize=9, framealpha=0.9, edgecolor="none")
        axes[0].set_ylabel("validation loss (nats)" if net == "text" else "test accuracy")
        for i, ax in enumerate(axes):
            if i >= len(settings):
                ax.set_axis_off()
        if net == "text":
            axes[0].set_ylim(top=4.9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(axes: Axes, results: Sequence[Result], net: str, size: int, base: str) -> None:
    for variant, style in STYLES.items():
        scores = scores_of(results, net, size, base, variant)
        if not scores:
            continue
        rates = sorted(next(iter(scores.values())))
        cells = [mean_and_error([row[rate] for row in scores.values()]) for rate in rates]
        errors = [0.0 if error != error else error for _, error in cells]
        name = label(net, base, variant)
        name = "plain base" if variant == "base" else name.partition(", ")[2]
        axes.errorbar(rates, [mean for mean, _ in cells], errors, label=name, linewidth=1.8, markersize=5, **style)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_title(f"{base}, batch {size}", fontsize=10)
    axes.grid(True, alpha=0.3)
