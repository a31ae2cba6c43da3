"""nn.MultiheadAttention and nn.Transformer* in use: which samples count, what passes through, torch's fast path."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnp_optim import BNPreconditioner
from tests.conftest import assert_same_statistics, assert_same_weights, count, hook_count, same, wrap

UNSEEN = "its layer's input was never seen so far"
# what torch.compile itself looks at
quiet_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
knows_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch 2.6: out_proj passes through"
)
pytestmark = knows_hooks


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(3)
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


def sequences(steps: int, *, batch: int = 4, length: int = 5, width: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, width, generator=generator) * 2 + 0.5 for _ in range(steps)]


def train(model: nn.Module, optimizer: Any, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        y = model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
        y.square().mean().backward()
        optimizer.step()


def counts(optimizer: BNPreconditioner) -> dict[str, int]:
    return {name: int(s.count) for name, s in optimizer.statistics.items()}


@pytest.mark.parametrize("step_scale", ["trace", "spectral"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_micro_batches_are_one_batch(mode: Any, step_scale: Any) -> None:
    whole = attention().double()
    parts = copy.deepcopy(whole)
    a, b = (wrap(m, mode=mode, step_scale=step_scale) for m in (whole, parts))
    for x in sequences(4):
        x, memory = x.double(), x.double().flip(1)[:, :3] * 2
        a.zero_grad()
        whole(x, memory, memory)[0].square().sum().backward()
        a.step()
        b.zero_grad()
        for piece, other in zip(x.split([1, 3]), memory.split([1, 3]), strict=True):
            parts(piece, other, other)[0].square().sum().backward()
        b.step()
    assert counts(a) == counts(b) == {"in_proj": 80, "out_proj": 80}
    assert_same_statistics(a, b, 1e-12)
    assert_same_weights(whole, parts, 1e-11)


def test_self_attention_is_a_linear_with_three_times_the_rows() -> None:
    """One input measured once: the same moments in all three groups, to the last bit; and those of the input."""
    model = attention()
    optimizer = wrap(model)
    (x,) = sequences(1)
    train(model, optimizer, [x])
    mean, variance = (
        optimizer.statistics["in_proj"].mean.view(3, 4),
        optimizer.statistics["in_proj"].variance.view(3, 4),
    )
    assert torch.equal(mean[0], mean[1]) and torch.equal(mean[0], mean[2])
    assert torch.equal(variance[0], variance[1]) and torch.equal(variance[0], variance[2])
    torch.testing.assert_close(mean[0], x.flatten(0, 1).mean(0))
    torch.testing.assert_close(variance[0], x.flatten(0, 1).var(0, correction=0))


def test_keyword_calls() -> None:
    a, b, c = attention(), attention(), attention()
    first, second, third = wrap(a), wrap(b), wrap(c)
    x, y, z = sequences(3)
    a(x, y, z)[0].sum().backward()
    b(value=z, query=x, key=y)[0].sum().backward()
    c(x, value=z, key=y, need_weights=False)[0].sum().backward()
    for optimizer in (first, second, third):
        optimizer.step()
    assert_same_statistics(first, second, 0)
    assert_same_statistics(first, third)


def test_only_the_weights_that_a_loss_reaches_count() -> None:
    model = attention()
    optimizer = wrap(model)
    (x,) = sequences(1)
    shares = model(x, x, x)[1]
    shares.square().sum().backward()
    optimizer.step()
    assert counts(optimizer) == {"in_proj": 20, "out_proj": 0}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_forwards_that_must_not_count() -> None:
    model = attention()
    optimizer = wrap(model)
    x, y = sequences(2)
    model(y, y, y)  # no backward
    with torch.no_grad():
        model.eval()(y, y, y)
        model.train()(y, y, y)
    torch.func.vmap(lambda z: model(z, z, z)[0])(y)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (y, y, y))[0].sum())(dict(model.named_parameters()))
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(5, 4)], layout=torch.strided)
    with torch.no_grad():
        model.eval()(nested, nested, nested)
    train(model.train(), optimizer, [x])
    assert counts(optimizer) == {"in_proj": 20, "out_proj": 20}


def test_one_observation() -> None:
    """The deviations of a single sample are rounding, and dropped: the weights see no step but by way of the bias."""
    model = attention()
    optimizer = wrap(model)
    train(model, optimizer, sequences(1, batch=1, length=1))
    assert counts(optimizer) == {"in_proj": 1, "out_proj": 1}
    assert model.in_proj_weight.grad is not None and model.in_proj_weight.grad.count_nonzero() == 0
    train(model, optimizer, sequences(3, batch=1, length=1, seed=5))
    assert all(p.isfinite().all() for p in model.parameters())


def test_fewer_observations_measured() -> None:
    model = attention()
    optimizer = wrap(model, max_observations=5)
    train(model, optimizer, sequences(3))
    assert counts(optimizer) == {"in_proj": 15, "out_proj": 15}


def test_a_reentrant_checkpoint_counts_once() -> None:
    plain = attention()
    model = copy.deepcopy(plain)
    a, b = wrap(plain), wrap(model)
    for x in sequences(3):
        x.requires_grad_()
        a.zero_grad()
        plain(x, x, x)[0].square().mean().backward()
        a.step()
        b.zero_grad()
        checkpoint(lambda z: model(z, z, z)[0], x, use_reentrant=True).square().mean().backward()
        b.step()
    assert same(a.state_dict(), b.state_dict())
    assert_same_weights(plain, model, 0)


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu"])
def test_where_hooks_pack_what_autograd_keeps_out_proj_passes_through(how: str) -> None:
    """Unpacking would recompute the checkpoint in the middle of its own forward pass."""
    model = attention()
    optimizer = wrap(model)
    calls = []

    def run(z: Tensor) -> Tensor:
        calls.append(None)
        return model(z, z, z)[0]

    for x in sequences(2):
        optimizer.zero_grad()
        if how == "checkpoint":
            y = checkpoint(run, x, use_reentrant=False)
        else:
            with torch.autograd.graph.save_on_cpu():
                y = run(x)
        y.square().mean().backward()
        raw = model.out_proj.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.out_proj.weight.grad, raw)
    assert len(calls) == (4 if how == "checkpoint" else 2)
    assert counts(optimizer) == {"in_proj": 40, "out_proj": 0}
    assert optimizer.coverage()["out_proj.weight"].why == UNSEEN


@quiet_dynamo
@pytest.mark.parametrize("kind", ["self", "cross", "one observation"])
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    plain = attention()
    model = copy.deepcopy(plain)
    a, b = (wrap(m, skip=["out_proj"]) for m in (plain, model))
    c = copy.deepcopy(plain)
    optimizer = wrap(c)
    first: Any = torch.compile(model, backend="eager", fullgraph=True)
    second: Any = torch.compile(c, backend="eager", fullgraph=True)
    shape = {"batch": 1, "length": 1} if kind == "one observation" else {}
    for x in sequences(3, **shape):
        memory = x[:, :3] - 1 if kind == "cross" else x
        for net, wrapper in ((plain, a), (first, b), (second, optimizer)):
            wrapper.zero_grad()
            net(x, memory, memory)[0].square().mean().backward()
            wrapper.step()
    assert_same_statistics(a, b, 1e-5)
    assert_same_weights(plain, model, 1e-5)
    assert_same_weights(plain, c, 1e-5)  # in a graph there are no nodes to look behind
    assert optimizer.coverage()["out_proj.weight"].why == UNSEEN
    torch._dynamo.reset()


def test_autocast() -> None:
    model = attention()
    optimizer = wrap(model)
    seen = []
    for x in sequences(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = model(x, x, x)
        seen.append(y.grad_fn.next_functions[0][0].next_functions[0][0]._saved_mat1.detach())
        y.float().square().mean().backward()
        optimizer.step()
        if len(seen) == 1:
            torch.testing.assert_close(optimizer.statistics["in_proj"].mean[:4], x.flatten(0, 1).mean(0))
            assert seen[0].dtype == torch.bfloat16
            torch.testing.assert_close(optimizer.statistics["out_proj"].mean, seen[0].float().mean(0))
            torch.testing.assert_close(optimizer.statistics["out_proj"].variance, seen[0].float().var(0, correction=0))
    assert counts(optimizer) == {"in_proj": 40, "out_proj": 40}
    assert optimizer.statistics["out_proj"].mean.dtype == torch.float32


def test_no_node_is_kept_alive() -> None:
    model = attention()
    optimizer = wrap(model)
    (x,) = sequences(1)
    y, shares = model(x, x, x)
    node = weakref.ref(y)
    saved = weakref.ref(y.grad_fn.next_functions[0][0].next_functions[0][0]._saved_mat1.untyped_storage())
    del y, shares
    gc.collect()
    assert node() is None and saved() is None
    train(model, optimizer, [x])


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
    """The task: reverse the sequence. The final loss of the wrapped run is below half of the first."""
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
