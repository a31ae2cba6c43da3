"""BNP's own theory: gradient descent on least squares contracts as κ* says, raw and after P."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.theory_common import COLORS, Check, Row, tidy
from bnp_optim import BNPreconditioner
from bnp_optim.curvature import HessianOperator, PreconditionedOperator
from bnp_optim.theory import effective_condition_number

SAMPLES, FEATURES, STEPS = 200, 4, 3000
SPREADS, SEEDS = (0.5, 1.0, 1.5, 2.0), 3  # decades that the features' scales span


def measure(spread: float, seed: int, preconditioned: bool) -> dict[str, Any]:
    """Descend with the best step; the rate is that of the last steps above rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-spread / 2, spread / 2, FEATURES, dtype=torch.float64)
    x = x + 2 * torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], dim=1)  # one of them twice: the loss is flat along a line
    y = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    model = nn.Linear(FEATURES + 1, 1, dtype=torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = BNPreconditioner(base, model, step_scale=None) if preconditioned else base

    def loss() -> Tensor:
        return 0.5 * (y - model(x)).square().mean()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step()  # of length 0, for the statistics
    hessian = HessianOperator((loss, SAMPLES), model.parameters())
    matrix = PreconditionedOperator(hessian, optimizer) if isinstance(optimizer, BNPreconditioner) else hessian
    theory = effective_condition_number(matrix)
    for group in base.param_groups:
        group["lr"] = theory.best_step
    design = torch.cat([torch.ones(SAMPLES, 1, dtype=torch.float64), x], dim=1)
    best = design @ torch.linalg.lstsq(design, y, driver="gelsd").solution
    distances = []
    for _ in range(STEPS):
        with torch.no_grad():
            distances.append(float((model(x) - best).norm()))
        if distances[-1] < 1e-10 * distances[0]:
            break
        step()
    last, half = len(distances) - 1, len(distances) // 2
    return {
        "kappa": theory.condition_number,
        "told": 1 - theory.rate(),
        "seen": 1 - (distances[last] / distances[half]) ** (1 / (last - half)),
        "distances": distances[:: max(1, len(distances) // 200)],
        "stride": max(1, len(distances) // 200),
    }


def draw(rows: Sequence[Row]) -> Figure:
    """Two panels."""
    figure, (curves, rates) = plt.subplots(1, 2, figsize=(10.5, 4.0))
    for preconditioned, color, name in ((False, COLORS[1], "raw"), (True, COLORS[0], "after P")):
        mine = [r for r in rows if r["preconditioned"] == preconditioned]
        row = next(r for r in mine if r["spread"] == SPREADS[-1] and r["seed"] == 0)
        steps = [i * row["stride"] for i in range(len(row["distances"]))]
        first = row["distances"][0]
        curves.plot(steps, [d / first for d in row["distances"]], color=color, label=f"{name}, κ* {row['kappa']:.3g}")
        middle = len(steps) // 2
        told = [row["distances"][middle] / first * (1 - row["told"]) ** (s - steps[middle]) for s in steps]
        curves.plot(steps, told, ":", color="black", label="predicted slope" if preconditioned else None)
        rates.plot([r["told"] for r in mine], [r["seen"] for r in mine], "o", color=color, label=name, ms=5, alpha=0.8)
    ends = [min(r["told"] for r in rows) / 2, 1]
    rates.plot(ends, ends, color="0.5", linewidth=1, zorder=0)
    curves.set_yscale("log")
    curves.set_ylim(1e-11, 3)
    rates.loglog()
    tidy(
        curves,
        "least squares, features over two decades",
        "step of gradient descent",
        "distance to the minimizers / first",
    )
    tidy(rates, f"{len(rows)} runs", "2/(κ* + 1)", "1 - measured contraction")
    figure.tight_layout()
    return figure


def summary(rows: Sequence[Row]) -> list[str]:
    """Per spread of scales."""
    lines = []
    for spread in SPREADS:
        kappa = [
            statistics.fmean(r["kappa"] for r in rows if (r["spread"], r["preconditioned"]) == (spread, p))
            for p in (False, True)
        ]
        lines.append(f"scales over {spread:g} decades: mean κ* {kappa[0]:.4g} raw, {kappa[1]:.4g} after P")
    worst = max(abs(r["seen"] / r["told"] - 1) for r in rows)
    return [*lines, f"largest deviation of 1 - rate from 2/(κ*+1): {worst:.2%}"]


CHECK = Check(
    "convergence",
    [{"spread": d, "seed": s, "preconditioned": p} for d in SPREADS for s in range(SEEDS) for p in (False, True)],
    measure,
    draw,
    summary,
)
