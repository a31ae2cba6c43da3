"""The figure: learning curves above, accuracy against the learning rate below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.report import best_cell

# Okabe–Ito: safe for colour-blind readers; BNP is solid and dark, its plain base dashed and light.
STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#56B4E9", "linestyle": "--", "marker": "o"},
    "AdamW": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "BNP-SGD": {"color": "#0072B2", "linestyle": "-", "marker": "D"},
    "BNP-AdamW": {"color": "#D55E00", "linestyle": "-", "marker": "^"},
}
TICKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.97)


def plot(
    results: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    title: str,
    path: Path,
    legends: tuple[str, str] = ("lower right", "lower left"),
) -> None:
    """Write the figure to ``path``; ``legends`` are where curves leave room, above and below."""
    batch_sizes = sorted({c["batch_size"] for c in cells}, reverse=True)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(batch_sizes), figsize=(4.2 * len(batch_sizes), 7.6), sharey="row", squeeze=False)
    for column, batch_size in enumerate(batch_sizes):
        _curves(axes[0, column], results, cells, batch_size, legends[0])
        _rates(axes[1, column], cells, batch_size)
        axes[0, column].set_title(f"batch size {batch_size}", fontweight="bold")
    axes[0, 0].set_ylabel("test accuracy (2,000 images)")
    axes[1, 0].set_ylabel("test accuracy after the pass")
    axes[1, -1].legend(loc=legends[1], frameon=False, fontsize=9)
    figure.suptitle(title, y=0.99)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(
    axes: Axes, results: Sequence[Mapping[str, Any]], cells: Sequence[Any], batch_size: int, legend: str
) -> None:
    for method, style in STYLES.items():
        rate = best_cell(cells, method, batch_size)["learning_rate"]
        runs = [r for r in results if (r["method"], r["batch_size"], r["learning_rate"]) == (method, batch_size, rate)]
        seen = [point[0] for point in runs[0]["curve"]]
        accuracy = np.array([[point[1] for point in r["curve"]] for r in runs])
        middle = accuracy.mean(0)
        error = accuracy.std(0, ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else np.zeros_like(middle)
        line = {k: style[k] for k in ("color", "linestyle")}
        axes.plot(seen, middle, label=f"{method}, rate {rate:g}", linewidth=2, **line)
        axes.fill_between(seen, middle - error, middle + error, color=style["color"], alpha=0.25, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("samples seen")
    axes.legend(loc=legend, frameon=False, fontsize=9, title="mean ± s.e. of the seeds", title_fontsize=8)
    _accuracy_axis(axes)


def _rates(axes: Axes, cells: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    for method, style in STYLES.items():
        row = [c for c in cells if c["method"] == method and c["batch_size"] == batch_size]
        single = len(row) == 1
        axes.errorbar(
            [c["learning_rate"] for c in row],
            [c["mean"] for c in row],
            [c["standard_error"] for c in row],
            label=f"{method}, its only rate" if single else method,
            linewidth=2,
            zorder=3 if single else 2,
            markersize=10 if single else 6,
            markeredgecolor="white" if single else style["color"],
            **(style | {"linestyle": "none"} if single else style),
        )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    _accuracy_axis(axes)


def _accuracy_axis(axes: Axes) -> None:
    """Equal steps for equal factors of the error: .9 to .95 is as far as .8 to .9, and chance still shows."""
    axes.set_yscale("function", functions=(_stretch, lambda y: 1 - np.exp(-np.asarray(y))))
    axes.set_ylim(0.05, 0.975)
    axes.set_yticks(TICKS, [f"{t:g}" for t in TICKS])
    axes.grid(True, alpha=0.3)


def _stretch(accuracy: Any) -> Any:
    return -np.log(np.maximum(1 - np.asarray(accuracy, dtype=float), 1e-4))
