"""The figure of the overhead benchmark: ratios to the base, steady methods above, peers below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from benchmarks.methods import METHODS

# Okabe–Ito; the wrapper is dark and larger.
STYLES: dict[str, tuple[str, str]] = {
    "bnp-sgd": ("#0072B2", "D"),
    "bn": ("#009E73", "o"),
    "ln": ("#56B4E9", "s"),
    "adamw": ("#E69F00", "v"),
    "bnp-adamw": ("#D55E00", "^"),
    "muon": ("#CC79A7", "P"),
    "kfac": ("#E69F00", "v"),
    "kfac-10": ("#E69F00", "^"),
    "soap": ("#56B4E9", "s"),
    "shampoo": ("#009E73", "v"),
    "shampoo-10": ("#009E73", "^"),
}
TICKS = (0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 5, 7, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Write the figure to ``path``."""
    rows, targets = document["rows"], document["targets"]
    names = [n for n in METHODS if n != "sgd" and any("ratio" in r["methods"].get(n, {}) for r in rows)]
    peers = [n for n in names if METHODS[n].peer]
    panels = [[n for n in names if n not in peers]] + ([[*peers, "bnp-sgd"]] if peers else [])
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    width = 3.5 + 1.0 * len(rows)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(max(8.0, width), 4.2 * len(panels)), sharex=True, squeeze=False
    )  # fmt: skip
    for ax, shown in zip(axes[:, 0], panels, strict=True):
        _panel(ax, rows, shown)
    _limits(axes[0, 0], rows, panels[0], targets)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    if peers:
        axes[1, 0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        axes[1, 0].set_title("second-order and orthogonalizing methods", loc="left", fontsize=10)
    axes[-1, 0].set_xticks(range(len(rows)), [r["row"].replace(":", "\nbatch ", 1) for r in rows])
    figure.suptitle(
        f"Time of a training step over that of the plain base ({document['environment']['machine']})", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _offset(index: int, count: int) -> float:
    return 0.7 * ((index + 0.5) / count - 0.5)


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        color, marker = STYLES.get(name, ("#000000", "x"))
        ours = name.startswith("bnp-")
        points = [(x, r["methods"].get(name, {})) for x, r in enumerate(rows)]
        points = [(x + _offset(i, len(names)), p) for x, p in points if "ratio" in p]
        if not points:
            continue
        y = [p["ratio"] for _, p in points]
        low = [max(0.0, p["ratio"] - p["low"]) if p["low"] is not None else 0.0 for _, p in points]
        high = [max(0.0, p["high"] - p["ratio"]) if p["high"] is not None else 0.0 for _, p in points]
        axes.errorbar(
            [x for x, _ in points], y, [low, high], label=f"{name} / {METHODS[name].base}",
            color=color, marker=marker, markersize=8 if ours else 6, linestyle="none", elinewidth=1.2,
            markeredgecolor="white" if ours else color, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, 0.95), max(top, 1.6))
    bottom, top = axes.get_ylim()
    ticks = [t for t in TICKS if bottom <= t <= top]
    if top / bottom > 30:  # the small steps would run into each other
        ticks = [t for t in ticks if t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for i, name in enumerate(names):
        for x, r in enumerate(rows):
            if "over_s" in r["methods"].get(name, {}):
                where = (x + _offset(i, len(names)), top / (top / bottom) ** 0.02)
                text = f"{name} over {r['methods'][name]['over_s']:.0f} s"
                axes.text(*where, text, rotation=90, ha="center", va="top", fontsize=8, color=STYLES[name][0])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.grid(True, axis="y", alpha=0.3)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    for x in range(1, len(rows)):
        axes.axvline(x - 0.5, color="black", alpha=0.12, linewidth=0.8)
    axes.set_ylabel("step time / base's")


def _limits(
    axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], targets: Sequence[Mapping[str, Any]]
) -> None:
    """A short line at each speed target, over the method's place."""
    places = {r["row"]: x for x, r in enumerate(rows)}
    label: str | None = "target"
    for target in targets:
        if target["kind"] == "speed" and target["method"] in names:
            x = places[target["row"]] + _offset(names.index(target["method"]), len(names))
            color = STYLES[target["method"]][0]
            axes.hlines(target["limit"], x - 0.08, x + 0.08, color=color, linewidth=2.5, label=label, zorder=4)
            label = None
