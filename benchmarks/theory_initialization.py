"""What goes wrong without normalization, after Bjorck et al., and what BNP's step does about it; about three minutes.

    python -m benchmarks.theory_initialization

Deep ReLU MLPs at He initialization on noise: the loss after a step, the activations' mean against their spread, the
cosine between samples and the gradients' kurtosis by depth, without and with batch normalization, over many seeds.
Measured against the paper's claims, and against what mean-field theory predicts for infinite width.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bnp_optim import BNPreconditioner
from bnp_optim.diagnostics import activation_health, step_divergence

DEPTH, WIDTH, CLASSES, BATCH = 30, 100, 10, 128
STEP_SIZES = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-28, 9))
RESULTS = Path(__file__).parent / "results"

# what is drawn and tabulated: along which direction, of which net
STEPS = {
    "gradient": "no normalization, gradient",
    "BNP": "no normalization, P Pᵀg",
    "batch norm": "batch normalization, gradient",
}
COLORS = {"gradient": "#D55E00", "BNP": "#0072B2", "batch norm": "#009E73"}


def deep_net(norm: bool, depth: int = DEPTH) -> nn.Sequential:
    """``depth`` ReLU layers and then logits; He initialization, biases zero."""
    net = nn.Sequential()
    for i in range(depth + 1):
        linear = nn.Linear(WIDTH, CLASSES if i == depth else WIDTH)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        net.append(linear)
        if i < depth:
            net.extend([nn.BatchNorm1d(WIDTH), nn.ReLU()] if norm else [nn.ReLU()])
    return net


def predicted(depth: int = DEPTH) -> dict[str, list[float]]:
    """Of linear layers 1 … depth + 1 at infinite width, without normalization: cosine c, and |mean|/std.

    c ← (√(1−c²) + c(π − arccos c))/π from 0 (Y. Cho, L. Saul, NeurIPS 2009, the kernel of ReLU). A channel's mean
    over n samples is then Gaussian with variance q(c + (1−c)/n), and its variance over them q(1−c).
    """
    cosines = [0.0]
    for _ in range(depth):
        c = cosines[-1]
        cosines.append((math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi)
    ratios = [math.sqrt(2 / math.pi * (c + (1 - c) / BATCH) / (1 - c)) for c in cosines]
    return {"cosine": cosines, "mean_to_std": ratios}


def one_seed(seed: int, depth: int = DEPTH) -> dict[str, Any]:
    """Both nets of a seed, and the steps of each."""
    keys = ("relative_losses", "loss", "depth", "logit_cosine", "all_kurtosis", "gradient_over_weight")
    found: dict[str, Any] = {key: {} for key in keys}
    for norm in (False, True):
        torch.manual_seed(seed)
        model = deep_net(norm, depth)
        x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
        closure = _closure(model, x, y)
        name = "batch norm" if norm else "none"
        health = activation_health(model, closure)
        kinds: dict[str, Any] = {"linear": health}
        if norm:
            kinds["normalized"] = activation_health(model, closure, layers=(nn.BatchNorm1d,))
        for kind, report in kinds.items():
            key = name if kind == "linear" else f"{name}, {kind}"
            fields = ("mean", "std", "mean_to_std", "cosine", "gradient_kurtosis")
            found["depth"][key] = {f: [getattr(r, f) for r in report.layers] for f in fields}
        found["logit_cosine"][name] = health.logit_cosine
        found["loss"][name] = health.loss
        found["all_kurtosis"][name] = health.gradient_kurtosis
        found["gradient_over_weight"][name] = _relative_sizes(model, x, y)
        if not norm:
            found["lengths"] = _lengths(model[:-2](x).detach())
        jobs: dict[str, Any] = {"batch norm": None} if norm else {"gradient": None, "BNP": _preconditioner(model, x, y)}
        for job, preconditioner in jobs.items():
            direction = "gradient" if preconditioner is None else "preconditioned"
            report = step_divergence(
                model, closure, step_sizes=STEP_SIZES, preconditioner=preconditioner, direction=direction
            )
            found["relative_losses"][job] = list(report.relative_losses[direction])
    return found


def _preconditioner(model: nn.Module, x: Tensor, y: Tensor) -> BNPreconditioner:
    """With the batch's statistics, from a step of size zero. q² is 1: the batch is larger than a layer's input."""
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0), model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.remove_hooks()
    return optimizer


def _relative_sizes(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """‖gradient‖/‖weight‖ of the linear layers."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    return [float(g.norm() / w.detach().norm()) for g, w in zip(gradients, weights, strict=True)]


def _lengths(outputs: Tensor) -> dict[str, float]:
    """How samples' lengths vary (std over mean), and |mean|/std if they were all the same."""
    length = outputs.norm(dim=1, keepdim=True)
    directions = outputs / length
    ratio = directions.mean(0).abs().mean() / directions.std(0, correction=0).mean()
    return {"variation": float(length.std() / length.mean()), "mean_to_std_of_directions": float(ratio)}


def _closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    return lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y))


def quartiles(values: Any) -> list[float]:
    """Of what may hold infinities: lower, median and upper, each one of the values (no interpolation)."""
    return [float(v) for v in np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75], method="lower")]


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Quartiles over the seeds."""
    one = STEP_SIZES.index(1.0)
    steps = {}
    for job in runs[0]["relative_losses"]:
        losses = np.array([r["relative_losses"][job] for r in runs])
        best = losses.argmin(1)
        first = [next((a for a, x in zip(STEP_SIZES, row, strict=True) if x > 1e3), math.inf) for row in losses]
        steps[job] = {
            "relative_loss_at_1": quartiles(losses[:, one]),
            "best_relative_loss": quartiles(losses.min(1)),
            "best_step_size": quartiles([STEP_SIZES[i] for i in best]),
            "divergence": quartiles(first),
            "divergence_over_best": quartiles([a / STEP_SIZES[i] for a, i in zip(first, best, strict=True)]),
            "curve": [quartiles(column) for column in losses.T],
        }
    depth = {
        key: {
            field: [quartiles(column) for column in np.array([r["depth"][key][field] for r in runs]).T]
            for field in runs[0]["depth"][key]
        }
        for key in runs[0]["depth"]
    }
    kurtosis = {
        key: quartiles([np.median(r["depth"][key]["gradient_kurtosis"]) for r in runs])
        for key in ("none", "batch norm")
    }
    octets = [r["relative_losses"]["gradient"][one] for r in runs]
    medians = [float(np.median(octets[i : i + 8])) for i in range(0, len(octets) - 7, 8)]
    return {
        "steps": steps,
        "depth": depth,
        "logit_cosine": {key: quartiles([r["logit_cosine"][key] for r in runs]) for key in runs[0]["logit_cosine"]},
        "median_kurtosis": kurtosis,
        "all_kurtosis": {key: quartiles([r["all_kurtosis"][key] for r in runs]) for key in kurtosis},
        "gradient_over_weight": {
            key: [quartiles(column) for column in np.array([r["gradient_over_weight"][key] for r in runs]).T]
            for key in kurtosis
        },
        "lengths": {key: quartiles([r["lengths"][key] for r in runs]) for key in runs[0]["lengths"]},
        "last_mean_to_std": {
            "none": depth["none"]["mean_to_std"][-1],
            "batch norm": depth["batch norm, normalized"]["mean_to_std"][-1],
        },
        "relative_loss_at_1_of_eight_seeds": [min(medians, default=math.nan), max(medians, default=math.nan)],
    }


def draw(summary: dict[str, Any], path: Path, title: str) -> None:
    """Four panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, ((steps, ratio), (cosine, tails)) = plt.subplots(2, 2, figsize=(11, 8))
    for job, label in STEPS.items():
        curve = np.minimum(np.array(summary["steps"][job]["curve"]), 1e12)
        _band(steps, STEP_SIZES, curve, COLORS[job], label)
    steps.axhline(1e3, color="gray", linestyle=":", linewidth=1)
    steps.text(STEP_SIZES[0], 1.4e3, "divergence", color="gray", fontsize=9)
    steps.set(xscale="log", yscale="log", ylim=(0.3, 1e6), xlabel="step size", ylabel="loss after the step / before")
    steps.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.82))
    steps.set_title("one step: relative loss", fontweight="bold")

    depth, theory = summary["depth"], predicted(len(summary["depth"]["none"]["cosine"]) - 1)
    layers = range(1, len(theory["cosine"]) + 1)
    panels = (
        (ratio, "mean_to_std", "|channel mean| / std", "the mean outgrows the spread"),
        (cosine, "cosine", "cosine between two samples", "all inputs end in one direction"),
    )
    for ax, field, label, heading in panels:
        _band(ax, layers, np.array(depth["none"][field]), COLORS["gradient"], "no normalization: before ReLU")
        ax.plot(
            layers, theory[field], color="black", linestyle="--", linewidth=1.2, label="predicted for infinite width"
        )
        normed = np.array(depth["batch norm, normalized"][field])
        _band(ax, layers[: len(normed)], normed, COLORS["batch norm"], "after batch normalization")
        ax.set(xlabel="layer", ylabel=label)
        ax.set_title(heading, fontweight="bold")
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    cosine.set_ylim(-0.05, 1.25)
    for name, color, label in (
        ("none", COLORS["gradient"], "no normalization"),
        ("batch norm", COLORS["batch norm"], "batch normalization"),
    ):
        _band(tails, layers, np.array(depth[name]["gradient_kurtosis"]), color, label)
    tails.axhline(3, color="gray", linestyle=":", linewidth=1)
    tails.text(1, 2.55, "Gaussian", color="gray", fontsize=9)
    tails.set(yscale="log", ylim=(2, 100), xlabel="layer", ylabel="kurtosis of the weights' gradient")
    tails.set_title("gradients have heavy tails", fontweight="bold")
    tails.legend(frameon=False, fontsize=8, loc="upper right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _band(ax: Any, x: Any, curve: Any, color: str, label: str) -> None:
    ax.plot(x, curve[:, 1], color=color, linewidth=2, label=label)
    ax.fill_between(x, curve[:, 0], curve[:, 2], color=color, alpha=0.2, linewidth=0)


def check(output: Path = RESULTS, *, seeds: int = 64, depth: int = DEPTH) -> dict[str, Any]:
    """Run all seeds; write initialization.json and initialization.png to ``output``, and return the summary."""
    runs = [one_seed(seed, depth) for seed in tqdm(range(seeds), desc="initialization", unit="seed")]
    summary = summarize(runs)
    settings = {
        "depth": depth,
        "width": WIDTH,
        "classes": CLASSES,
        "batch": BATCH,
        "seeds": seeds,
        "step_sizes": STEP_SIZES,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    output.mkdir(parents=True, exist_ok=True)
    content = _standard({"settings": settings, **summary, "predicted": predicted(depth)})
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (output / "initialization.json").write_text(text + "\n", encoding="utf-8")
    title = f"{depth} ReLU layers of {WIDTH}, He initialization, batch {BATCH}: median and quartiles of {seeds} seeds"
    draw(summary, output / "initialization.png", title)
    return summary


def _standard(value: Any) -> Any:
    """As JSON has it: what is not finite is null."""
    if isinstance(value, dict):
        return {key: _standard(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(summary: dict[str, Any]) -> str:
    """The steps, as Markdown."""
    rows = [
        "| | relative loss at 1 | best relative loss | at step size | divergence from | over the best |",
        "|" + " --- |" * 6,
    ]
    fields = ("relative_loss_at_1", "best_relative_loss", "best_step_size", "divergence", "divergence_over_best")
    for job, label in STEPS.items():
        cells = [" … ".join(f"{x:.3g}" for x in summary["steps"][job][field]) for field in fields]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where initialization.json and .png go")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}, it must be at least 1")
    torch.set_num_threads(1)
    summary = check(options.output, seeds=options.seeds)
    print(f"\nlower quartile … median … upper quartile\n{table(summary)}")
    for key in (
        "logit_cosine",
        "last_mean_to_std",
        "median_kurtosis",
        "all_kurtosis",
        "lengths",
        "relative_loss_at_1_of_eight_seeds",
    ):
        print(f"{key}: {summary[key]}")


if __name__ == "__main__":
    main()
