"""Hugging Face's Trainer(optimizers=...) on a tiny GPT-2: it is the loop that one would write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import same

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")
from tests.clients.test_transformers import LENGTH, counting, gpt2  # noqa: E402

BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
STEPS, MICRO, BATCH = 6, 2, 4
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class InOrder(torch.utils.data.IterableDataset[Any]):
    """Trainer shuffles what it can index."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in counting(STEPS * MICRO, BATCH):
            for ids in batch:
                yield {"input_ids": ids, "labels": ids}


def share_of_the_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A mean over all micro-batches of a step, whatever the installed version divides by itself."""
    return nn.functional.cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()) / MICRO


def wrapped(base: str, model: nn.Module) -> BNPreconditioner:
    return BNPreconditioner(BASES[base](model.parameters()), model)


def trained(base: str, folder: Path, data: Any = None, resume: Path | None = None, **options: Any) -> Any:
    model = gpt2(**({} if data else NO_DROPOUT))
    optimizer = wrapped(base, model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=MICRO,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no"} | options,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data or InOrder(),
        compute_loss_func=None if data else share_of_the_loss,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert {int(s.count) for s in optimizer.statistics.values()} == {STEPS * MICRO * BATCH * LENGTH}
    return model, optimizer


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("base", BASES)
def test_accumulation_clipping_and_schedule(base: str, bf16: bool, tmp_path: Path) -> None:
    found, optimizer = trained(base, tmp_path, max_grad_norm=0.5, warmup_steps=2, lr_scheduler_type="cosine", bf16=bf16)
    model = gpt2(**NO_DROPOUT)
    expected = wrapped(base, model)
    schedule = transformers.get_cosine_schedule_with_warmup(expected, 2, STEPS)
    data = counting(STEPS * MICRO, BATCH)
    for first in range(0, len(data), MICRO):
        expected.zero_grad()
        for ids in data[first : first + MICRO]:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = share_of_the_loss(model(input_ids=ids), ids)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        expected.step()
        schedule.step()
    assert same(dict(found.state_dict()), dict(model.state_dict()))
    assert same(optimizer.state_dict()["state"], expected.state_dict()["state"])


@pytest.mark.parametrize("base", BASES)
def test_resume_from_a_checkpoint_is_bitwise(base: str, tmp_path: Path) -> None:
    """With shuffling, dropout and the default schedule."""
    data = [{"input_ids": ids, "labels": ids} for batch in counting(STEPS * MICRO, BATCH) for ids in batch]
    whole = trained(base, tmp_path, data, save_strategy="steps", save_steps=3)
    resumed = trained(base, tmp_path, data, resume=tmp_path / "checkpoint-3", save_strategy="steps", save_steps=3)
    assert same(*((dict(model.state_dict()), optimizer.state_dict()) for model, optimizer in (whole, resumed)))


def test_recomputed_activations_count_once(tmp_path: Path) -> None:
    plain = trained("AdamW", tmp_path)
    name = "activation_checkpointing"  # new in transformers 5.23
    if name not in {field.name for field in dataclasses.fields(transformers.TrainingArguments)}:
        name = "gradient_checkpointing"
    checkpointed = trained("AdamW", tmp_path, **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
    assert same(*((dict(model.state_dict()), optimizer.state_dict()) for model, optimizer in (plain, checkpointed)))
