"""Products of random matrices: where their squared singular values end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from benchmarks.theory_common import COLORS, Check, Row, tidy
from bnp_optim.theory import product_spectrum_edge

SIZES, FACTORS, SEEDS = (100, 400), (1, 2, 3, 5, 8), 20


def measure(size: int, factors: int, seed: int) -> dict[str, Any]:
    """The largest squared singular value, and the largest over the median singular value."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.eye(size, dtype=torch.float64)
    for _ in range(factors):
        product = product @ (torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5)
    values = torch.linalg.svdvals(product)
    return {"edge": float(values[0]) ** 2, "over_median": float(values[0] / values.median())}


def _of(rows: Sequence[Row], size: int, factors: int, key: str) -> list[float]:
    return [r[key] for r in rows if (r["size"], r["factors"]) == (size, factors)]


def draw(rows: Sequence[Row]) -> Figure:
    """One panel."""
    figure, ax = plt.subplots(figsize=(5.2, 3.8))
    ax.plot(FACTORS, [product_spectrum_edge(k) for k in FACTORS], color="black", label="(K+1)^(K+1)/K^K")
    for size, color in zip(SIZES, COLORS, strict=False):
        means = [statistics.fmean(_of(rows, size, k, "edge")) for k in FACTORS]
        spread = [statistics.stdev(_of(rows, size, k, "edge")) for k in FACTORS]
        ax.errorbar(FACTORS, means, spread, fmt="o", color=color, label=f"N = {size}, measured ± std", ms=4, capsize=2)
    tidy(ax, "product of K Gaussian N × N matrices", "K", "largest squared singular value")
    figure.tight_layout()
    return figure


def summary(rows: Sequence[Row]) -> list[str]:
    """Means over seeds."""
    lines = []
    for size in SIZES:
        for k in FACTORS:
            edge, over = (statistics.fmean(_of(rows, size, k, key)) for key in ("edge", "over_median"))
            limit = product_spectrum_edge(k)
            lines.append(f"N {size} K {k}: limit {limit:.2f}, measured {edge:.2f}, σ_max/median {over:.3g}")
    return lines


CHECK = Check(
    "products",
    [{"size": n, "factors": k, "seed": s} for n in SIZES for k in FACTORS for s in range(SEEDS)],
    measure,
    draw,
    summary,
)
