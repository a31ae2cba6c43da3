"""Attention as a part of models: frozen and skipped weights, reports, copies, transformers, torch's fast path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.attention_cases import attention, counts, knows_hooks, sequences, train
from tests.conftest import assert_same_weights, count, hook_count, same, wrap

pytestmark = knows_hooks


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_one_half_frozen(frozen: str, mode: Any) -> None:
    """The other half is preconditioned as ever; frozen weights keep no input, which may then change in place."""
    model, whole = attention().double(), attention().double()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    a, b = wrap(model, mode=mode), wrap(whole, mode=mode)
    (x,) = sequences(1)
    x = x.double()
    for net in (model, whole):
        given = x.clone()
        y = net(given, given, given)[0]
        if net is model and frozen == "in_proj":
            given.zero_()
        y.square().mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    a.step()
    b.step()
    for name, p in model.named_parameters():
        if name.startswith(frozen):
            assert torch.equal(p, before[name])
            assert a.coverage()[name].why == "frozen"
        else:
            torch.testing.assert_close(p, whole.get_parameter(name), rtol=1e-13, atol=1e-13)


def test_a_frozen_in_proj_bias_leaves_the_rank_one_form() -> None:
    model = attention()
    model.in_proj_bias.requires_grad_(False)
    optimizer = wrap(model)
    train(model, optimizer, sequences(2))
    assert optimizer.coverage()["in_proj_weight"].why == "rank-one P: its bias is frozen"


def test_out_proj_is_one_layer_however_it_is_called() -> None:
    """The module finds it, and so does the rule for Linear: both uses pool their samples."""
    model = attention()
    optimizer = wrap(model)
    assert list(optimizer.statistics) == ["in_proj", "out_proj"]
    (layer,) = (x for x in optimizer._tracker.layers if x.name == "out_proj")
    assert [use.module for use in layer.uses] == [model, model.out_proj]
    (x,) = sequences(1)
    (model.out_proj(model(x, x, x)[0])).square().mean().backward()
    optimizer.step()
    assert counts(optimizer) == {"in_proj": 20, "out_proj": 40}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = attention()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attn(x, x, x)[0])
        return y


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        (nn.MultiheadAttention, ["head"]),
        ("attn", ["head"]),
        ("attn.out_proj", ["attn.in_proj", "head"]),
        (nn.Linear, ["attn.in_proj"]),
    ],
    ids=str,
)
def test_skipped(rule: Any, left: list[str]) -> None:
    model = Block()
    optimizer = wrap(model, skip=[rule])
    assert list(optimizer.statistics) == left
    train(model, optimizer, sequences(1))
    assert all(n > 0 for n in counts(optimizer).values())
    skipped = {row.name for row in optimizer.coverage() if row.why == "skipped by the user"}
    assert len(skipped) == 6 - 2 * len(left)


def test_reasons_of_separate_projections() -> None:
    coverage = wrap(attention(kdim=3, vdim=6)).coverage()
    row = coverage["in_proj_bias"]
    assert (row.preconditioned, row.why) == (False, "one bias of three weights, which have inputs of their own")
    assert coverage["q_proj_weight"].why.startswith("rank-one P: no bias")
    assert len(coverage.preconditioned) == 5


def test_parametrized_weights_pass_through() -> None:
    model = attention(add_bias_kv=True)
    nn.utils.parametrizations.weight_norm(model, "in_proj_weight")
    optimizer = wrap(model)
    train(model, optimizer, sequences(2))
    assert counts(optimizer) == {"out_proj": 40}
    coverage = optimizer.coverage()
    why = "'in_proj_weight' is not a parameter of the ParametrizedMultiheadAttention (parametrized or pruned)"
    assert coverage["in_proj_bias"].why == why
    assert coverage["bias_k"].why == "multiplies no input: it is a key or value itself"
    assert coverage["out_proj.weight"].why == "P"


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_resume(base: Any) -> None:
    model = attention()
    optimizer = BNPreconditioner(base(model.parameters(), lr=0.01), model, step_scale="spectral")
    train(model, optimizer, sequences(3))
    twin = attention()
    twin.load_state_dict(model.state_dict())
    other = BNPreconditioner(base(twin.parameters(), lr=0.01), twin, step_scale="spectral")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, wrapper in ((model, optimizer), (twin, other)):
        train(net, wrapper, sequences(3, seed=2))
    assert same(optimizer.state_dict(), other.state_dict())
    assert_same_weights(model, twin, 0)


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def test_a_copied_layer_is_independent() -> None:
    layer = encoder().layers[0]
    optimizer = wrap(layer)
    twin = copy.deepcopy(layer)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), sequences(1, width=8))
    assert hook_count(twin) == 0  # that of out_proj too, which is never called
    optimizer.step()
    assert set(counts(optimizer).values()) == {0}
    own = wrap(twin)
    train(twin, own, sequences(2, width=8))
    assert set(counts(own).values()) == {40}


MODELS: dict[str, Any] = {
    "encoder": lambda: encoder(),
    "encoder, norm first": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True),
    "decoder": lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True),
}


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_learn_with_every_matrix_preconditioned(kind: str, base: str) -> None:
    """The task: reverse the sequence. The loss falls by a tenth at least in 60 steps."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    head = nn.Linear(8, 8)
    both = nn.ModuleList([model, head])
    kinds: dict[str, Any] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
    }
    optimizer = BNPreconditioner(kinds[base](both.parameters()), both)
    where = nn.functional.one_hot(torch.arange(6), 8) * 2.0
    losses = []
    for x in sequences(60, batch=16, length=6, width=8):
        optimizer.zero_grad()
        x = x / 2
        y = model(x + where) if "encoder" in kind else model(where.expand(16, -1, -1), x + where)
        loss = (head(y) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    for row in optimizer.coverage():
        assert row.preconditioned == (".norm" not in row.name), row


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of torch's fused encoder layer."""
    calls: list[Any] = []
    fused = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return fused(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_evaluation_is_that_of_the_plain_model(activation: str, padded: bool, fast_calls: list[Any]) -> None:
    """Hooks turn the fused layer off, and nested tensors stay in use; ``remove_hooks`` gives the fused layer back."""
    plain = encoder(activation=activation).eval()
    model = copy.deepcopy(plain)
    optimizer = wrap(model)
    (x,) = sequences(1, width=8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5, [False] + [True] * 4]) if padded else None
    with torch.no_grad():
        expected = plain(x, src_key_padding_mask=mask)
        assert len(fast_calls) == 2
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-5, atol=1e-5)
        assert len(fast_calls) == 2
        optimizer.remove_hooks()
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=0, atol=0)
        assert len(fast_calls) == 4
        optimizer.rescan()
        twin = copy.deepcopy(model)
        twin(x)
        assert len(fast_calls) == 4 and hook_count(twin) == 0
        twin(x)
        assert len(fast_calls) == 6


def test_padded_positions_count() -> None:
    """A documented limit: the mask keeps keys from being attended to, not from being projected."""
    model = encoder()
    optimizer = wrap(model)
    (x,) = sequences(1, width=8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5, [False] + [True] * 4])
    model(x, src_key_padding_mask=mask).square().mean().backward()
    optimizer.step()
    assert set(counts(optimizer).values()) == {20}
    mean = optimizer.statistics["layers.0.self_attn.in_proj"].mean[:8]
    torch.testing.assert_close(mean, x.flatten(0, 1).mean(0))
    assert count(optimizer, "layers.1.self_attn.out_proj") == 20
