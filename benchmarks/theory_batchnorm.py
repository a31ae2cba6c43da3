"""Wei et al.: λ_max with BatchNorm against γ, beside no BatchNorm and BNP; and random convolutional networks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.theory_common import COLORS, Check, Row, gaussian_, inputs, measured_optimizer, mlp, tidy
from bnp_optim.theory import fisher_lambda_max, mean_field_fisher, mean_field_fisher_from_model

WIDTH, SAMPLES, VARIANCES = 1000, 200, (2.0, 0.5)
GAMMAS = (0.5, 1.0, 2.0, 3.0, 4.0)
SEEDS = 2
CHANNELS, CONV_SEEDS, CONV_SAMPLES = (32, 64, 128, 256), 4, 32
CONVOLUTIONS: dict[str, tuple[type[nn.Module], str, bool]] = {
    "tanh, averaged": (nn.Tanh, "average", False),
    "tanh, flattened": (nn.Tanh, "flatten", False),
    "ReLU, averaged": (nn.ReLU, "average", False),
    "ReLU, flattened": (nn.ReLU, "flatten", False),
    "ReLU + BatchNorm, averaged": (nn.ReLU, "average", True),
    "ReLU + BatchNorm, flattened": (nn.ReLU, "flatten", True),
}


def measure(what: str, seed: int, gamma: float = 0.0, net: str = "", channels: int = 0) -> dict[str, Any]:
    """One network."""
    if what == "convolution":
        model, x = _cnn(channels, *CONVOLUTIONS[net], seed), inputs(CONV_SAMPLES, channels, 4, 4, seed=seed)
        return _both(model, x, mean_field_fisher_from_model(model, x).lambda_max)
    model = mlp([WIDTH] * 4 + [1], nn.ReLU, VARIANCES, seed, gamma)
    x = inputs(SAMPLES, WIDTH, seed=seed)
    if what == "batch_frozen":
        _hold(model, x)
    if what == "preconditioned":
        found = fisher_lambda_max(model, x, preconditioner=measured_optimizer(model, x), tolerance=1e-3)
        return {"measured": found, "predicted": None}
    told = mean_field_fisher(
        WIDTH,
        depth=4,
        weight_variance=VARIANCES[0],
        bias_variance=VARIANCES[1],
        num_samples=SAMPLES,
        normalization=what,  # type: ignore[arg-type]
        gamma=gamma or 1.0,
    )
    return _both(model, x, told.lambda_max)


def _both(model: nn.Module, x: Tensor, predicted: float) -> dict[str, Any]:
    return {"measured": fisher_lambda_max(model, x, tolerance=1e-3), "predicted": predicted}


def _hold(model: nn.Module, x: Tensor) -> None:
    """Statistics of exactly this batch, held constant."""
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            m.momentum = 1.0
    with torch.no_grad():
        model(x)
    model.eval()


def _cnn(channels: int, activation: type[nn.Module], head: str, norm: bool, seed: int) -> nn.Sequential:
    """Two convolutions with circular padding on 4 × 4 maps."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular"))
        layers += [nn.BatchNorm2d(channels).requires_grad_(False)] if norm else []
        layers.append(activation())
    if head == "average":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2)]
    else:
        layers += [nn.Flatten(), nn.Linear(16 * channels, 2)]
    model = nn.Sequential(*layers)
    gaussian_(model, *((3.0, 0.64) if activation is nn.Tanh else (2.0, 0.1)), seed)
    return model


def _points() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        found += [{"what": what, "seed": seed} for what in ("none", "preconditioned")]
        found += [{"what": w, "seed": seed, "gamma": g} for w in ("batch", "batch_frozen") for g in GAMMAS]
    for net in CONVOLUTIONS:
        for c in CHANNELS:
            found += [{"what": "convolution", "net": net, "channels": c, "seed": s} for s in range(CONV_SEEDS)]
    return found


def _mean(rows: Sequence[Row], key: str, **point: Any) -> float:
    return statistics.fmean(r[key] for r in rows if all(r.get(k) == v for k, v in point.items()))


def draw(rows: Sequence[Row]) -> Figure:
    """Two panels."""
    figure, (scale, conv) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = {"batch_frozen": "BatchNorm, statistics held constant", "batch": "BatchNorm as it trains"}
    for (what, name), color in zip(names.items(), COLORS, strict=False):
        told = [_mean(rows, "predicted", what=what, gamma=g) for g in GAMMAS]
        scale.plot(GAMMAS, told, color=color, label=f"{name}, predicted")
        seen = [_mean(rows, "measured", what=what, gamma=g) for g in GAMMAS]
        scale.plot(GAMMAS, seen, "o", color=color, label="measured", ms=5)
    for what, name, color in (
        ("none", "no BatchNorm", COLORS[2]),
        ("preconditioned", "no BatchNorm, after P", COLORS[3]),
    ):
        seen_level = _mean(rows, "measured", what=what)
        scale.axhline(seen_level, color=color, linestyle="--", label=f"{name}, measured ({seen_level:.0f})")
    scale.loglog()
    scale.set_xticks(GAMMAS, [f"{g:g}" for g in GAMMAS], minor=False)
    scale.minorticks_off()
    tidy(scale, f"4 layers of {WIDTH} ReLUs, T = {SAMPLES}", "γ", "λ_max of the Fisher matrix")
    scale.set_ylim(15, 3e4)
    scale.legend(frameon=False, fontsize=7.5, ncol=2, loc="upper left")
    for net, color in zip(CONVOLUTIONS, COLORS, strict=True):
        ratios = [
            [r["predicted"] / r["measured"] for r in rows if r.get("net") == net and r["channels"] == c]
            for c in CHANNELS
        ]
        conv.plot(CHANNELS, [statistics.fmean(r) for r in ratios], "o-", color=color, label=net, ms=4)
        for c, values in zip(CHANNELS, ratios, strict=True):
            conv.plot([c] * len(values), values, ".", color=color, alpha=0.35)
    conv.axhline(1, color="0.5", linewidth=1)
    conv.set_xscale("log")
    conv.set_xticks(CHANNELS, [str(c) for c in CHANNELS], minor=False)
    conv.minorticks_off()
    conv.set_ylim(0, 2)
    tidy(conv, "two 3×3 convolutions, 4×4 maps (dots: networks)", "channels", "λ_max predicted / measured")
    conv.legend(frameon=False, fontsize=7.5, ncol=2, loc="lower right")
    figure.tight_layout()
    return figure


def summary(rows: Sequence[Row]) -> list[str]:
    """Means over seeds."""
    lines = [f"no BatchNorm: predicted {_mean(rows, 'predicted', what='none'):.0f}"]
    lines[0] += f", measured {_mean(rows, 'measured', what='none'):.0f}"
    lines[0] += f", after P {_mean(rows, 'measured', what='preconditioned'):.1f}"
    for what in ("batch", "batch_frozen"):
        for g in GAMMAS:
            told, seen = (_mean(rows, key, what=what, gamma=g) for key in ("predicted", "measured"))
            lines.append(f"{what} γ {g:g}: predicted {told:.1f}, measured {seen:.1f} ({told / seen - 1:+.1%})")
        if what == "batch":
            lines.append("  Nγ²/2π: " + ", ".join(f"{WIDTH * g * g / (2 * math.pi):.1f}" for g in GAMMAS))
    for net in CONVOLUTIONS:
        parts = []
        for c in CHANNELS:
            told, seen = (_mean(rows, key, net=net, channels=c) for key in ("predicted", "measured"))
            parts.append(f"{c}: {told:.0f}/{seen:.0f} ({told / seen - 1:+.0%})")
        lines.append(f"{net}, predicted/measured by channels: " + ", ".join(parts))
    return lines


CHECK = Check("batchnorm", _points(), measure, draw, summary)
