"""The report as a table, as numbers, as a picture; and the promise that torch alone is needed."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from bnp_optim.curvature import closures_from_loader, estimate_conditioning
from tests.curvature.problems import evaluate
from tests.curvature.problems import mlp as net


def problem() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64) * 2 + 1
    model = net((5, 4, 3))
    return model, evaluate(model, x, torch.randint(0, 3, (24,), generator=generator))


def test_table_and_numbers() -> None:
    model, closure = problem()
    told: list[tuple[int, int]] = []
    report = estimate_conditioning((closure, 24), model.parameters(), num_probes=3, progress=lambda *x: told.append(x))
    assert report.num_parameters == report.num_steps == 39  # 50 are clipped
    assert len(told) == report.num_products
    assert {most for _, most in told} == {3 * 39}
    text = str(report)
    assert text.startswith("H (hessian), 39 parameters, mean over 24 samples\n")
    assert "num_steps was 50, and is clipped to the number of parameters, 39" in text
    assert all(f"\n{name} " in text for name in ("lambda_max", "kappa_mean", "kappa_q90", "kappa_lower_bound"))
    assert "by double backward" in text
    numbers = report.to_dict()
    assert all(type(v) is float for v in numbers.values())
    assert numbers["lambda_max"] == report.lambda_max
    assert numbers["num_samples"] == 24.0
    assert numbers["lambda_max_converged"] == 1.0
    assert "density" not in numbers
    assert "method" not in numbers


def test_without_probes() -> None:
    model, closure = problem()
    report = estimate_conditioning(closure, model.parameters(), num_probes=0, matrix="gauss_newton")
    assert report.num_samples is None
    assert math.isnan(report.kappa_mean)
    assert math.isnan(report.to_dict()["num_samples"])
    assert "kappa_mean" not in str(report)
    assert "mean over an unknown number of samples" in str(report)
    with pytest.raises(ValueError, match="estimate with num_probes of at least 1"):
        report.plot()
    one = estimate_conditioning(closure, model.parameters(), num_probes=1)
    assert one.kappa_mean > 1
    assert math.isnan(one.kappa_mean_error)


def test_a_loss_without_curvature() -> None:
    model, _ = problem()
    report = estimate_conditioning(lambda: model[2].bias.sum(), model.parameters())
    assert (report.lambda_max, report.lambda_min, report.negative_ratio) == (0, 0, pytest.approx(math.nan, nan_ok=True))
    assert report.max_learning_rate == math.inf
    assert math.isnan(report.kappa_mean)
    assert math.isnan(report.kappa_lower_bound)


def test_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, closure = problem()
    report = estimate_conditioning(closure, model.parameters())
    ax = report.plot()
    assert report.plot(ax) is ax
    curve, line = ax.lines[:2]
    x, y = (torch.as_tensor(v, dtype=torch.float64) for v in curve.get_data())
    largest = max(abs(report.lambda_max), abs(report.lambda_min))
    assert float(torch.trapezoid(y, torch.asinh(x / (1e-3 * largest)))) == pytest.approx(1, rel=0.02)
    assert line.get_xdata()[0] == report.lambda_max
    ax.figure.canvas.draw()
    pyplot.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
        report.plot()


def test_torch_alone_is_needed() -> None:
    code = (
        "import sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import bnp_optim\n"
        "assert 'bnp_optim.curvature' not in sys.modules\n"
        "import bnp_optim.curvature\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'numpy', 'scipy', 'matplotlib', 'tqdm'}, new\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)  # its asserts are in there


def test_a_loader_of_several_inputs() -> None:
    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.linear(a + b)  # type: ignore[no-any-return]

    model = Sum()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.ones(6, 3), torch.ones(6, 3), torch.zeros(6, dtype=torch.long)), 4
    )
    batches = closures_from_loader(model, torch.nn.functional.cross_entropy, loader)
    assert [b.num_samples for b in batches] == [4, 2]
    assert estimate_conditioning(batches, model.parameters(), num_probes=0).num_samples == 6
