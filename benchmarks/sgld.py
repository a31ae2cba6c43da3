"""Langevin dynamics in preconditioned coordinates, where the posterior is known: linear regression.

    python -m benchmarks.sgld

Stochastic gradient Langevin dynamics (Welling, Teh, ICML 2011) samples from exp(-U) by Δw = -ε/2 ∇U + √ε ξ; with a
metric P Pᵀ (Li, Chen, Carlson, Carin, AAAI 2016; their Γ, the divergence of the metric, is 0 where P does not depend
on w) by Δw = -ε/2 P Pᵀ∇U + √ε P ξ. That is SGLD in the coordinates z, w = P z, so around :class:`SGLD` the two-sided
form of ``BNPreconditioner`` is all it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.documents import compact, environment
from benchmarks.report import made_with
from bnp_optim import BNPreconditioner

SAMPLES, CHAINS, STEPS, EVERY = 500, 100, (300, 1000, 3000), 10
BATCHES = (SAMPLES, 50)
RATES = tuple(10 ** (-6 + i / 2) for i in range(9))  # ε, from 1e-6 to 1e-2
FAR = 1e6  # posterior standard deviations: who is there has diverged
NOISE, PRIOR = 0.5, 10.0  # standard deviations of the targets about the line, and of the weights
METHODS: dict[str, dict[str, float] | None] = {  # options of BNPreconditioner; None: without
    "SGLD": None,
    "BNP-SGLD": {},
    "BNP-SGLD, ε1 = 0": {"var_rel_eps": 0.0},
    "BNP-SGLD, ε1 = 0, frozen": {"var_rel_eps": 0.0},
}


class SGLD(Optimizer):
    """Δw = -ε/2 g + √ε ξ with ξ standard normal.

    Args:
        lr: ε > 0.

    The gradient must be that of U = -log posterior, not of a mean: a loss over a batch of n of N samples times N/n.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        if lr <= 0:
            raise ValueError(f"lr is {lr!r}, it must be above 0, such as 1 / the largest curvature of U")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / 2).add_(torch.randn_like(p), alpha=math.sqrt(group["lr"]))
        return loss


class Regression(NamedTuple):
    """A linear regression with a known posterior of ŵ = [b | w].

    Args:
        x: (samples, features), of scales 0.1 to 10, correlated, with means.
        y: (samples, 1).
        mean, covariance: Of the posterior, (features + 1,) and square.
    """

    x: Tensor
    y: Tensor
    mean: Tensor
    covariance: Tensor


def regression(features: int = 6) -> Regression:
    """One of SAMPLES samples, float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    z = normal(SAMPLES, features)
    scales = torch.logspace(-1, 1, features, dtype=torch.float64)
    x = (z + 0.5 * z.roll(1, dims=1) + normal(features)) * scales
    y = (x / scales) @ normal(features, 1) + 1 + NOISE * normal(SAMPLES, 1)
    a = torch.cat([torch.ones(SAMPLES, 1, dtype=torch.float64), x], 1)
    precision = a.T @ a / NOISE**2 + torch.eye(features + 1, dtype=torch.float64) / PRIOR**2
    covariance = precision.inverse()
    return Regression(x, y, (covariance @ a.T @ y / NOISE**2)[:, 0], covariance)


def chains(problem: Regression, method: str, rate: float, batch: int, steps: int) -> Tensor:
    """Every EVERY-th state of CHAINS chains, (states, chains, features + 1); frozen: P stays after a tenth.

    Chains are the rows of one layer: P treats all rows alike, and the noise of each is its own.
    """
    torch.manual_seed(0)
    model = nn.Linear(problem.x.shape[1], CHAINS).double()
    optimizer: Any = SGLD(model.parameters(), rate)
    options = METHODS[method]
    if options is not None:
        optimizer = BNPreconditioner(optimizer, model, **options)
    states = []
    for step in range(1, steps + 1):
        rows = slice(None) if batch == SAMPLES else torch.randperm(SAMPLES)[:batch]
        misfit = (model(problem.x[rows]) - problem.y[rows]).square().sum() / (2 * NOISE**2)
        prior = sum(p.square().sum() for p in model.parameters()) / (2 * PRIOR**2)
        optimizer.zero_grad()
        (misfit * (SAMPLES / batch) + prior).backward()
        optimizer.step()
        if method.endswith("frozen") and step == steps // 10:
            optimizer.remove_hooks()
        if step % EVERY == 0:
            states.append(torch.cat([model.bias.detach()[:, None], model.weight.detach()], 1))
    return torch.stack(states)


class Quality(NamedTuple):
    """How far samples are from the posterior, in coordinates in which it is standard normal.

    Args:
        divergence: Of normal distributions, KL(samples ‖ posterior), in nats.
        mean: Error of the mean in the worst coordinate of w, in posterior standard deviations.
        least, most: Standard deviation of the samples over the posterior's, in the directions in which it is off most.
    """

    divergence: float
    mean: float
    least: float
    most: float


def quality(problem: Regression, states: Tensor) -> Quality:
    """Of ``states`` (…, features + 1); infinite where chains diverged."""
    flat = states.reshape(-1, states.shape[-1]) - problem.mean
    if not bool((flat.abs() < FAR * problem.covariance.diagonal().sqrt()).all()):
        return Quality(*[math.inf] * 4)
    root = torch.linalg.cholesky(problem.covariance)
    white = torch.linalg.solve_triangular(root, flat.T, upper=False)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(white)).clamp(min=1e-300)
    divergence = (eigenvalues.sum() - len(root) - eigenvalues.log().sum() + white.mean(1).square().sum()) / 2
    worst = (flat.mean(0).abs() / problem.covariance.diagonal().sqrt()).max()
    least, *_, most = eigenvalues.sqrt().tolist()
    return Quality(float(divergence), float(worst), least, most)


def run(rates: Sequence[float] = RATES) -> list[dict[str, Any]]:
    """All methods at all rates; of a run of N steps the second half counts."""
    problem, found = regression(), []
    for batch in BATCHES:
        for method in [m for m in METHODS if batch < SAMPLES or not m.endswith("frozen")]:
            for rate in tqdm(rates, desc=f"{method}, batch {batch}", unit="run"):
                states = chains(problem, method, rate, batch, max(STEPS))
                for steps in STEPS:
                    q = quality(problem, states[steps // EVERY // 2 : steps // EVERY])
                    values = {k: float(f"{v:.4g}") if math.isfinite(v) else None for k, v in q._asdict().items()}
                    found.append({"method": method, "batch": batch, "rate": rate, "steps": steps, **values})
    return found


def markdown(document: dict[str, Any]) -> str:
    """The best ε of each method for each number of steps; and all of them."""
    runs = document["runs"]
    head = ["", "| | batch | steps | ε | KL | mean off by | sd / posterior's |", "| --- |" + " --- |" * 6]
    lines = ["# SGLD and BNP-SGLD on a linear regression with a known posterior", ""]
    lines += ["Each at its best ε (*: an edge of the grid):", *head, *(_row(r) for r in best(runs)), ""]
    lines += ["All, after the most steps:", *head, *(_row(r) for r in runs if r["steps"] == max(STEPS))]
    return "\n".join([*lines, "", made_with(document["environment"], document["cpu_seconds"]), ""])


def best(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """With the least divergence, per batch, number of steps and method."""
    cells: dict[Any, list[dict[str, Any]]] = {}
    for r in runs:
        if r["divergence"] is not None:
            cells.setdefault((r["batch"], r["steps"], r["method"]), []).append(r)
    for key in sorted(cells, key=lambda k: (-k[0], k[1], list(METHODS).index(k[2]))):
        yield min(cells[key], key=lambda r: r["divergence"])


def _row(r: dict[str, Any]) -> str:
    cells = [
        r["method"],
        str(r["batch"]),
        str(r["steps"]),
        f"{r['rate']:.1e}" + "*" * (r["rate"] in (RATES[0], RATES[-1])),
    ]
    if r["divergence"] is None:
        return f"| {' | '.join(cells)} | diverged | | |"
    numbers = f"{r['divergence']:.3g} | {r['mean']:.2g} sd | {r['least']:.3g} to {r['most']:.3g}"
    return f"| {' | '.join(cells)} | {numbers} |"


def figure(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence from the posterior against ε, after the most steps."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    drawing, axes = plt.subplots(1, len(BATCHES), figsize=(9.6, 3.9), sharey=True)
    styles = ("#999999", "#E69F00", "#0072B2", "#D55E00")  # Okabe–Ito
    for plot, batch in zip(axes, BATCHES, strict=True):
        for method, color in zip(METHODS, styles, strict=True):
            own = [r for r in runs if (r["method"], r["batch"], r["steps"]) == (method, batch, max(STEPS))]
            points = [(r["rate"], r["divergence"]) for r in own if r["divergence"] is not None]
            if points:
                plot.loglog(*zip(*points, strict=True), color=color, marker="o", linestyle="-", label=method)
        plot.set(xlabel="ε", title=f"batch {batch} of {SAMPLES}", xlim=(RATES[0] / 1.5, RATES[-1] * 1.5))
    axes[0].set_ylabel("KL(samples ‖ posterior), nats")
    axes[1].legend(frameon=False, fontsize=8)
    drawing.suptitle(f"{max(STEPS)} steps of {CHAINS} chains; where a line ends the chains diverge", fontsize=10)
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.sgld", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.process_time()
    runs = run()
    document = {
        "benchmark": "sgld",
        "configuration": {"samples": SAMPLES, "chains": CHAINS, "noise": NOISE, "prior": PRIOR},
        "environment": environment(),
        "cpu_seconds": round(time.process_time() - start, 1),
        "runs": runs,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "sgld.json").write_text(compact(document) + "\n")
    text = markdown(json.loads(compact(document)))
    (args.output / "sgld.md").write_text(text)
    figure(runs, args.output / "sgld.png")
    print(text)


if __name__ == "__main__":
    main()
