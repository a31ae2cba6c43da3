"""nn.MultiheadAttention: the numbers of the dense reference, for every way to build and to call it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnp_optim import BNPreconditioner
from tests.attention_cases import Array, AttentionCase, ByHand, heads_of, knows_hooks

pytestmark = knows_hooks

STEPS = 3
CASES = [
    AttentionCase(kind, bias, layout, need_weights)
    for kind in ("self", "cross", "distinct", "apart")
    for bias in (True, False)
    for layout in ("batch_first", "length_first", "unbatched")
    for need_weights in (True, False)
    if kind != "distinct" or layout == "batch_first"
]
PRECISION = [pytest.param(torch.float64, 1e-10, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]


def assert_close(found: dict[str, Tensor], expected: dict[str, Array], tolerance: float, raw: dict[str, Array]) -> None:
    """Relative to the largest entry of each gradient, raw or mapped."""
    for name, e in expected.items():
        error = np.abs(found[name].double().numpy() - e).max()
        scale = max(np.abs(e).max(), np.abs(raw[name]).max())
        assert error <= tolerance * scale, f"{name}: error {error:.3g}, largest entry {scale:.3g}"


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_the_reference(
    case: AttentionCase, mode: Any, step_scale: Any, dtype: torch.dtype, tolerance: float
) -> None:
    """The weights are put back after each step, so that momentum's update can be read off."""
    lr, beta = 0.5, 0.9
    start = case.build().state_dict()
    attention = case.build().to(dtype)
    attention.load_state_dict(start)
    exact = copy.deepcopy(attention).double()
    base = torch.optim.SGD(attention.parameters(), lr=lr, momentum=beta)
    wrapper = BNPreconditioner(base, attention, mode=mode, step_scale=step_scale, stat_decay=0.9)
    by_hand = ByHand(attention, wrapper, {"step_scale": step_scale, "stat_decay": 0.9})
    generator = torch.Generator().manual_seed(7)
    velocity: dict[str, Array] = {}
    for _ in range(STEPS):
        given = case.inputs(generator)
        for module in (attention, exact):
            module.zero_grad()
            y = case.call(module, given)
            if module is attention:
                weights = torch.rand(y.shape, generator=generator).double() + 0.5
            (y * weights.to(y.dtype)).square().sum().backward()
        by_hand.observe(given, heads_of(exact, given))
        by_hand.commit()
        raw = {name: p.grad.numpy() for name, p in exact.named_parameters()}
        fed = by_hand.map("gradient_form" if mode == "gradient" else "to_z", raw)
        velocity = {name: g + beta * velocity.get(name, np.zeros_like(g)) for name, g in fed.items()}
        moves = {name: -lr * m for name, m in velocity.items()}
        if mode == "two_sided":
            moves = by_hand.map("from_z", moves)

        wrapper.step()
        assert_close({n: p.grad for n, p in attention.named_parameters()}, fed, tolerance, raw)
        with torch.no_grad():
            moved = {n: p - q for (n, p), q in zip(attention.named_parameters(), exact.parameters(), strict=True)}
        assert_close(moved, moves, tolerance, raw)
        attention.load_state_dict(start)
    assert len(wrapper._tracker.ready) == (4 if case.kind == "apart" else 2)


MASKS: dict[str, dict[str, Any]] = {
    "attn_mask": {"attn_mask": torch.ones(6, 5, dtype=torch.bool).triu(1)},
    "float attn_mask": {"attn_mask": torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5)},
    "key_padding_mask": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "none": {},
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("masking", MASKS)
def test_masks_and_added_keys(masking: str, options: Any, need_weights: bool) -> None:
    """They change what ``out_proj`` sees, and nothing of what ``in_proj`` does: masked positions count as samples."""
    case = AttentionCase("cross", need_weights=need_weights)
    attention = case.build(**options).double()
    wrapper = BNPreconditioner(torch.optim.SGD(attention.parameters(), lr=0.1), attention)
    by_hand = ByHand(attention, wrapper, {})
    given = case.inputs(torch.Generator().manual_seed(1))
    case.call(attention, given, **MASKS[masking]).square().sum().backward()
    mask = np.zeros((2, 1, 6, 5))
    for name, value in MASKS[masking].items():
        additive = np.where(value, -np.inf, 0.0) if value.dtype == torch.bool else value.numpy()
        mask += additive if name == "attn_mask" else additive[:, None, None, :]
    mask = np.concatenate([mask, np.zeros((2, 1, 6, len(options)))], -1)
    by_hand.observe(given, heads_of(attention, given, mask))
    by_hand.commit()
    raw = {name: p.grad.numpy().copy() for name, p in attention.named_parameters()}
    wrapper.step()
    found = {name: p.grad for name, p in attention.named_parameters()}
    assert_close(found, by_hand.map("gradient_form", raw), 1e-10, raw)
    counts = {name: int(s.count) for name, s in wrapper.statistics.items()}
    assert counts == {"in_proj": 12, "out_proj": 12}
    for name in ("bias_k", "bias_v"):
        if name in raw:
            why = "multiplies no input: it is a key or value itself"
            row = wrapper.coverage()[name]
            assert (row.preconditioned, row.why) == (False, why)


def test_dropout_is_in_what_out_proj_sees() -> None:
    case = AttentionCase()
    attention = case.build(dropout=0.5).double()
    wrapper = BNPreconditioner(torch.optim.SGD(attention.parameters(), lr=0.1), attention)
    (x, _, _) = case.inputs(torch.Generator().manual_seed(1))
    y, shares = attention(x, x, x, average_attn_weights=False)
    y.sum().backward()
    with torch.no_grad():
        values = torch.nn.functional.linear(
            x, *(p.chunk(3)[2] for p in (attention.in_proj_weight, attention.in_proj_bias))
        )
        heads = (shares @ values.unflatten(-1, (2, 2)).transpose(1, 2)).transpose(1, 2).reshape(-1, 4)
    wrapper.step()
    assert (shares == 0).any()
    torch.testing.assert_close(wrapper.statistics["out_proj"].mean, heads.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wrapper.statistics["out_proj"].variance, heads.var(0, correction=0))
