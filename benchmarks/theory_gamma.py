"""ζ of gamma decay: the paper's formula, what GammaMeter estimates, and what the noise of true batches adds.

    python -m benchmarks.theory_gamma [--data-dir data]

A unit on its own with the loss A(h̄) - y·h̄, A' its activation and y its own response A'(h̄) under population
statistics (P. Luo et al., ICLR 2019, 1809.00846). Measured is the mean of that loss under BatchNorm minus that under
population statistics, on the in-batch samples, over γ² at γ = 1. With ``--data-dir`` also how many independent samples
the statistics of a convolution's batch are worth, on CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bnp_optim.nn import GammaMeter, PopulationNorm1d, gamma_decay_coefficient

BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256)
SAMPLES = 2**21


class Case(NamedTuple):
    """An activation A' with its A, and the pre-activation's distribution of variance 1 with its excess kurtosis."""

    activation: str
    primitive: Callable[[Tensor], Tensor]
    draw: Callable[[Sequence[int], torch.Generator], Tensor]
    kurtosis: float
    color: str


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _laplace(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)


CASES = {
    "identity, Laplace": Case("identity", lambda h: h.square() / 2, _laplace, 3.0, "#D55E00"),
    "identity, Gaussian": Case("identity", lambda h: h.square() / 2, _normal, 0.0, "#000000"),
    "ReLU, Gaussian": Case("relu", lambda h: F.relu(h).square() / 2, _normal, 0.0, "#0072B2"),
    "tanh, Gaussian": Case("tanh", lambda h: h.abs() + F.softplus(-2 * h.abs()), _normal, 0.0, "#009E73"),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda h: h, "relu": F.relu, "tanh": torch.tanh}


def predicted(case: Case, batch_size: int) -> float:
    """The formula, its expectations over 2²⁰ samples; independent of the package."""
    x = case.draw([2**20], torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std(correction=0)
    second = {"identity": torch.ones_like(x), "relu": (x > 0).double(), "tanh": 1 - torch.tanh(x).square()}
    slopes = second[case.activation]
    information, mean_slope = float((slopes * x.square()).mean()), float(slopes.mean())
    return (case.kurtosis + 2) / (8 * batch_size) * information + mean_slope / (2 * batch_size)


def measured(case: Case, batch_size: int, samples: int = SAMPLES) -> tuple[float, float]:
    """Mean loss under BatchNorm minus that under population statistics, and its standard error over batches."""
    x = case.draw([batch_size, samples // batch_size], torch.Generator().manual_seed(batch_size))
    f, a = ACTIVATIONS[case.activation], case.primitive
    noisy = F.batch_norm(x, None, None, training=True, eps=1e-12)  # each column is a batch
    y = f(x)
    added = (a(noisy) - y * noisy - a(x) + y * x).mean(0)
    return float(added.mean()), float(added.std() / math.sqrt(len(added)))


def estimated(case: Case, batch_size: int) -> float:
    """What a GammaMeter on a PopulationNorm says, measured at batch size 64."""
    layer, meter = PopulationNorm1d(1).double(), GammaMeter(case.activation, interval=1, momentum=0.005)
    meter.attach(layer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        layer(case.draw([64, 1], generator))
    return float(gamma_decay_coefficient(layer, batch_size))


def check(samples: int = SAMPLES, batch_sizes: Sequence[int] = BATCH_SIZES) -> dict[str, Any]:
    """Per case ζ by batch size: predicted, estimated, measured with its error; and the slope of log ζ on log M."""
    found: dict[str, Any] = {}
    for name, case in tqdm(CASES.items(), desc="gamma decay", unit="case"):
        rows, meter = [], estimated(case, 1_000) * 1_000  # ζ is exactly proportional to 1/M
        for m in batch_sizes:
            value, error = measured(case, m, samples)
            row = {"batch_size": m, "predicted": predicted(case, m), "estimated": meter / m}
            rows.append(row | {"measured": value, "standard_error": error})
        far = [r for r in rows if r["batch_size"] >= 8]
        slope = math.log(far[-1]["measured"] / far[0]["measured"]) / math.log(
            far[-1]["batch_size"] / far[0]["batch_size"]
        )
        found[name] = {"rows": rows, "slope": slope}
    return found


def effective_batch_sizes(data_dir: Path, batch_size: int = 32) -> dict[str, dict[str, float]]:
    """How many independent samples the mean of a convolution's batch is worth: σ_P²/Var(μ_B), median over channels.

    In the CNN of benchmarks/gamma_decay.py with BatchNorm, before training and after 5 epochs of its 1,000 images.
    """
    from benchmarks.gamma_runs import Training, load, make

    data = load(data_dir)
    model, optimizer, _ = make(Training("BN", 0.1, 0))
    x, y = data.x["train"], data.y["train"]
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[str, list[Tensor]] = {}
    for name, module in norms.items():

        def keep(_: nn.Module, args: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].detach())

        module.register_forward_pre_hook(keep)
    found: dict[str, dict[str, float]] = {}
    for when, epochs in (("before training", 0), ("after 5 epochs", 5)):
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        seen.clear()
        with torch.no_grad():
            for _ in range(4):
                for batch in torch.randperm(len(x), generator=generator).split(batch_size)[:-1]:
                    model(x[batch])
        for name, parts in seen.items():
            h = torch.stack(parts)  # batches × samples × channels × positions
            within, means = h.transpose(2, 1).transpose(1, 0).flatten(1).var(1), h.mean((1, 3, 4))
            # the batches partition 1,000 images: drawn without replacement, their means vary less
            finite = 1 - batch_size / len(x)
            found.setdefault(name, {})[when] = float((within / (means.var(0) / finite)).median())
        found_positions = {name: parts[0][0, 0].numel() for name, parts in seen.items()}
    for name, positions in found_positions.items():
        found[name]["positions"] = positions
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """ζ over M: lines predicted, crosses estimated, dots measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for name, entry in found.items():
        color, rows = CASES[name].color, entry["rows"]
        m = [r["batch_size"] for r in rows]
        left.plot(m, [r["predicted"] for r in rows], color=color, linewidth=1.5, label=name)
        left.plot(m, [r["measured"] for r in rows], "o", color=color, markersize=6)
        left.plot(m, [r["estimated"] for r in rows], "x", color="white", markersize=4)
        right.axhline(1, color="0.7", linewidth=1)
        ratio = [r["measured"] / r["predicted"] for r in rows]
        right.errorbar(
            m, ratio, [2 * r["standard_error"] / r["predicted"] for r in rows], color=color, marker="o", ms=5
        )
        right.plot(m, [r["estimated"] / r["predicted"] for r in rows], "x--", color=color, markersize=6, linewidth=0.8)
    left.set_yscale("log", base=2)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(m, [str(n) for n in m])
        ax.set_xlabel("batch size M")
        ax.grid(True, alpha=0.3)
    left.set_title("ζ (line: predicted, dot: measured, cross: GammaMeter)", fontsize=10)
    right.set_title("over predicted (dot: measured ± 2 s.e., cross: GammaMeter)", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(found: dict[str, Any]) -> str:
    """M·ζ, predicted, estimated, and measured at some batch sizes, as Markdown."""
    shown = (8, 32, 128)
    heads = [f"measured, M = {m}" for m in shown]
    lines = ["| | predicted | GammaMeter | " + " | ".join(heads) + " | slope |", "| --- " * (len(shown) + 4) + "|"]
    for name, entry in found.items():
        rows = {r["batch_size"]: r for r in entry["rows"]}
        cells = [f"{m * rows[m]['measured']:.3f} ± {m * rows[m]['standard_error']:.3f}" for m in shown if m in rows]
        first = next(iter(rows.values()))
        ours = [f"{first['batch_size'] * first[key]:.3f}" for key in ("predicted", "estimated")]
        lines.append(f"| {name} | " + " | ".join([*ours, *cells]) + f" | {entry['slope']:.3f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.theory_gamma", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="holds cifar10/cifar10.npz; without it no convolutions")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="(benchmarks/results)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = check()
    document: dict[str, Any] = {"benchmark": "theory_gamma", "samples": SAMPLES, "cases": found}
    text = table(found)
    if args.data_dir is not None:
        document["effective_batch_sizes"] = effective_batch_sizes(args.data_dir)
        text += "\n| layer | positions | before training | after 5 epochs |\n| --- | --- | --- | --- |\n"
        for name, row in document["effective_batch_sizes"].items():
            text += f"| {name} | {row['positions']} | {row['before training']:.0f} | {row['after 5 epochs']:.0f} |\n"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "theory_gamma.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.output / "theory_gamma.md").write_text(f"M·ζ of gamma decay\n\n{text}")
    plot(found, args.output / "theory_gamma.png")
    print(text)


if __name__ == "__main__":
    main()
