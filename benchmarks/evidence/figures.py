"""Pictures of accuracy: against the learning rate, and against samples seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.plan import FOLDED, Results, Scope
from benchmarks.evidence.tables import Cell
from benchmarks.evidence.tasks import TASKS

# Okabe–Ito; a base is dashed, BNP around it solid in the same colour
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": color, "linestyle": "-" if "BNP" in name else "--", "marker": "D" if "BNP" in name else "o"}
    for color, names in {
        "#56B4E9": ("SGD", "BNP-SGD"),
        "#009E73": ("momentum", "BNP-momentum"),
        "#E69F00": ("AdamW", "BNP-AdamW"),
        "#CC79A7": ("Muon", "BNP-Muon"),
        "#000000": ("SOAP", "BNP-SOAP"),
        "#D55E00": ("K-FAC",),
        "#999999": ("BN + AdamW", "BN + SGD"),
    }.items()
    for name in names
}
STYLES["BN + SGD"] |= {"linestyle": ":", "marker": "x"}


def convergence_figure(
    scope: Scope, cells: dict[tuple[str, int, str], Cell], results: Results, path: Path, *, folded: bool = False
) -> None:
    """A column per batch size, at a constant rate; rates above (seed 0), curves at the chosen rates below.

    ``folded``: nets without a normalization start folded; batch sizes where none did are left out.
    """
    names = {name: f"{name}, folded" if folded and CONTENDERS[name].norm == "none" else name for name in STYLES}
    wanted = [name for name in names.values() if not folded or name in FOLDED]
    batch_sizes = [b for b in sorted(scope.samples) if any((name, b, "constant") in cells for name in wanted)]
    if not batch_sizes:
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    width = max(4.0 * len(batch_sizes), 10.5)
    figure, axes = plt.subplots(2, len(batch_sizes), figsize=(width, 8), sharey=True, squeeze=False)
    for column, b in enumerate(batch_sizes):
        above, below = axes[:, column]
        for name, style in STYLES.items():
            cell = cells.get((names[name], b, "constant"))
            if cell is None:
                continue
            above.plot(list(cell.grid), list(cell.grid.values()), label=name, markersize=4, **style)
            runs = [
                results[run]
                for seed in (*cell.accuracies, 0)
                if (run := _run(scope, cell, seed)) in results and (seed or not cell.accuracies)
            ]
            seen = [n for n, _ in runs[0]["curve"]]
            mean = np.mean([[a for _, a in r["curve"]] for r in runs], axis=0)
            below.plot(seen, mean, **{k: style[k] for k in ("color", "linestyle")})
        above.set(xscale="log", xlabel="learning rate (one seed)", title=f"batch size {b}")
        below.set(xscale="log", xlabel="samples seen, at the chosen rate")
        for ax in (above, below):
            ax.grid(True, alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy")
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    shown = [name for name in STYLES if name in handles]
    columns = min(-(-len(shown) // 2), int(width / 1.75))  # two rows, or more where names need their inches
    figure.legend([handles[n] for n in shown], shown, loc="lower center", ncols=columns, frameon=False)
    figure.suptitle(TASKS[scope.task].title + ", constant rate" + ", nets without BN folded" * folded)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _run(scope: Scope, cell: Cell, seed: int) -> Any:
    return scope.run(CONTENDERS[cell.contender], cell.batch_size, cell.schedule, cell.rate, seed)
