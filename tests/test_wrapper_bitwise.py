"""With P = I the wrapper is its base, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import IDENTITY, identity_statistics, same, takes

STEPS = 10
DECAY = {"weight_decay": 0.1}
ADAM = {
    "plain": {},
    "decay": DECAY,
    "maximize": {"maximize": True, **DECAY},
}
DECOUPLED = {"decoupled": {"decoupled_weight_decay": True, **DECAY}}
AMSGRAD = {"amsgrad": {"amsgrad": True, **DECAY}}
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "SGD": {
        "plain": {},
        "nesterov": {"momentum": 0.9, "nesterov": True, **DECAY},
        "maximize": {"momentum": 0.9, "maximize": True, **DECAY},
    },
    "ASGD": {"plain": {}, "decay": DECAY},
    "Adam": ADAM | DECOUPLED | AMSGRAD,
    "AdamW": {**ADAM, **AMSGRAD, "none": {"weight_decay": 0.0}},
    "NAdam": ADAM | DECOUPLED,
    "RAdam": ADAM | DECOUPLED,
    "Adagrad": ADAM,
    "RMSprop": {
        **ADAM,
        "centered": {"centered": True, **DECAY},
        "momentum": {"momentum": 0.9, **DECAY},
    },
    "Adamax": ADAM,
    "Adadelta": ADAM,
    "Rprop": {"plain": {}, "maximize": {"maximize": True}},
    "Muon": {"plain": {}, "none": {"weight_decay": 0.0}, "no nesterov": {"nesterov": False}},
}
# The two-sided form has the base compute its update from zero and adds it to w afterwards. Where torch adds in one
# rounding, or in two portions, that is another rounding of the same sum:
ANOTHER_ROUNDING = {
    **{
        (f"SGD {kind}", form): "fuses lr·buffer with the sum"
        for kind in ("nesterov", "maximize")
        for form in ("for-loop", "foreach", "fused")
    },
    ("NAdam", "for-loop"): "adds gradient and momentum one after the other",
    ("NAdam", "foreach"): "adds gradient and momentum one after the other",
    ("RAdam", "foreach"): "fuses the last product with the sum",
    ("RMSprop momentum", "for-loop"): "fuses lr·buffer with the sum",
    ("RMSprop momentum", "foreach"): "fuses lr·buffer with the sum",
    ("Adadelta", "for-loop"): "fuses lr·Δ with the sum",
    ("Adadelta", "foreach"): "fuses lr·Δ with the sum",
    ("Muon", "for-loop"): "fuses lr·update with the sum",
    ("Adam", "fused"): "fuses the last product with the sum",
    ("AdamW", "fused"): "fuses the last product with the sum",
}
FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}


class Net(nn.Module):
    """A convolution without and with groups, a dense layer with and without bias, a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.grouped = nn.Conv1d(4, 4, 2, groups=2, bias=False)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(12, 6)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).tanh())
        x = self.norm(x.transpose(1, 2)).flatten(1)
        out: Tensor = self.out(self.hidden(x).tanh())
        return out


def cases() -> list[Any]:
    found = []
    for base, variants in BASES.items():
        for variant, options in variants.items():
            for form in ("for-loop", "foreach", "fused"):
                if (base == "Muon" and form != "for-loop") or (form == "fused" and base not in FUSED):
                    continue  # torch has no such implementation
                extra = {} if base == "Muon" else {"foreach": form == "foreach"}
                if form == "fused":
                    extra = {"fused": True}
                reason = ANOTHER_ROUNDING.get((f"{base} {variant}", form)) or ANOTHER_ROUNDING.get((base, form))
                here = hasattr(torch.optim, base) and all(takes(base, option) for option in options)
                marks = [pytest.mark.skipif(not here, reason=f"this torch has no {base} {variant}")]
                label = f"{base}-{variant}-{form}" + ("" if reason is None else "-within an ulp")
                found.append(pytest.param(base, options | extra, reason is None, id=label, marks=marks))
    return found


def build(base_name: str, options: dict[str, Any]) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Net()
    parameters = list(model.parameters())
    if base_name == "Muon":  # takes matrices only
        parameters = [model.hidden.weight, model.out.weight]
    return model, getattr(torch.optim, base_name)(parameters, lr=0.05, **options)


@pytest.mark.parametrize(("base_name", "options", "exact"), cases())
def test_the_identity_changes_no_bit(base_name: str, options: dict[str, Any], exact: bool) -> None:
    """Of parameters and of the base's state. Where rounding differs, both start each step at the same weights."""
    plain_model, plain = build(base_name, options)
    model, base = build(base_name, options)
    optimizer = BNPreconditioner(base, model, **IDENTITY)
    identity_statistics(optimizer)
    assert len(optimizer.coverage().preconditioned) == (2 if base_name == "Muon" else 6)
    for x in torch.randn(STEPS, 5, 2, 6):
        optimizer.zero_grad()
        plain.zero_grad()
        plain_model(x).square().mean().backward()
        with optimizer.pause_statistics():
            model(x).square().mean().backward()
        plain.step()
        optimizer.step()
        for name, expected in plain_model.state_dict().items():
            found = model.state_dict()[name]
            torch.testing.assert_close(found, expected, rtol=0 if exact else 5e-7, atol=0 if exact else 1e-7, msg=name)
        for mine, other in zip(model.parameters(), plain_model.parameters(), strict=True):
            assert same(dict(base.state.get(mine, {})), dict(plain.state.get(other, {})))
        if not exact:
            model.load_state_dict(plain_model.state_dict())
