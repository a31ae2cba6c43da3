"""What an estimate of the Hessian's largest eigenvalue costs, in training steps, and how exact it is.

Ours beside PyHessian's power iteration (https://arxiv.org/abs/1912.07145, rewritten here), hessian-eigenthings, and
scipy's eigsh over our products. Every method is asked for a relative accuracy of 1e-3 by its own means. ``--figure``
draws what BNP does to exact spectra instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.documents import environment
from benchmarks.memory import peak_bytes
from bnp_optim import BNPreconditioner
from bnp_optim.curvature import HessianOperator, estimate_conditioning, lanczos
from bnp_optim.curvature.lanczos import gaussian

NETS = {"digits, 64-32-32-10": (64, 32, 32, 10), "digits, 64-512-512-10": (64, 512, 512, 10)}
BATCH_SIZE = 256
TRAINING = {"initialization": 0, "200 steps": 200}
ACCURACY = 1e-3
Found = tuple[float, int]  # λ_max, products


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, pixels in [0, 1], float64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16), torch.tensor(data.target)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Tanh between Linear layers."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths[1:]):
        layers += [nn.Linear(widths[i], width), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Problem:
    """A net after some steps of BNP-SGD, and one batch."""

    def __init__(self, widths: Sequence[int], steps: int) -> None:
        torch.manual_seed(0)
        x, y = digits()
        self.model = mlp(widths)
        self.optimizer = BNPreconditioner(torch.optim.SGD(self.model.parameters(), lr=0.1), self.model)
        order = torch.randperm(len(x))
        self.x, self.y = x[order].float(), y[order]
        for i in range(steps):
            self.train(self.x.roll(-64 * i, 0)[:64], self.y.roll(-64 * i)[:64])
        self.x, self.y = self.x[:BATCH_SIZE], self.y[:BATCH_SIZE]
        if not steps:  # P needs one look at the data
            self.optimizer.param_groups[0]["lr"] = 0.0
            self.train(self.x, self.y)
        self.optimizer.remove_hooks()
        self.optimizer.zero_grad()

    def train(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def params(self) -> list[Tensor]:
        return list(self.model.parameters())


def ours(problem: Problem) -> Found:
    report = estimate_conditioning((problem.loss, BATCH_SIZE), problem.params(), num_probes=0, tolerance=ACCURACY)
    return report.lambda_max, report.num_products


def ours_preconditioned(problem: Problem) -> Found:
    report = estimate_conditioning(
        (problem.loss, BATCH_SIZE),
        problem.params(),
        preconditioner=problem.optimizer,
        num_probes=0,
        tolerance=ACCURACY,
    )
    return report.lambda_max, report.num_products


def ours_full(problem: Problem) -> Found:
    report = estimate_conditioning((problem.loss, BATCH_SIZE), problem.params())
    return report.lambda_max, report.num_products


def power_iteration(problem: Problem) -> Found:
    """PyHessian's: the gradient's graph is kept, and a product is one more backward through it; at most 100."""
    params = problem.params()
    gradients = torch.autograd.grad(problem.loss(), params, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator) for p in params]
    value: float | None = None
    for i in range(100):
        norm = float(torch.sqrt(sum((a * a).sum() for a in v))) + 1e-6  # type: ignore[arg-type]
        v = [a / norm for a in v]
        product = torch.autograd.grad(gradients, params, v, retain_graph=True)
        now = float(sum((a * b).sum() for a, b in zip(product, v, strict=True)))
        if value is not None and abs(value - now) / (abs(value) + 1e-6) < ACCURACY:
            return now, i + 1
        value, v = now, list(product)
    assert value is not None
    return value, 100


def eigenthings(problem: Problem) -> Found:
    """It makes as many steps as it is told; its default, 2, is 20 % off here."""
    import hessian_eigenthings as peer

    loss = peer.supervised_loss(F.cross_entropy)
    operator = peer.HessianOperator(problem.model, [(problem.x, problem.y)], loss)
    counted = _Counted(operator.matvec)
    operator.matvec = counted
    found = peer.lanczos(operator, k=1, which="LA", tol=ACCURACY, max_iter=20, seed=0)
    return float(found.eigenvalues[0]), counted.calls


def scipy_eigsh(problem: Problem) -> Found:
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = HessianOperator(problem.loss, problem.params())
    start = gaussian(operator.size, torch.Generator().manual_seed(0), torch.float32, torch.device("cpu")).numpy()
    linear = LinearOperator(
        (operator.size,) * 2, matvec=lambda v: operator(torch.from_numpy(v).float().view(-1)).numpy(), dtype="float32"
    )
    (value,) = eigsh(linear, k=1, which="LA", tol=ACCURACY, v0=start, return_eigenvectors=False)
    return float(value), operator.num_products


class _Counted:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.function(v)


METHODS: dict[str, Callable[[Problem], Found]] = {
    "ours": ours,
    "power iteration (PyHessian)": power_iteration,
    "hessian-eigenthings, 20 steps": eigenthings,
    "scipy eigsh": scipy_eigsh,
    "ours, PᵀHP": ours_preconditioned,
    "ours, 5 probes × 50": ours_full,
}


def truth(problem: Problem, *, preconditioned: bool) -> float:
    """λ_max from 80 products in float64, where it has converged to rounding."""
    from bnp_optim.curvature import PreconditionedOperator

    x, model = problem.x, problem.model.double()
    try:
        operator = PreconditionedOperator(
            HessianOperator(lambda: F.cross_entropy(model(x.double()), problem.y), model.parameters()),
            problem.optimizer if preconditioned else None,
        )
        start = gaussian(operator.size, torch.Generator().manual_seed(1), torch.float64, torch.device("cpu"))
        found = lanczos(operator, start, num_steps=80)
        assert found.error(found.steps - 1) < 1e-8 * float(found.ritz_values[-1])
        return float(found.ritz_values[-1])
    finally:
        model.float()


def in_steps(method: Callable[[], Found], train: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Seconds of ``method``, and the median ratio to training steps that run right before it."""
    times, ratios = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(20):
            train()
        middle = time.perf_counter()
        method()
        times.append(time.perf_counter() - middle)
        ratios.append(times[-1] / (middle - start) * 20)
    return statistics.median(times), statistics.median(ratios)


class _Stepping:
    """What :func:`peak_bytes` drives."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step


def measure(widths: Sequence[int], steps: int, repeats: int) -> dict[str, Any]:
    """Every method on one problem."""
    problem = Problem(widths, steps)
    plain = torch.optim.SGD(problem.params(), lr=0.0, momentum=0.9)

    def train() -> None:
        plain.zero_grad()
        problem.loss().backward()
        plain.step()

    for _ in range(10):
        train()
    exact = {flag: truth(problem, preconditioned=flag) for flag in (False, True)}
    rows: dict[str, Any] = {}
    for name, method in METHODS.items():
        try:
            value, products = method(problem)
        except ImportError as error:
            rows[name] = {"missing": str(error)}
            continue
        took, ratio = in_steps(partial(method, problem), train, repeats)
        plain.zero_grad()
        # of the long one the profiler's own records would be gigabytes
        memory = peak_bytes(lambda m=method: _Stepping(partial(m, problem)), 3) if products < 200 else None
        rows[name] = {
            "seconds": took,
            "training_steps": ratio,
            "products": products,
            "relative_error": abs(value / exact["PᵀHP" in name] - 1),
            "peak_mib": None if memory is None else memory / 2**20,
        }
    train_s = statistics.median(r["seconds"] / r["training_steps"] for r in rows.values() if "seconds" in r)
    training = peak_bytes(lambda: _Stepping(train), 3)
    return {
        "parameters": sum(p.numel() for p in problem.params()),
        "step_ms": 1e3 * train_s,
        "step_peak_mib": training / 2**20,
        "methods": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| net, state | method | cost, training steps | products | relative error | peak MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row, result in results.items():
        label = (
            f"{row} ({result['parameters']} parameters, {result['step_ms']:.2g} ms and {result['step_peak_mib']:.1f} "
        )
        label += "MiB per step)"
        for name, r in result["methods"].items():
            if "missing" in r:
                lines.append(f"| {label} | {name} | not installed | | | |")
                continue
            missed = " **missed**" if r["relative_error"] > ACCURACY else ""
            memory = "" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}"
            lines.append(
                f"| {label} | {name} | {r['training_steps']:.0f} | {r['products']} | {r['relative_error']:.0e}{missed} "
                f"| {memory} |"
            )
            label = ""
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Cost against error, one panel per net and state."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["#0072B2", "#D55E00", "#E69F00", "#009E73"]
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4), sharex=True, sharey=True, squeeze=False)
    for ax, (row, result) in zip(axes[0], results.items(), strict=True):
        for (name, r), color in zip(list(result["methods"].items())[: len(colors)], colors, strict=True):
            if "missing" not in r:
                ax.plot(r["training_steps"], max(r["relative_error"], 1e-9), "o", color=color, label=name, markersize=9)
        ax.axhline(ACCURACY, color="0.5", linestyle=":", linewidth=1)
        ax.set_yscale("log")
        ax.set_title(row.replace(": ", "\n"), fontsize=10)
        ax.set_xlabel("cost, training steps")
    axes[0][0].set_ylabel("relative error of λ_max")
    axes[0][0].set_xlim(left=0)
    axes[0][-1].legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each estimate; the median counts (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="(benchmarks/results)")
    parser.add_argument(
        "--figure",
        type=Path,
        nargs="?",
        const=Path(__file__).parents[1] / "docs" / "curvature.png",
        help="draw exact spectra with and without BNP to this file instead (docs/curvature.png)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.figure:
        from benchmarks.curvature_figure import draw

        draw(args.figure, args.output)
        return
    start = time.perf_counter()
    results = {
        f"{net}: {state}": measure(widths, steps, args.repeats)
        for net, widths in NETS.items()
        for state, steps in TRAINING.items()
    }
    about = environment() | {"threads": 1, "batch_size": BATCH_SIZE, "date": time.strftime("%Y-%m-%d")}
    about["total_seconds"] = round(time.perf_counter() - start)
    args.output.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"settings": about, "results": results}, indent=1) + "\n"
    (args.output / "curvature.json").write_text(document)
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    notes = "Peak memory is that of torch's tensors above the resting net's (scipy's own vectors are not in it)."
    (args.output / "curvature.md").write_text(f"{__doc__}\n{notes}\n\n{table(results)}\n({facts})\n")
    plot(results, args.output / "curvature.png")
    print(table(results))


if __name__ == "__main__":
    main()
