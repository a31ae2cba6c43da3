"""The Hessian and each layer's input while BNP-SGD trains the MLP, before and after P, watched by two callbacks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from torch.utils.data import DataLoader, TensorDataset

from demo.models import Digits
from demo.training import EPOCHS, LEARNING_RATE, SEED, LitDigits
from lightning_callbacks import HessianConditionMonitor, LayerConditionMonitor

BATCH_SIZE = 8
POINTS = 12
RAW, AFTER = "#D55E00", "#0072B2"
EPSILON = 1e-8  # added to the layers' eigenvalues, relative to the largest
History = list[tuple[int, dict[str, float]]]


def _early(steps: int) -> set[int]:
    """Moments that lie close together at the start."""
    return {max(1, round(steps * (i / POINTS) ** 2)) for i in range(1, POINTS + 1)}


def watch(data: Digits, on_step: Callable[[int], None]) -> tuple[History, History]:
    """Train once; returns what the two monitors have logged."""
    torch.manual_seed(SEED)
    everything = TensorDataset(data.train_x, data.train_y)
    generator = torch.Generator().manual_seed(SEED)
    loader = DataLoader(everything, BATCH_SIZE, shuffle=True, generator=generator)
    moments = _early(EPOCHS[BATCH_SIZE] * len(loader))

    class Hessian(HessianConditionMonitor):
        def should_update(self, *, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None and step_idx + 1 in moments

    class Layers(LayerConditionMonitor):
        should_update = Hessian.should_update

    class Steps(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            on_step(1)

    # always all training samples: a matrix of the data, not of a batch
    fixed: dict[str, Any] = {"every_n_epochs": 1, "dataloader": DataLoader(everything, len(everything)), "log": False}
    hessian, layers = Hessian(num_steps=25, num_probes=3, **fixed), Layers(epsilon=EPSILON, **fixed)
    trainer = pl.Trainer(
        max_epochs=EPOCHS[BATCH_SIZE],
        accelerator="cpu",
        callbacks=[hessian, layers, Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitDigits("MLP", "BNP-SGD", LEARNING_RATE["BNP-SGD"]), loader)
    return hessian.history, layers.history


def steps_of_watch() -> int:
    """How often ``watch`` calls ``on_step``."""
    return EPOCHS[BATCH_SIZE] * 1280 // BATCH_SIZE


def plot(hessian: History, layers: History, path: Path) -> None:
    """Write the figure to ``path``."""
    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 4.9), width_ratios=(1.1, 1))
    figure.subplots_adjust(left=0.065, right=0.98, top=0.8, bottom=0.12, wspace=0.2)
    _hessian(left, hessian)
    _layers(right, layers)
    figure.suptitle(
        f"Digits, MLP, BNP-SGD at batch size {BATCH_SIZE}: what the optimizer sees is conditioned better than the loss",
        fontsize=14,
        y=0.97,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _hessian(axes: Axes, history: History) -> None:
    steps = [step for step, _ in history]
    for key, name, color in (("hessian", "H", RAW), ("preconditioned_hessian", "PᵀHP", AFTER)):
        kappa = [row[f"{key}/kappa_mean"] for _, row in history]
        error = [2 * row[f"{key}/kappa_mean_error"] for _, row in history]
        axes.errorbar(steps, kappa, error, color=color, linewidth=2.4, marker="o", markersize=4, capsize=3)
        axes.text(steps[-1] * 1.02, kappa[-1], name, color=color, fontsize=13, fontweight="bold", va="center")
    axes.set_yscale("log")
    axes.set_xlim(0, steps[-1] * 1.13)
    axes.set_xlabel("optimizer steps")
    title = "κ = λmax / mean |λ| of the Hessian of all 1,280 samples\n(bars: two standard errors)"
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, alpha=0.3)


def _layers(axes: Axes, history: History) -> None:
    """First and last estimate of each layer, raw and after P."""
    names = sorted({key.split("/")[1] for key in history[-1][1]}, key=lambda n: int(n.split(".")[-1]))
    for suffix, color, shift, label in (("", RAW, -0.1, "raw"), ("_preconditioned", AFTER, 0.1, "after P")):
        for i, name in enumerate(names):
            values = [row[f"layers/{name}/kappa_p{suffix}"] for _, row in history]
            at = i + shift
            axes.plot([at, at], [min(values), max(values)], color=color, linewidth=7, alpha=0.3, solid_capstyle="butt")
            axes.plot(at, values[-1], "o", color=color, markersize=9, label=label if i == 0 else None)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), [f"layer {i + 1}" for i in range(len(names))])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(
        "κ of each layer's input, over the top 90 % of eigenvalues\n(dot: at the end; bar: range over training)",
        loc="left",
        fontsize=11,
    )
    axes.grid(True, axis="y", alpha=0.3)


def write_json(hessian: History, layers: History, seconds: float, path: Path) -> None:
    """The numbers, one line per estimate."""

    def lines(history: History) -> str:
        rows = [{"step": step} | {key: float(f"{x:.5g}") for key, x in row.items()} for step, row in history]
        return ",\n".join(f"    {json.dumps(row)}" for row in rows)

    path.write_text(
        f'{{\n  "batch_size": {BATCH_SIZE},\n  "epsilon": {EPSILON},\n  "seconds": {seconds:.1f},\n'
        f'  "hessian": [\n{lines(hessian)}\n  ],\n  "layers": [\n{lines(layers)}\n  ]\n}}\n'
    )


def run(data: Digits, folder: Path, on_step: Callable[[int], None]) -> str:
    """Watch, write ``curvature.json`` and ``curvature.png``; returns a sentence on what was seen."""
    start = time.perf_counter()
    hessian, layers = watch(data, on_step)
    write_json(hessian, layers, time.perf_counter() - start, folder / "curvature.json")
    plot(hessian, layers, folder / "curvature.png")
    sides = ("hessian/kappa_mean", "preconditioned_hessian/kappa_mean")
    seen = [
        f"{row[sides[0]]:.0f} and {row[sides[1]]:.0f} after {step} steps" for step, row in (hessian[0], hessian[-1])
    ]
    return f"Curvature (MLP, BNP-SGD, batch {BATCH_SIZE}): kappa_mean of H and PᵀHP is {', '.join(seen)}."
