"""Karakida et al.: λ_max of the Fisher matrix against width, with centered outputs, after P; and the largest step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn

from benchmarks.theory_common import COLORS, Check, Row, inputs, measured_optimizer, mlp, tidy
from bnp_optim.theory import fisher_lambda_max, mean_field_fisher

NETS: dict[str, tuple[type[nn.Module], tuple[float, float]]] = {
    "tanh": (nn.Tanh, (3.0, 0.64)),
    "relu": (nn.ReLU, (2.0, 0.1)),
}
SEEDS = 3
RATES = (0.5, 0.8, 0.9, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5)
STEPS = 60


def measure(what: str, activation: str, width: int, samples: int, seed: int, rate: float = 0.0) -> dict[str, Any]:
    """One network: λ_max, or the largest loss of gradient descent at ``rate``·2/λ_max."""
    kind, variances = NETS[activation]
    net, x = mlp([width] * 3 + [2], kind, variances, seed), inputs(samples, width, seed=seed)
    told = mean_field_fisher(
        width,
        activation,
        depth=3,
        weight_variance=variances[0],
        bias_variance=variances[1],
        num_samples=samples,
        num_outputs=2,
        centered_output=what == "centered",
    )
    if what == "descent":
        return {"largest_loss": _descend(net, x, rate, seed)}
    preconditioner = measured_optimizer(net, x) if what == "preconditioned" else None
    found = fisher_lambda_max(net, x, preconditioner=preconditioner, centered_output=what == "centered", tolerance=1e-3)
    return {"measured": found, "predicted": None if what == "preconditioned" else told.lambda_max}


def _descend(net: nn.Sequential, x: torch.Tensor, rate: float, seed: int) -> float:
    y = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(5 + seed))
    optimizer = torch.optim.SGD(net.parameters(), lr=2 * rate / fisher_lambda_max(net, x))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (y - net(x)).square().sum() / (2 * len(x))
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return max(losses) / losses[0]


def _points() -> list[dict[str, Any]]:
    found = []
    for activation in NETS:
        for seed in range(SEEDS):
            same = {"activation": activation, "seed": seed}
            found += [{"what": "plain", "width": m, "samples": 100, **same} for m in (100, 200, 400, 800)]
            found += [
                {"what": what, "width": m, "samples": m, **same}
                for what in ("plain", "centered", "preconditioned")
                for m in (200, 400, 800)
            ]
        found += [
            {"what": "descent", "activation": activation, "width": 400, "samples": 100, "seed": seed, "rate": rate}
            for rate in RATES
            for seed in range(4)
        ]
    return found


def _mean(rows: Sequence[Row], key: str, **point: Any) -> float:
    return statistics.fmean(r[key] for r in rows if all(r.get(k) == v for k, v in point.items()))


def draw(rows: Sequence[Row]) -> Figure:
    """Three panels."""
    figure, (growth, cured, steps) = plt.subplots(1, 3, figsize=(12.5, 3.9))
    widths = (100, 200, 400, 800)
    for activation, color in zip(NETS, COLORS, strict=False):
        at = {"activation": activation, "what": "plain", "samples": 100}
        told = [_mean(rows, "predicted", width=m, **at) for m in widths]
        growth.plot(widths, told, color=color, label=f"{activation}, predicted")
        seen = [r for r in rows if all(r.get(k) == v for k, v in at.items())]
        label = "each network, measured"
        growth.plot([r["width"] for r in seen], [r["measured"] for r in seen], "o", color=color, label=label, ms=4)
        for what, style in (("plain", "-"), ("preconditioned", ":"), ("centered", "--")):
            at = {"activation": activation, "what": what}
            seen_means = [_mean(rows, "measured", width=m, samples=m, **at) for m in widths[1:]]
            cured.plot(widths[1:], seen_means, "o" + style, color=color, label=f"{activation}, {_NAMES[what]}", ms=4)
            if what != "preconditioned":
                told = [_mean(rows, "predicted", width=m, samples=m, **at) for m in widths[1:]]
                cured.plot(widths[1:], told, "_", color="black", ms=12)
        descents = [[r["largest_loss"] for r in rows if _is_descent(r, activation, c)] for c in RATES]
        steps.plot(RATES, [statistics.fmean(d) for d in descents], "o-", color=color, label=activation, ms=4)
        steps.fill_between(RATES, [min(d) for d in descents], [max(d) for d in descents], color=color, alpha=0.15, lw=0)
    steps.axvline(1, color="0.5", linestyle=":", linewidth=1)
    growth.loglog()
    cured.loglog()
    for ax, shown in ((growth, widths), (cured, widths[1:])):
        ax.set_xticks(shown, [str(m) for m in shown])
        ax.xaxis.set_minor_formatter(NullFormatter())
    growth.set_yticks([30, 100, 300, 700], ["30", "100", "300", "700"])
    growth.yaxis.set_minor_formatter(NullFormatter())
    steps.set_yscale("log")
    tidy(growth, "λ_max grows with the width (T = 100)", "width M", "λ_max of the Fisher matrix")
    tidy(cured, "unless the mean goes (T = M; bars: predicted)", "width M = samples T", "λ_max")
    cured.set_ylim(4, 3000)
    cured.legend(frameon=False, fontsize=7, ncol=2, loc="upper left")
    tidy(steps, "2/λ_max is the largest step (M = 400)", "learning rate · λ_max/2", "largest loss / first, of 60 steps")
    figure.tight_layout()
    return figure


_NAMES = {"plain": "plain", "centered": "centered output", "preconditioned": "after BNP's P"}


def _is_descent(row: Row, activation: str, rate: float) -> bool:
    return row["what"] == "descent" and row["activation"] == activation and row["rate"] == rate


def summary(rows: Sequence[Row]) -> list[str]:
    """Means over seeds."""
    lines = []
    for activation in NETS:
        for m in (100, 200, 400, 800):
            at = {"activation": activation, "what": "plain", "width": m, "samples": 100}
            told, seen = (_mean(rows, key, **at) for key in ("predicted", "measured"))
            lines.append(
                f"{activation} M {m} T 100: predicted {told:.1f}, measured {seen:.1f} ({told / seen - 1:+.1%})"
            )
        for what in ("plain", "centered", "preconditioned"):
            at = {"activation": activation, "what": what}
            values = [_mean(rows, "measured", width=m, samples=m, **at) for m in (200, 400, 800)]
            lines.append(f"{activation} T = M = 200/400/800, {what}: " + "/".join(f"{v:.3g}" for v in values))
        for rate in (0.9, 1.3):
            found = [r["largest_loss"] for r in rows if _is_descent(r, activation, rate)]
            lines.append(f"{activation} {rate}·2/λ: largest loss/first " + ", ".join(f"{v:.3g}" for v in found))
    return lines


CHECK = Check("fisher", _points(), measure, draw, summary)
