"""Batch normalization's regularization, given back: a CNN on few CIFAR-10 images, with and without gamma decay.

    python -m benchmarks.gamma_decay --data-dir data

Five 3 × 3 convolutions (16-16-32-32-64) and a linear layer, SGD without momentum at a constant rate, cross-entropy,
1,000 training images seen again and again, so that overfitting and thus regularization can show, at 16 × 16 pixels
(means of 2 × 2), so that it takes minutes. BatchNorm, PopulationNorm, and no normalization with BNP; the last two also
with gamma decay, at the paper's ζ (strength 1), a tenth and a hundredth of it. BN, PN and BNP have their rate chosen on
a seed of their own by the loss on 1,000 other training images, in half of the epochs, and PN its momentum, too; gamma
decay changes nothing else. Losses are those of the net in evaluation mode. Within a seed all methods share the order of
the images, and a net with and without decay its initial weights, so that differences are paired.

Finished runs are kept under OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import DataMissingError
from benchmarks.gamma_runs import (
    BATCH_SIZE,
    EPOCHS,
    IMAGES,
    METHODS,
    MOMENTA,
    RATES,
    SEEDS,
    TUNING_SEED,
    Training,
    load,
    plain,
    train_all,
)
from benchmarks.report import mean_and_error
from benchmarks.runs import package_digest


def best(results: Sequence[Mapping[str, Any]], method: str) -> tuple[float, float]:
    """Rate and momentum of the smallest held-out loss."""
    mine = [r for r in results if r["method"] == method]
    chosen = min(mine, key=lambda r: (r["diverged"], r["loss"]))
    return chosen["learning_rate"], chosen["momentum"]


def summarize(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per method means ± standard errors over seeds, and the paired differences to the method without gamma decay."""
    by_method = {name: [r for r in results if r["method"] == name] for name in METHODS}
    rows = []
    for name, runs in by_method.items():
        row: dict[str, Any] = {"method": name, "learning_rate": runs[0]["learning_rate"]}
        row["momentum"] = runs[0]["momentum"]
        for key in ("train_loss", "loss", "accuracy"):
            row[key] = mean_and_error([r[key] for r in runs])
        row["gap"] = mean_and_error([r["loss"] - r["train_loss"] for r in runs])
        row["diverged"] = sum(r["diverged"] for r in runs)
        if METHODS[name].strength:
            for key in ("train_loss", "loss", "accuracy"):
                pairs = zip(runs, by_method[plain(name)], strict=True)
                row[f"{key}_difference"] = mean_and_error([a[key] - b[key] for a, b in pairs])
        rows.append(row)
    return rows


def markdown(document: Mapping[str, Any]) -> str:
    """The tables, with how they were had."""
    facts, rows = document["configuration"], document["summary"]

    def cell(pair: Sequence[float], digits: int = 3, sign: str = "") -> str:
        return f"{pair[0]:{sign}.{digits}f} ± {pair[1]:.{digits}f}"

    lines = [
        "# Gamma decay",
        "",
        f"CNN on {facts['images']:,} images of CIFAR-10 at 16 × 16 pixels, {facts['epochs']} epochs at batch size "
        f"{facts['batch_size']}, SGD at a constant rate; seeds {', '.join(map(str, facts['seeds']))}; mean ± standard "
        f"error. Rates chosen on seed {facts['tuning_seed']} by the loss on other training images after "
        f"{facts['tuning_epochs']} epochs.",
        "",
        "| method | rate | training loss | test loss | test minus training | test accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        values = [cell(r[key]) for key in ("train_loss", "loss", "gap", "accuracy")]
        lines.append(f"| {r['method']} | {r['learning_rate']:g} | " + " | ".join(values) + " |")
    lines += ["", "What gamma decay changes, paired by seed:", ""]
    lines += ["| method | training loss | test loss | test accuracy |", "| --- | --- | --- | --- |"]
    for r in rows:
        if "loss_difference" in r:
            values = [cell(r[f"{key}_difference"], sign="+") for key in ("train_loss", "loss", "accuracy")]
            lines.append(f"| {r['method']} | " + " | ".join(values) + " |")
    lines += ["", "The choice of the rates, and of the momentum of PopulationNorm: training / held-out loss.", ""]
    lines += ["| method | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " |", "| --- " * (len(RATES) + 1) + "|"]
    for name in dict.fromkeys(map(plain, METHODS)):
        tuned = [r for r in document["tuning"] if r["method"] == name]
        for momentum in dict.fromkeys(r["momentum"] for r in tuned):
            shown = [
                "diverged" if r["diverged"] else f"{r['train_loss']:.3f} / {r['loss']:.3f}"
                for r in tuned
                if r["momentum"] == momentum
            ]
            label = f"{name}, momentum {momentum:g}" if name == "PN" else name
            lines.append(f"| {label} | " + " | ".join(shown) + " |")
    lines += [
        "",
        f"(torch {facts['torch']}, one thread, {document['cpu_seconds']:.0f} CPU seconds, {facts['date']})",
        "",
    ]
    return "\n".join(lines)


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training and test loss over the epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    colors = {"BN": "#000000", "PN": "#56B4E9", "BNP": "#E69F00"}  # Okabe-Ito
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2), layout="constrained")
    for name, method in METHODS.items():
        runs = [r for r in results if r["method"] == name and not r["diverged"]]
        if not runs:
            continue
        color = colors[plain(name)]
        curves = np.array([r["curve"] for r in runs])
        for column, ax in enumerate(axes, start=1):
            mean = curves[:, :, column].mean(0)
            spread = curves[:, :, column].std(0, ddof=min(1, len(runs) - 1)) / len(runs) ** 0.5
            style = {"color": color, "linestyle": {0.0: "-", 0.01: "-.", 0.1: "--", 1.0: ":"}[method.strength]}
            ax.plot(
                curves[0, :, 0], mean, label=f"{name}, rate {runs[0]['learning_rate']:g}", marker="o", ms=3, **style
            )
            ax.fill_between(curves[0, :, 0], mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    for ax, title in zip(axes, ("training loss (evaluation mode)", "test loss"), strict=True):
        ax.set_xlabel("epochs")
        ax.set_title(title, fontweight="bold")
        ax.grid(True, alpha=0.3)
    options = {"frameon": False, "fontsize": 9, "title": "mean ± s.e. of the seeds", "title_fontsize": 8}
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", **options)
    figure.suptitle("CNN on 1,000 images of CIFAR-10 (16 × 16), batch size 32")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gamma_decay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds cifar10/cifar10.npz (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        data = load(args.data_dir)
    except DataMissingError as error:
        parser.error(str(error))
    digest, cache = package_digest(), args.output / ".cache"
    try:
        tuning: list[dict[str, Any]] = []
        for name in dict.fromkeys(map(plain, METHODS)):
            grid = [
                Training(name, rate, TUNING_SEED, momentum, EPOCHS // 2, package_digest=digest)
                for momentum in (MOMENTA if name == "PN" else MOMENTA[-1:])
                for rate in RATES
            ]
            tuning += train_all(grid, data, cache, f"rates of {name}")
        chosen = {name: best(tuning, plain(name)) for name in METHODS}
        runs = [
            Training(name, rate, seed, momentum, package_digest=digest)
            for seed in SEEDS
            for name, (rate, momentum) in chosen.items()
        ]
        results = train_all(runs, data, cache, "seeds")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last finished run.")
    document = {
        "benchmark": "gamma_decay",
        "configuration": {
            "images": IMAGES, "batch_size": BATCH_SIZE, "epochs": EPOCHS, "tuning_epochs": EPOCHS // 2,
            "seeds": SEEDS, "tuning_seed": TUNING_SEED, "torch": torch.__version__, "threads": 1,
            "date": time.strftime("%Y-%m-%d"),
        },
        "cpu_seconds": sum(r["seconds"] for r in (*tuning, *results)),
        "summary": summarize(results),
        "tuning": tuning,
        "runs": results,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gamma_decay.json").write_text(json.dumps(document, indent=1) + "\n")
    text = markdown(document)
    (args.output / "gamma_decay.md").write_text(text)
    plot(results, args.output / "gamma_decay.png")
    print(text)


if __name__ == "__main__":
    main()
