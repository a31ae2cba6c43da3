"""Hugging Face's Trainer builds the optimizer itself, from a class and its options, over parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPAdamW, BNPMuon, BNPreconditioner
from tests.clients.test_transformers import LENGTH, counting, gpt2
from tests.conftest import same

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

STEPS = 6


def run(tmp_path: Path, model: nn.Module, **how: Any) -> Any:
    data = [{"input_ids": ids, "labels": ids} for batch in counting(STEPS) for ids in batch]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        weight_decay=0.1,
        learning_rate=3e-3,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, **how)
    trainer.train()
    return trainer


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The Trainer's: no decay for biases and norms."""
    named = list(model.named_parameters())
    plain = [n for n, _ in named if n.endswith("bias") or "ln_" in n]
    return [
        {"params": [p for n, p in named if n not in plain], "weight_decay": 0.1},
        {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
    ]


def test_adamw_by_class(tmp_path: Path) -> None:
    model, expected = gpt2(), gpt2()
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "stat_decay": 0.95, "step_scale": None}
    trainer = run(tmp_path, model, optimizer_cls_and_kwargs=(BNPAdamW, options))
    base = torch.optim.AdamW(groups(expected), lr=3e-3, betas=(0.9, 0.95))
    reference = BNPreconditioner(base, expected, stat_decay=0.95, step_scale=None)
    run(tmp_path, expected, optimizers=(reference, None))
    assert same(dict(model.state_dict()), dict(expected.state_dict()))
    optimizer = trainer.optimizer.optimizer  # accelerate's wrapper is around it
    assert type(optimizer) is BNPAdamW and len(optimizer.param_groups) == 2
    assert optimizer.statistics.keys() == reference.statistics.keys() and len(optimizer.statistics) == 8
    assert {int(s.count) for s in optimizer.statistics.values()} == {STEPS * 4 * LENGTH}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_by_class(tmp_path: Path) -> None:
    """The head is tied to the embedding: both are AdamW's, and every Conv1D is Muon's."""
    model = gpt2()
    trainer = run(tmp_path, model, optimizer_cls_and_kwargs=(BNPMuon, {"lr": 0.02, "adamw_lr": 1e-3}))
    optimizer = trainer.optimizer.optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    muon, adamw = optimizer.base_optimizer.optimizers
    matrices = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert matrices == [n for n, p in model.named_parameters() if ".h." in n and p.ndim == 2] and len(matrices) == 8
    assert [(g["weight_decay"], len(g["params"])) for g in adamw.param_groups] == [(0.1, 2), (0.0, 18)]
    assert {int(s.count) for s in optimizer.statistics.values()} == {STEPS * 4 * LENGTH}
    # the Trainer's linear schedule has moved both rates alike
    assert muon.param_groups[0]["lr"] == pytest.approx(20 * adamw.param_groups[0]["lr"])
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses[0] < 3.91  # log 50, a model that knows nothing
