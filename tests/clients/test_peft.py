"""peft's LoRA: the adapters are preconditioned, the frozen base is left alone, and tiny inputs have a bounded gain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import inputs, mlp, same, weights

peft = pytest.importorskip("peft", reason="peft is not installed")

BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def lora(base: nn.Module, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(5)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def gpt2_loss(model: Any, x: Tensor) -> Tensor:
    ids = (x.abs() * 5).long().clamp(max=19)
    loss: Tensor = model(input_ids=ids).logits.square().mean()
    return loss


MODELS: dict[str, Any] = {
    "MLP": (lambda: lora(mlp(), ["0", "2"]), lambda model, x: model(x).square().mean(), 4),
    "GPT-2": (lambda: lora(gpt2(), ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), gpt2_loss, 8),
}
# peft's own code, on a newer transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def steps(model: nn.Module, optimizer: Any, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("owner", ["trainable", "all"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_frozen_base_is_left_alone(kind: str, base: str, owner: str) -> None:
    build, loss_of, adapters = MODELS[kind]
    model = build()
    parameters = [p for p in model.parameters() if p.requires_grad or owner == "all"]
    optimizer = BNPreconditioner(BASES[base](parameters), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x in inputs(4):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    coverage = optimizer.coverage()
    assert len(coverage.preconditioned) == adapters
    for row in coverage:
        assert row.why == ("rank-one P: no bias" if "lora_" in row.name else "frozen"), row
    seen = {name for name, s in optimizer.statistics.items() if s.count > 0}
    assert seen == {name.removesuffix(".weight") for name in coverage.preconditioned}
    if owner == "trainable":
        hooked = [name for name, m in model.named_modules() if m._forward_hooks]
        assert sorted(hooked) == sorted(seen)


@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
def test_the_gain_on_tiny_inputs_is_bounded(mode: Any) -> None:
    """σ̃² ≥ var_eps, so P Pᵀ is at most 1/(var_eps·q²) and Pᵀ at most 1/(√var_eps·q), row by row; here q = 1."""
    model = lora(mlp(), ["0"])
    (down, up) = (p for name, p in model.named_parameters() if "lora_" in name)
    with torch.no_grad():
        down.mul_(1e-4 / down.abs().mean())
        up.normal_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = BNPreconditioner(torch.optim.SGD(parameters, lr=0.0), model, mode=mode)
    (x,) = inputs(1)
    model(x).square().mean().backward()
    raw = up.grad.clone()
    optimizer.step()
    q2 = float(next(optimizer._tracker.factors(x) for x in optimizer._tracker.layers if "lora_B" in x.name).q2)
    assert q2 == 1.0
    bound = 1e4 if mode == "gradient" else 1e2
    gain = up.grad.norm(dim=1) / raw.norm(dim=1)
    assert (gain <= bound * (1 + 1e-6)).all()
    assert (gain >= 0.99 * bound).all()  # for σ² = 1e-8 ≪ var_eps = 1e-4


def test_merge_and_unload() -> None:
    model = lora(mlp(), ["0", "2"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = BNPreconditioner(torch.optim.AdamW(parameters, lr=0.05), model)
    data = inputs(8)
    for x in data:
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
    expected = model(data[0]).detach()
    plain = copy.deepcopy(mlp())
    merged = model.merge_and_unload()
    assert isinstance(merged[0], nn.Linear) and not merged[0]._forward_hooks
    assert not torch.equal(merged[0].weight, plain[0].weight)
    torch.testing.assert_close(merged(data[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_resume_of_adapters_and_optimizer_is_bitwise(base: str) -> None:
    """From what peft saves, which is the adapters alone."""

    def start() -> Any:
        model = lora(mlp(), ["0", "2"])
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, BNPreconditioner(BASES[base](parameters), model)

    model, optimizer = start()
    steps(model, optimizer, inputs(4))
    saved = copy.deepcopy((peft.get_peft_model_state_dict(model), optimizer.state_dict()))
    steps(model, optimizer, inputs(4, seed=2))
    other, resumed = start()
    peft.set_peft_model_state_dict(other, saved[0])
    resumed.load_state_dict(saved[1])
    steps(other, resumed, inputs(4, seed=2))
    assert same(weights(other), weights(model))
    assert same(resumed.state_dict(), optimizer.state_dict())


def test_each_adapter_has_its_own_statistics_and_a_disabled_one_measures_nothing() -> None:
    model = lora(mlp(), ["0"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("second")  # freezes the first
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = BNPreconditioner(torch.optim.SGD(parameters, lr=0.05), model)
    data = inputs(3)
    steps(model, optimizer, data[:2])
    model.set_adapter("default")
    steps(model, optimizer, data[2:])
    with model.disable_adapter():
        model(data[0])
    found = {name.split("lora_A.")[1]: s for name, s in optimizer.statistics.items() if "lora_A" in name}
    assert [int(found[name].count) for name in ("second", "default")] == [16, 8]
    torch.testing.assert_close(found["default"].mean, data[2].mean(0))


def test_dora_counts_each_sample_once() -> None:
    """Its norm comes from a pass of the identity through the adapters, without a gradient: that is no sample."""
    model = lora(mlp(), ["0"], use_dora=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = BNPreconditioner(torch.optim.AdamW(parameters, lr=0.01), model)
    (x,) = inputs(1)
    steps(model, optimizer, [x])
    found = {name.split(".")[-2]: s for name, s in optimizer.statistics.items()}
    assert {int(s.count) for s in found.values()} == {8} and len(found) == 2
    torch.testing.assert_close(found["lora_A"].mean, x.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_of_a_half_precision_base(dtype: torch.dtype) -> None:
    """peft keeps the adapters in float32 and casts their input."""
    model = lora(mlp().to(dtype), ["0", "2"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = BNPreconditioner(torch.optim.AdamW(parameters, lr=0.01), model)
    x = inputs(1)[0].to(dtype)
    steps(model, optimizer, [x])
    first = next(s for name, s in optimizer.statistics.items() if name.endswith("0.lora_A.default"))
    assert first.mean.dtype == torch.float32 and int(first.count) == 8
    torch.testing.assert_close(first.mean, x.float().mean(0), rtol=1e-6, atol=1e-7)
