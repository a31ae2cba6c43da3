"""Hugging Face transformers: tiny models from random configurations, nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import hook_count, wrap

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

VOCABULARY, WIDTH, LENGTH = 50, 32, 12
SHARED = "shared with Embedding 'transformer.wte'"


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=WIDTH,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        **options,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def counting(steps: int, batch: int = 4) -> list[Tensor]:
    """Sequences that go up by one from a random start: the next token is known."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(VOCABULARY, (steps, batch, 1), generator=generator)
    return list((starts + torch.arange(LENGTH)) % VOCABULARY)


def train(model: Any, optimizer: Any, data: list[Tensor]) -> list[float]:
    losses = []
    for ids in data:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_gpt2_every_conv1d_is_preconditioned_and_the_tied_head_passes_through() -> None:
    model = gpt2()
    optimizer = BNPreconditioner(torch.optim.AdamW(model.parameters(), lr=3e-3), model)
    losses = train(model, optimizer, counting(40))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses

    conv1d = [name for name, m in model.named_modules() if isinstance(m, pytorch_utils.Conv1D)]
    assert len(conv1d) == 8
    assert list(optimizer.statistics) == conv1d
    assert {int(s.count) for s in optimizer.statistics.values()} == {40 * 4 * LENGTH}
    coverage = optimizer.coverage()
    assert sorted(coverage.preconditioned) == sorted(f"{name}.{p}" for name in conv1d for p in ("weight", "bias"))
    why = {row.why for row in coverage if not row.preconditioned}
    assert why == {SHARED, "no rule for Embedding", "no rule for LayerNorm"}
    assert coverage["transformer.wte.weight"].why == SHARED
    assert len(coverage.rows) == 28


def test_generation_of_a_wrapped_model() -> None:
    """With key-value cache: the tokens of the plain model, and no samples."""
    plain = gpt2().eval()
    model = copy.deepcopy(plain)
    optimizer = wrap(model)
    prompt = counting(1, batch=2)[0][:, :4]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
    train(model.train(), optimizer, counting(1))
    assert {int(s.count) for s in optimizer.statistics.values()} == {4 * LENGTH}
    assert model.eval().generate(prompt, **options).shape[0] == 2


class TwoConv1D(nn.Module):
    """4 → 6 → 3, either kind; called by position or by keyword."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        conv1d = kind == "Conv1D"
        self.first = pytorch_utils.Conv1D(6, 4) if conv1d else nn.Linear(4, 6)
        self.second = pytorch_utils.Conv1D(3, 6) if conv1d else nn.Linear(6, 3)
        self.keyword = {"x": ...} if conv1d else {"input": ...}

    def forward(self, x: Tensor) -> Tensor:
        (name,) = self.keyword
        y: Tensor = self.second(**{name: torch.tanh(self.first(x))})
        return y


@pytest.mark.parametrize("step_scale", ["trace", "spectral", "fan_in"])
@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_conv1d_equals_the_linear_with_the_transposed_weight(mode: Any, step_scale: Any) -> None:
    mine, linear = TwoConv1D("Conv1D").double(), TwoConv1D("Linear").double()
    with torch.no_grad():
        for p, q in zip(mine.parameters(), linear.parameters(), strict=True):
            q.copy_(torch.randn(q.shape, dtype=torch.float64))
            p.copy_(q.t() if q.dim() == 2 else q)
    options: dict[str, Any] = {"mode": mode, "step_scale": step_scale}
    a, b = (
        BNPreconditioner(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), m, **options) for m in (mine, linear)
    )
    for seed in range(6):
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
        for model, optimizer in ((mine, a), (linear, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        for p, q in zip(mine.parameters(), linear.parameters(), strict=True):
            for one, other in ((p, q), (p.grad, q.grad)):
                torch.testing.assert_close(one.t() if p.dim() == 2 else one, other, rtol=1e-10, atol=1e-10)
    for name, statistics in a.statistics.items():
        torch.testing.assert_close(statistics.mean, b.statistics[name].mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(statistics.variance, b.statistics[name].variance, rtol=1e-10, atol=1e-10)


def test_llama_all_but_embedding_and_norms() -> None:
    model = llama(tie_word_embeddings=False)
    optimizer = BNPreconditioner(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    losses = train(model, optimizer, counting(30))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 8
    assert list(optimizer.coverage().preconditioned) == [f"{name}.weight" for name in linear]
    assert optimizer.coverage()["lm_head.weight"].why == "rank-one P: no bias"


def test_bert_all_linear_layers() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=VOCABULARY
    )
    model = transformers.BertForSequenceClassification(config)
    optimizer = wrap(model)
    ids = counting(1)[0]
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    counts = {name: int(s.count) for name, s in optimizer.statistics.items()}
    heads = ["bert.pooler.dense", "classifier"]
    assert [counts.pop(name) for name in heads] == [4, 4]
    assert len(counts) == 6 and set(counts.values()) == {4 * LENGTH}  # padded positions count
    assert len(optimizer.coverage().preconditioned) == 16


def test_weights_tied_after_wrapping() -> None:
    """``rescan()`` sees that the head is the embedding now."""
    model = llama(tie_word_embeddings=False)
    optimizer = wrap(model)
    train(model, optimizer, counting(1))
    assert optimizer.coverage()["lm_head.weight"].preconditioned
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.tie_weights()
    optimizer.rescan()
    train(model, optimizer, counting(1))
    row = optimizer.coverage()["model.embed_tokens.weight"]
    assert (row.preconditioned, row.why) == (False, "shared with Embedding 'model.embed_tokens'")
    assert "lm_head" not in optimizer.statistics
    assert {int(s.count) for s in optimizer.statistics.values()} == {2 * 4 * LENGTH}


@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_resized(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = BNPreconditioner(base, model)
    train(model, optimizer, counting(2))
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    if not tied:  # a new head; the embedding's parameter is the same object, of another shape
        optimizer.add_param_group({"params": [model.lm_head.weight]})
    optimizer.rescan()
    train(model, optimizer, counting(2))
    statistics = optimizer.statistics
    assert int(statistics["model.layers.0.mlp.up_proj"].count) == 4 * 4 * LENGTH  # goes on
    if tied:
        assert "lm_head" not in statistics
    else:  # the head is another module, which starts anew
        assert int(statistics["lm_head"].count) == 2 * 4 * LENGTH
    assert hook_count(model) == len(statistics)
