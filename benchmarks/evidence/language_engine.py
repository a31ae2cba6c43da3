"""One training of the character GPT: what decides its outcome, and the loop."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.contenders import PACKAGES, Contender
from benchmarks.evidence.corpus import ALPHABET, Corpus, standard_library
from benchmarks.evidence.engine import curve_steps
from benchmarks.evidence.gpt import GPT, loss_of

PROTOCOL = 1  # of what is below and of the net; raise it when results of before no longer compare
WARM_UP = 0.1  # of the steps
WINDOWS, CURVE_EVERY = 256, 4  # of validation: the final loss is on all of them, the curve's points on every fourth
UNIFORM = math.log(len(ALPHABET))  # the loss of a uniform guess: what a diverged run scores, and no run scores worse


@dataclass(frozen=True)
class Net:
    """Args:
    layers, width, context: Of :class:`GPT`.
    """

    layers: int
    width: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"

    def build(self) -> GPT:
        return GPT(self.layers, self.width, self.context)


@dataclass(frozen=True)
class LanguageRun:
    """All that decides the outcome of a run.

    Args:
        steps: Each on ``batch_size`` windows of the net's context, drawn with replacement.
        seed: Of the initial weights and of the windows; contenders with the same seed share both.
        digest: Of the text.
    """

    net: Net
    contender: Contender
    learning_rate: float
    batch_size: int
    steps: int
    seed: int
    digest: str

    def describe(self) -> dict[str, Any]:
        """What a line of the results says of it."""
        return {
            "net": self.net.name, "method": self.contender.name, "learning_rate": self.learning_rate,
            "batch_size": self.batch_size, "steps": self.steps, "seed": self.seed,
        }  # fmt: skip

    def execute(self, data_dir: Path) -> dict[str, Any]:
        """Train on the standard library of the running Python; there is nothing in ``data_dir``."""
        corpus = standard_library()
        if corpus.digest != self.digest:
            raise RuntimeError(f"the text has the digest {corpus.digest}, and the run is of {self.digest}: plan anew")
        return train(self, corpus)

    @cached_property
    def key(self) -> str:
        """Differs if anything differs that the outcome depends on, the name of the contender aside."""
        parts = (
            "language", PROTOCOL, self.net.name, self.net.context, self.contender.key, fingerprint(self.contender.base,
            self.contender.bnp), self.learning_rate, self.batch_size, self.steps, self.seed, self.digest,
            torch.__version__,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@cache
def fingerprint(base: str, options: Any) -> str:
    """What a base, under BNP or not, computes on a tiny GPT: a hash of the parameters, to six digits, in float64.

    A contender's own key knows no attention and nothing of the net. Packages of others are known by their version, so
    that here AdamW stands in for them.
    """
    contender = Contender("", "adamw" if base in PACKAGES else base, bnp=options)
    torch.manual_seed(0)
    model = Net(1, 32, 8).build().double()
    optimizer = contender.make(model, 0.01)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, torch.randint(len(ALPHABET), (1 + step % 2, 9))).backward()
        optimizer.step()
    numbers = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return hashlib.sha256(" ".join(f"{v:.5e}" for v in numbers).encode()).hexdigest()[:16]


def train(run: LanguageRun, corpus: Corpus) -> dict[str, Any]:
    """Train once; returns the validation loss, whether it diverged, its curve and the CPU seconds of training.

    The curve is (steps, loss), steps in geometric progression. Losses are nats per character.
    """
    torch.manual_seed(run.seed)
    model = run.net.build()
    generator = torch.Generator().manual_seed(run.seed)
    windows = validation_windows(corpus, run.net.context)
    stops = curve_steps(run.steps)
    curve: list[tuple[int, float]] = []
    seconds, diverged = 0.0, False
    with run.contender.context():
        optimizer = run.contender.make(model, run.learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        start = time.process_time()
        for step in range(1, run.steps + 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step, run.steps)
            batch = training_windows(corpus, run.net.context, run.batch_size, generator)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            if step in stops:
                seconds += time.process_time() - start
                diverged = not all(bool(p.isfinite().all()) for p in model.parameters())
                if diverged:
                    break
                curve.append((step, score(model, windows[::CURVE_EVERY])))
                start = time.process_time()
    curve += [(s, UNIFORM) for s in sorted(stops)[len(curve) :]]
    return {
        "loss": round(UNIFORM if diverged else score(model, windows), 5),
        "diverged": diverged,
        "seconds": round(seconds, 3),
        "curve": [(n, round(x, 5)) for n, x in curve],
    }


def factor(step: int, steps: int) -> float:
    """Of the rate in step 1 … ``steps``: up linearly over the first WARM_UP of them, then linearly towards zero."""
    warm = max(1, round(WARM_UP * steps))
    return step / warm if step <= warm else (steps + 1 - step) / (steps + 1 - warm)


def training_windows(corpus: Corpus, context: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """(batch_size, context + 1) characters from anywhere in the training text."""
    starts = torch.randint(len(corpus.train) - context, (batch_size, 1), generator=generator)
    return corpus.train[starts + torch.arange(context + 1)]


def validation_windows(corpus: Corpus, context: int) -> Tensor:
    """(WINDOWS, context + 1): the same ones always, evenly spread."""
    starts = torch.arange(WINDOWS) * (len(corpus.validation) - context - 1) // (WINDOWS - 1)
    return corpus.validation[starts[:, None] + torch.arange(context + 1)]


@torch.no_grad()
def score(model: nn.Module, windows: Tensor) -> float:
    """The mean loss; UNIFORM where it is worse than that, or not a number."""
    parts = windows.split(64)
    loss = sum(len(part) * loss_of(model, part).item() for part in parts) / len(windows)
    return min(loss, UNIFORM) if math.isfinite(loss) else UNIFORM
