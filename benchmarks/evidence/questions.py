"""The ablations: each a question, the contenders that answer it, and where they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.evidence.contenders import CONTENDERS, Contender, bnp
from benchmarks.evidence.engine import Run
from benchmarks.evidence.plan import SHORT, TUNING_SEED
from benchmarks.evidence.tasks import TASKS

SCALES = ("trace", "spectral", "fan_in", None)


@dataclass(frozen=True)
class Question:
    """Every contender at every rate of its grid, at a constant rate.

    Args:
        contenders: By what tables call them; a plain base among them is what "lift" refers to.
        samples: By task and batch size, trimmed; ``--preset full`` takes the task's own at the same batch sizes.
    """

    name: str
    title: str
    contenders: Mapping[str, Contender]
    samples: Mapping[str, Mapping[int, int]]

    def runs(self, preset: str, seeds: tuple[int, ...] = (TUNING_SEED,)) -> list[Run]:
        """All runs, task by task, seed by seed."""
        return [
            Run(task, c, rate, b, n if preset == "short" else TASKS[task].samples[b], seed)
            for task, samples in self.samples.items()
            for seed in seeds
            for b, n in samples.items()
            for c in self.contenders.values()
            for rate in c.rates
        ]


def _part(task: str, *batch_sizes: int) -> dict[int, int]:
    return {b: SHORT[task][b] for b in batch_sizes}


def _scales() -> dict[str, Contender]:
    found = {}
    for base, mode in (("sgd", "auto"), ("momentum", "gradient"), ("momentum", "two_sided"), ("adamw", "auto")):
        name = {"sgd": "SGD", "momentum": f"momentum, {mode.replace('_', '-')}", "adamw": "AdamW"}[base]
        for scale in SCALES:
            found[f"{name}, {scale}"] = bnp(f"{name}, {scale}", base, mode=mode, step_scale=scale)
    return found


QUESTIONS: dict[str, Question] = {
    q.name: q
    for q in (
        Question(
            "step_scale",
            "Which q²?",
            {**{n: CONTENDERS[n] for n in ("SGD", "momentum", "AdamW")}, **_scales()},
            {"fashion": _part("fashion", 256, 16, 1), "cifar": _part("cifar", 256, 16, 1)},
        ),
        Question(
            "conv_samples",
            "What is a sample of a convolution?",
            {
                "SGD": CONTENDERS["SGD"],
                "AdamW": CONTENDERS["AdamW"],
                "BNP-SGD, N = samples": bnp("BNP-SGD, N = samples", "sgd"),
                "BNP-SGD, N = samples × positions": bnp("BNP-SGD, N = samples × positions", "sgd", "positions"),
                "BNP-AdamW, N = samples": bnp("BNP-AdamW, N = samples", "adamw"),
                "BNP-AdamW, N = samples × positions": bnp("BNP-AdamW, N = samples × positions", "adamw", "positions"),
            },
            {"cifar": _part("cifar", 64, 16, 1)},
        ),
    )
}
