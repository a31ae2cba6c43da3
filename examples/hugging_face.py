"""Hugging Face's Trainer with the optimizer as a class and its options; nothing is downloaded. Under a minute.

    python examples/hugging_face.py                          # AdamW and BNP-AdamW at the same rate
    python examples/hugging_face.py --optimizers BNPMuon

A small GPT-2 of random weights learns the bytes of Python's standard library, with the recipe of fine-tuning: warm-up,
linear decay, clipping, no weight decay on biases and norms.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from bnp_optim import BNPAdamW, BNPMuon

LENGTH = 64
CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
    "BNPAdamW": (BNPAdamW, {"lr": 1e-3}),
    "BNPMuon": (BNPMuon, {"lr": 1e-2}),  # AdamW's part at a tenth of it
}


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Stretches of ``LENGTH`` bytes of the standard library's source."""

    def __init__(self, first: int, count: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
        stretches = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        order = torch.randperm(len(stretches) // LENGTH, generator=torch.Generator().manual_seed(0))
        chosen = order[first : first + count, None] * LENGTH + torch.arange(LENGTH)
        self.ids = stretches[chosen].long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(name: str, steps: int) -> float:
    """Train from scratch; returned is the loss on held-out text, in nats per byte."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            warmup_steps=steps // 10,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            weight_decay=0.01,
            save_strategy="no",
            logging_steps=max(1, steps // 5),
            report_to=[],
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=Bytes(256, 16 * steps),
            eval_dataset=Bytes(0, 256),
            optimizer_cls_and_kwargs=CHOICES[name],  # the change
        )
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=CHOICES, default=["AdamW", "BNPAdamW"])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(args)
    losses = {name: train(name, options.steps) for name in options.optimizers}
    for name, loss in losses.items():
        print(f"{name:10s} held-out loss {loss:.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
