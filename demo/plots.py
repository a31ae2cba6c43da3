"""The picture: batch size 1 large on top, the other batch sizes below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from demo.training import EPOCHS, LEARNING_RATE, MODELS, Outcome

# Okabe–Ito: safe for colour-blind readers; BNP is solid and thick, all else is not.
STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#56B4E9", "linestyle": "--", "linewidth": 1.7},
    "Adam": {"color": "#E69F00", "linestyle": "--", "linewidth": 1.7},
    "BatchNorm + SGD": {"color": "#444444", "linestyle": ":", "linewidth": 2.2},
    "BNP-SGD": {"color": "#0072B2", "linestyle": "-", "linewidth": 2.8},
    "BNP-AdamW": {"color": "#D55E00", "linestyle": "-", "linewidth": 2.8},
}
LINE = 0.066  # height of a line of text in the large panels, in units of accuracy


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the figure to ``path``."""
    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    small = [b for b in EPOCHS if b > 1]
    figure = plt.figure(figsize=(12.4, 8.6))
    figure.subplots_adjust(left=0.06, right=0.98, top=0.835, bottom=0.065)
    grid = figure.add_gridspec(2, len(small) * len(MODELS), height_ratios=(1.6, 1), hspace=0.4, wspace=0.16)
    for m, model in enumerate(MODELS):
        first = m * len(small)
        axes = figure.add_subplot(grid[0, first : first + len(small)])
        axes.set_facecolor("#FFF8E3")
        axes.set_title(f"{model}, batch size 1", fontsize=15, fontweight="bold", loc="left")
        _curves(axes, runs := [o for o in outcomes if (o.model, o.batch_size) == (model, 1)], room=1.52)
        _label_ends(axes, runs)
        _name_accuracy(axes, m == 0)
        for b, batch_size in enumerate(small):
            axes = figure.add_subplot(grid[1, first + b])
            axes.set_title(f"{model}, batch size {batch_size}", fontsize=11, loc="left")
            _curves(axes, runs := [o for o in outcomes if (o.model, o.batch_size) == (model, batch_size)])
            _list_ends(axes, runs)
            _name_accuracy(axes, first + b == 0)
    handles = [plt.Line2D([], [], label=f"{name}, rate {LEARNING_RATE[name]:g}", **s) for name, s in STYLES.items()]
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False, bbox_to_anchor=(0.52, 0.94))
    figure.suptitle(
        "Digits: BNP trains at batch size 1, where BatchNorm cannot, at the rate it uses at 8 and 64",
        fontsize=15,
        y=0.985,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, outcomes: Sequence[Outcome], room: float = 1.06) -> None:
    """The curves; ``room``: the width of the axis in units of that of the curves."""
    for o in sorted(outcomes, key=lambda o: list(STYLES).index(o.method)):
        axes.plot([p[0] for p in o.curve], [p[1] for p in o.curve], **STYLES[o.method])
    end = outcomes[0].curve[-1][0]
    axes.set_ylim(0, 1.0)
    axes.set_xlim(0, end * room)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_xticks(np.linspace(0, end, 5 if room > 1.1 else 3))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("samples seen")
    axes.grid(True, alpha=0.3)


def _name_accuracy(axes: Axes, leftmost: bool) -> None:
    if leftmost:
        axes.set_ylabel("test accuracy")
    else:
        axes.set_yticklabels([])


def _label_ends(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Name and final accuracy at the end of each line, pushed apart where they would overlap."""
    left = outcomes[0].curve[-1][0] * 1.025
    height = 1.0
    for o in sorted(outcomes, key=lambda o: o.accuracy, reverse=True):
        height = min(o.accuracy, height - LINE)
        style = {"color": STYLES[o.method]["color"], "fontweight": "bold", "fontsize": 11}
        axes.text(left, height, f"{o.method} {100 * o.accuracy:.1f} %", va="center", **style)
    axes.text(left, 0.13, "BatchNorm\nimpossible", va="center", color=STYLES["BatchNorm + SGD"]["color"], fontsize=11)


def _list_ends(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Final accuracies in the lower right corner, the best on top."""
    for line, o in enumerate(sorted(outcomes, key=lambda o: o.accuracy)):
        text = f"{o.method} {100 * o.accuracy:.1f} %"
        style = {"color": STYLES[o.method]["color"], "fontsize": 9, "fontweight": "bold"}
        box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
        axes.text(0.985, 0.04 + 0.088 * line, text, transform=axes.transAxes, ha="right", bbox=box, **style)
