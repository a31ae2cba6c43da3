"""The code in README and docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.layers import registry
from tests.conftest import train

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.S)


def test_readme(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = ("print(optimizer.coverage())", "def configure_optimizers", "def stream", "BNPAdamW", "lightning_callbacks")
    loop, lightning, stream, named, watching = (next(b for b in blocks("README.md") if mark in b) for mark in marks)
    scope: dict[str, Any] = {}
    exec(loop, scope)
    assert scope["optimizer"].statistics["0"].count == 320
    shown = capsys.readouterr().out
    assert shown.startswith("BNPreconditioner(SGD, 2 layers, mode='gradient'")
    assert shown.strip().endswith("4 of 4 parameters preconditioned")

    exec(stream, scope)
    assert scope["optimizer"].statistics["0"].count == 200
    assert scope["error"] / 200 < 1.0  # the answer is around 5

    torch.manual_seed(0)
    folded = dict(scope)
    exec(next(b for b in blocks("README.md") if "import fold_normalization" in b), folded)
    assert repr(folded["optimizer"]).startswith("BNPreconditioner(AdamW, 3 layers, mode='two_sided'")
    assert 0.5 < folded["model"](folded["images"]).std(0).mean() < 0.65  # √(1/3) = .58; as PyTorch starts it .02

    exec(named, scope)
    assert repr(scope["optimizer"]).startswith("BNPAdamW(AdamW, 2 layers, mode='two_sided'")

    pytest.importorskip("pytorch_lightning", reason="the Lightning example needs pytorch-lightning")
    exec(lightning, scope)
    optimizer = scope["Classifier"]().configure_optimizers()
    assert repr(optimizer).startswith("BNPreconditioner(AdamW, 2 layers, mode='two_sided'")

    monkeypatch.chdir(tmp_path)  # logs go there
    exec(watching, scope)
    data = torch.utils.data.TensorDataset(torch.randn(64, 20), torch.randint(2, (64,)))
    scope["trainer"].fit(scope["Classifier"](), torch.utils.data.DataLoader(data, batch_size=32))
    assert {"hessian/kappa_mean", "preconditioned_hessian/kappa_mean", "layers/net.0/kappa"} <= set(
        scope["trainer"].callback_metrics
    )


def test_integrations_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One net all along: what was measured goes on from client to client, but each wrapper starts anew."""
    batches = [(torch.randn(8, 20), torch.randint(2, (8,))) for _ in range(4)]
    scope: dict[str, Any] = {"batches": batches}
    amp, fabric, accelerate, resume = blocks("docs/integrations.md")
    exec(amp, scope)
    assert 0 < scope["optimizer"].statistics["0"].count <= 32  # the scaler may skip the first steps
    pytest.importorskip("lightning_fabric", reason="the Fabric example needs it")
    pytest.importorskip("accelerate", reason="the Accelerate example needs it")
    for code in (fabric, accelerate):
        exec(code, scope)
        assert scope["wrapper"].statistics["0"].count == 32
    monkeypatch.chdir(tmp_path)
    before = scope["wrapper"].statistics["0"].mean
    exec(resume, scope)
    assert torch.equal(scope["wrapper"].statistics["0"].mean, before)


def test_the_tests_that_the_integrations_page_names() -> None:
    rows = [line for line in (ROOT / "docs/integrations.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    names = {name for row in rows for name in re.findall(r"`((?:\w+/)?test_\w+\.py)`", row.split("|")[-2])}
    assert len(names) > 15
    assert not [n for n in names if not any((ROOT / "tests" / f / n).is_file() for f in ("", "clients"))]


def test_callbacks_page() -> None:
    pytest.importorskip("pytorch_lightning", reason="the callbacks need pytorch-lightning")
    scope: dict[str, Any] = {}
    for code in blocks("docs/callbacks.md"):
        exec(code, scope)
    monitors = [scope[name](every_n_epochs=1) for name in ("GaussNewton", "Embedded")]
    monitors.append(scope["EarlyOften"](every_n_train_steps=1000))
    assert monitors[2].should_update(step_idx=15) and not monitors[2].should_update(step_idx=16)
    model = nn.Linear(3, 2)
    outputs, loss = monitors[0].outputs_and_loss(model, (torch.ones(4, 3), torch.ones(4, dtype=torch.long)))
    assert loss(outputs).shape == ()


def test_initialization_page(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    (code,) = blocks("docs/initialization.md")
    exec(code, scope)
    assert [x.name for x in scope["health"].layers] == ["0", "2", "4"]
    assert set(scope["steps"].divergence) == {"gradient", "preconditioned"}
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_the_table_of_the_readme() -> None:
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2, bias=False))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train(model, optimizer, [torch.randn(4, 20)])
    table = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)[0]
    lines = [[cell.split() for cell in line.split("  ") if cell] for line in table.splitlines()]
    mine = [[cell.split() for cell in line.split("  ") if cell] for line in str(optimizer.coverage()).splitlines()]
    assert lines[0] == mine[0]
    assert lines[2:] == mine[2:]


def test_construction_page() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    scope: dict[str, Any] = {}
    for code in blocks("docs/construction.md"):
        exec(code, scope)
    assert same_groups(scope["by_hand"], scope["optimizer"])
    assert [len(group["params"]) for group in scope["optimizer"].param_groups] == [2, 4]


def same_groups(a: Any, b: Any) -> bool:
    return [(g["lr"], g["weight_decay"], [id(p) for p in g["params"]]) for g in a.param_groups] == [
        (g["lr"], g["weight_decay"], [id(p) for p in g["params"]]) for g in b.param_groups
    ]


@pytest.fixture
def layers_page() -> Any:
    """What docs/layers.md defines; its registrations are taken back."""
    known = dict(registry._REGISTRY)
    scope: dict[str, Any] = {}
    for code in blocks("docs/layers.md"):
        exec(code, scope)
    yield scope
    registry._REGISTRY.clear()
    registry._REGISTRY.update(known)


@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
def test_the_layer_type_of_the_layers_page(layers_page: dict[str, Any], step_scale: Any) -> None:
    """It is Linear on the scaled input."""
    equal, linear = nn.Sequential(layers_page["EqualLinear"](4, 3)), nn.Sequential(nn.Linear(4, 3))
    linear.load_state_dict(equal.state_dict())
    data = [torch.randn(6, 4) + 1 for _ in range(4)]
    for model, inputs in ((equal, data), (linear, [x / 2 for x in data])):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, BNPreconditioner(base, model, step_scale=step_scale), inputs)
    for p, q in zip(equal.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
def test_the_module_with_several_weights_of_the_layers_page(
    layers_page: dict[str, Any], step_scale: Any, base_class: Any
) -> None:
    """Its weights are three Linear layers."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            self.down = nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    unit, apart = layers_page["GatedUnit"](4, 6).double(), Apart().double()
    names = ["gate", "up", "down"]
    apart.load_state_dict({f"{n}.weight": getattr(unit, f"{n}_weight") for n in names})
    data = [torch.randn(2, 3, 4, dtype=torch.float64) + 1 for _ in range(4)]
    wrapped = []
    for model in (unit, apart):
        base = base_class(model.parameters(), lr=0.01)
        wrapped.append(BNPreconditioner(base, model, step_scale=step_scale))
        train(model, wrapped[-1], data)
    assert list(wrapped[0].statistics) == list(wrapped[1].statistics) == names
    for n in names:
        mine, theirs = wrapped[0].statistics[n], wrapped[1].statistics[n]
        torch.testing.assert_close(mine.variance, theirs.variance)
        assert int(mine.count) == int(theirs.count) == 24
    assert wrapped[0].coverage().preconditioned == ("gate_weight", "up_weight", "down_weight")
    for n in names:
        torch.testing.assert_close(getattr(unit, f"{n}_weight"), getattr(apart, n).weight, rtol=1e-9, atol=1e-12)
