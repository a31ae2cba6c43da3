"""``step_scale="common"``: one q² for all layers, the geometric mean of their own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPMuon, BNPreconditioner, CombinedOptimizer
from tests.conftest import inputs, mlp, same, train, weights
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer

WIDE = 40
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@pytest.fixture(autouse=True)
def _little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of different widths are in different banks, however small they are."""
    monkeypatch.setattr("bnp_optim.statistics._SLACK", 0)


class Branches(nn.Module):
    """Two layers in a row, of very different widths, and one beside them that is not always called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wide, self.narrow, self.sometimes = nn.Linear(WIDE, 3), nn.Linear(3, 2), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        self.hidden = self.wide(x)
        y: Tensor = self.narrow(self.hidden)
        return y + self.sometimes(self.hidden) if both else y


def references() -> dict[str, ReferenceBNP]:
    sizes = {"wide": (3, WIDE, True), "narrow": (2, 3, True), "sometimes": (2, 3, False)}
    return {name: ReferenceBNP(ReferenceLayer("linear", (o, i), bias)) for name, (o, i, bias) in sizes.items()}


def q2_of(optimizer: BNPreconditioner) -> dict[str, float]:
    tracker = optimizer._tracker
    return {layer.name: float(tracker.snapshot(layer)["q2"]) for layer in tracker.layers}


@pytest.mark.parametrize("blind", [False, True], ids=["on the host", "on the device"])
def test_against_the_layers_own_in_numpy(blind: bool) -> None:
    """Steps of the gradient form and q², over banks; a layer without samples takes no part and keeps what it had."""
    model, own = Branches().double(), references()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=1e-3), model, step_scale="common")
    if blind:
        optimizer._tracker._on_host = False
        optimizer._tracker.reset()
    assert len(optimizer._tracker._shelves) == 2
    generator = torch.Generator().manual_seed(5)
    kept = 1.0
    for step in range(8):
        both = step % 3 != 1
        x = torch.randn(2 + step % 2, WIDE, generator=generator, dtype=torch.float64) + 1
        optimizer.zero_grad()
        model(x, both=both).square().mean().backward()
        present = [name for name in own if both or name != "sometimes"]
        for name in present:
            own[name].observe((x if name == "wide" else model.hidden).detach().numpy())
            own[name].commit()
        found = [own[name].q2 for name in present]
        common = float(np.exp(np.mean(np.log(found))))
        assert max(found) > 2 * common > 2  # the wide layer's is far from it
        kept = common if both else kept
        expected = {}
        for name in present:
            layer, reference = getattr(model, name), own[name]
            reference.q2 = common  # until its next commit
            bias = None if layer.bias is None else layer.bias.grad.numpy()
            expected[name] = reference.gradient_form(layer.weight.grad.numpy(), bias)[0]
        optimizer.step()
        for name in present:
            np.testing.assert_allclose(getattr(model, name).weight.grad.numpy(), expected[name], rtol=1e-9, atol=1e-14)
        q2 = q2_of(optimizer)
        assert q2 == pytest.approx({"wide": common, "narrow": common, "sometimes": kept}, rel=1e-12)


@pytest.mark.parametrize("where", ["wide", "narrow"])
@pytest.mark.parametrize("blind", [False, True], ids=["on the host", "on the device"])
def test_samples_that_are_not_finite_change_nothing(where: str, blind: bool) -> None:
    """Not even in the bank of the other layers."""
    model = Branches()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=1e-3), model, step_scale="common")
    if blind:
        optimizer._tracker._on_host = False
        optimizer._tracker.reset()
    x = torch.ones(2, WIDE).cumsum(0)
    for poisoned in (False, True):
        before = {n: optimizer._tracker.snapshot(x) for n, x in zip("abc", optimizer._tracker.layers, strict=True)}
        handle = getattr(model, where).register_forward_pre_hook(lambda m, args: (args[0] * torch.inf,))
        if not poisoned:
            handle.remove()
        optimizer.zero_grad()
        model(x, both=True).square().mean().backward()
        optimizer.step()
        handle.remove()
    after = {n: optimizer._tracker.snapshot(x) for n, x in zip("abc", optimizer._tracker.layers, strict=True)}
    assert same(before, after)
    assert int(after["a"]["count"]) == 2


def test_it_survives_a_checkpoint_and_an_interval() -> None:
    model, resumed = mlp(), mlp()
    options: dict[str, Any] = {"step_scale": "common", "stat_interval": 2}
    optimizer = BNPreconditioner(torch.optim.AdamW(model.parameters(), lr=0.01), model, **options)
    train(model, optimizer, inputs(5, batch=1))
    assert len(set(q2_of(optimizer).values())) == 1
    resumed.load_state_dict(model.state_dict())
    other = BNPreconditioner(torch.optim.AdamW(resumed.parameters(), lr=0.01), resumed, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert q2_of(other) == q2_of(optimizer)
    train(model, optimizer, inputs(3, batch=1, seed=1))
    train(resumed, other, inputs(3, batch=1, seed=1))
    assert same(weights(model), weights(resumed))


def muon_and_adamw(model: nn.Sequential) -> CombinedOptimizer:
    rest = [p for p in model.parameters() if p is not model[0].weight]
    return CombinedOptimizer([torch.optim.Muon([model[0].weight]), torch.optim.AdamW(rest)])


class SomebodysMuon(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None: ...


@needs_muon
def test_auto_is_common_around_muon_and_the_layers_own_around_others() -> None:
    model = mlp()
    for base in (
        muon_and_adamw(model),
        CombinedOptimizer([muon_and_adamw(model)]),
        torch.optim.Muon([model[0].weight, model[2].weight]),
    ):
        optimizer = BNPreconditioner(base, model)
        train(model, optimizer, inputs(2, batch=1))
        assert "step_scale='common'" in repr(optimizer)
        assert len(set(q2_of(optimizer).values())) == 1
        assert "step_scale='trace'" in repr(BNPreconditioner(base, model, step_scale="trace"))
    assert "step_scale='common'" in repr(BNPMuon(model))
    assert "step_scale='common'" in repr(BNPreconditioner(SomebodysMuon(model.parameters(), {"lr": 0.1}), model))
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        optimizer = BNPreconditioner(kind(model.parameters(), lr=0.01), model)  # type: ignore[call-arg]
        train(model, optimizer, inputs(2, batch=1))
        assert "step_scale='trace'" in repr(optimizer)
        assert len(set(q2_of(optimizer).values())) == 2


@needs_muon
def test_wide_layers_are_not_held_back_under_muon() -> None:
    """The lengths of two matrices' steps in z, which Muon makes the same: so they are with one q, and only so."""
    ratios = {}
    for scale in ("common", "trace"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(400, 4, bias=False), nn.Linear(4, 4, bias=False))
        base = torch.optim.Muon(model.parameters(), lr=1e-3, weight_decay=0.0)
        optimizer = BNPreconditioner(base, model, step_scale=scale, var_rel_eps=0.0, stat_decay=0.0)
        x = torch.randn(8, 400)
        before = weights(model)
        model(x).square().mean().backward()
        spreads = [x.std(0, correction=0), model[0](x).detach().std(0, correction=0)]
        optimizer.step()
        steps = [
            (w.detach() - before[f"{i}.weight"]) * s
            for i, (w, s) in enumerate(zip(model.parameters(), spreads, strict=True))
        ]
        ratios[scale] = float(steps[0].norm() / steps[1].norm())
    assert ratios["common"] == pytest.approx(1, abs=0.15)  # Newton–Schulz leaves singular values of .7 to 1.2
    assert ratios["trace"] < 0.25
