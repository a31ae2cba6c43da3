"""Pictures of the validation loss: against the learning rate, the steps and the seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.evidence.contenders import OWN_Q
from benchmarks.evidence.figures import STYLES
from benchmarks.evidence.language_engine import UNIFORM
from benchmarks.evidence.language_plan import SCHEDULE, LanguageScope
from benchmarks.evidence.tables import Cell

VARIANTS = {"BNP-momentum, gradient form": "BNP-momentum", "BNP-Muon, no bound": "BNP-Muon", OWN_Q: "BNP-Muon"}
LINES = STYLES | {name: STYLES[of] | {"linestyle": ":", "marker": "s"} for name, of in VARIANTS.items()}
LINES[OWN_Q] |= {"linestyle": "-.", "marker": "^"}


def language_figure(
    scope: LanguageScope,
    cells: Mapping[tuple[str, int, str], Cell],
    curves: Mapping[tuple[str, int], list[tuple[int, float]]],
    times: Mapping[int, Mapping[str, float]],
    path: Path,
) -> None:
    """A column per batch size; rates above (seed 0), below curves at the chosen rates, against steps and seconds."""
    batch_sizes = [b for b in scope.steps if any(size == b for _, size, _ in cells)]
    if not batch_sizes:
        return
    rows = 3 if times else 2
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(rows, len(batch_sizes), figsize=(5.2 * len(batch_sizes), 3.6 * rows), squeeze=False)
    shown = [name for name in scope.methods if any(n == name for n, _, _ in cells)]
    for column, b in enumerate(batch_sizes):
        for name in shown:
            cell, style = cells.get((name, b, SCHEDULE)), LINES[name]
            if cell is None:
                continue
            axes[0, column].plot(list(cell.grid), list(cell.grid.values()), label=name, markersize=4, **style)
            steps, losses = zip(*curves[name, b], strict=True)
            line = {k: style[k] for k in ("color", "linestyle")}
            axes[1, column].plot(steps, losses, **line)
            ms = times.get(b, {}).get(name)
            if ms is not None:
                axes[2, column].plot([n * ms / 1e3 for n in steps], losses, **line)
        axes[0, column].axhline(UNIFORM, color="#bbbbbb", linewidth=0.8)
        axes[0, column].set(xscale="log", xlabel="learning rate (one seed)", title=f"batch size {b}")
        ends = [curve[-1][1] for (_, size), curve in curves.items() if size == b]
        for row, label in ((1, "steps, at the chosen rate"), (2, "CPU seconds, at the chosen rate"))[: rows - 1]:
            axes[row, column].set(xscale="log", xlabel=label, ylim=(min(ends) - 0.05, 3.6))
        for ax in axes[:, column]:
            ax.grid(True, alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss, nats per character")
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend([handles[n] for n in shown], shown, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"Character GPT {scope.net.layers}×{scope.net.width}, warm-up and linear decay")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
