"""Exact spectra of a digits net along its training, of H and of PᵀHP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.curvature import digits, mlp
from bnp_optim import BNPreconditioner
from bnp_optim.curvature import BNPCoordinates, HessianOperator, layer_conditioning

WIDTHS = (64, 32, 32, 10)
EPOCHS = (0, 5, 60)
BATCH_SIZE = 64
LEARNING_RATE = 0.1


def spectra() -> dict[int, dict[str, Any]]:
    """By epoch of training with BNP-SGD: the eigenvalues of H and of PᵀHP over all data, and condition numbers."""
    torch.manual_seed(0)
    x, y = digits()
    model = mlp(WIDTHS).double()
    found = {}
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), model)
    for epoch in range(max(EPOCHS) + 1):
        if epoch in EPOCHS:
            found[epoch] = _at(model, optimizer if epoch else _measured(model))
            print(f"epoch {epoch}: " + ", ".join(f"{k} {v:.3g}" for k, v in found[epoch]["numbers"].items()))
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return found


def _measured(model: torch.nn.Sequential) -> BNPreconditioner:
    """Statistics before the first step: one look at the data, without moving."""
    x, y = digits()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.0), model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.remove_hooks()
    return optimizer


def _at(model: torch.nn.Sequential, optimizer: BNPreconditioner) -> dict[str, Any]:
    x, y = digits()
    params = list(model.parameters())

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    with optimizer.pause_statistics():
        operator = HessianOperator((loss, len(x)), params)
        hessian = torch.stack([operator(e) for e in torch.eye(operator.size, dtype=torch.float64)])
        first = layer_conditioning(model, (loss, len(x)), preconditioner=optimizer)["0"]
        value = float(loss().detach())
    coordinates = BNPCoordinates(params, optimizer)

    def pulled(matrix: torch.Tensor) -> torch.Tensor:
        """Rows through Pᵀ."""
        parts = [
            [t.view(p.shape) for t, p in zip(torch.split(row, [p.numel() for p in params]), params, strict=True)]
            for row in matrix
        ]
        return torch.stack([torch.cat([t.reshape(-1) for t in coordinates.to_z(row)]) for row in parts])

    values = {"H": torch.linalg.eigvalsh(hessian), "PᵀHP": torch.linalg.eigvalsh(pulled(pulled(hessian).T))}
    numbers = {"loss": value, "input kappa H": first.kappa, "input kappa PᵀHP": first.kappa_preconditioned}
    for name, v in values.items():
        size = v.abs()
        numbers[f"lambda_max {name}"] = float(v[-1])
        numbers[f"lambda_min {name}"] = float(v[0])
        numbers[f"kappa_mean {name}"] = float(v[-1] / size.mean())
        numbers[f"kappa_q90 {name}"] = float(size.max() / size.quantile(0.9))
    return {"values": values, "numbers": numbers}


def draw(path: Path, output: Path) -> None:
    """Draw to ``path``, and write the numbers to ``output``/curvature_spectra.json."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = spectra()
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4.0), sharey=True)
    for ax, (epoch, state) in zip(axes, found.items(), strict=True):
        for name, color in (("H", "#D55E00"), ("PᵀHP", "#0072B2")):
            size = state["values"][name].abs().sort(descending=True).values
            share = (torch.arange(len(size)) + 0.5) / len(size)
            kappa = state["numbers"][f"kappa_mean {name}"]
            ax.plot(
                share.tolist(),
                (size / size[0]).tolist(),
                color=color,
                linewidth=2,
                label=f"{name}: κ_mean {kappa:.0f}, λ_max {state['numbers'][f'lambda_max {name}']:.2g}",
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(1e-6, 2)
        ax.set_xlim(1e-4, 1)
        ax.set_title("at initialization" if not epoch else f"after {epoch} epochs", fontweight="bold")
        ax.set_xlabel("share of the eigenvalues that are larger")
        ax.legend(loc="lower left", frameon=False, fontsize=9)
    axes[0].set_ylabel("|λ| / |λ|max")
    figure.suptitle("Digits, MLP 64-32-32-10: exact spectra of the loss's Hessian, all 3466 eigenvalues")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    settings = {
        "widths": WIDTHS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    numbers = {str(epoch): state["numbers"] for epoch, state in found.items()}
    text = json.dumps({"settings": settings, "epochs": numbers}, indent=1, ensure_ascii=False) + "\n"
    (output / "curvature_spectra.json").write_text(text, encoding="utf-8")
