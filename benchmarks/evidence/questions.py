"""The ablations: each a question, the contenders that answer it, and where they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence import streams
from benchmarks.evidence.contenders import CONTENDERS, Contender, bnp
from benchmarks.evidence.engine import Run
from benchmarks.evidence.plan import SHORT, TUNING_SEED
from benchmarks.evidence.progressive import StreamRun
from benchmarks.evidence.streaming_plan import INPUTS
from benchmarks.evidence.streams import Inputs
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


@dataclass(frozen=True)
class StreamQuestion:
    """Every contender at every rate of its grid, on streams.

    Args:
        contenders: By what tables call them, with the sample at which :func:`bnp_optim.fold_normalization` is called,
            or 0.
        places: (stream, inputs).
    """

    name: str
    title: str
    contenders: Mapping[str, tuple[Contender, int]]
    places: tuple[tuple[str, Inputs], ...]

    def runs(self, preset: str, seeds: tuple[int, ...] = (TUNING_SEED,)) -> list[StreamRun]:
        """All runs, seed by seed, place by place, over whole streams whatever the preset."""
        return [
            StreamRun(stream, inputs, contender, rate, seed, streams.SAMPLES[stream], fold)
            for seed in seeds
            for stream, inputs in self.places
            for contender, fold in self.contenders.values()
            for rate in contender.rates
        ]


def _around(variants: Mapping[str, dict[str, Any]]) -> dict[str, tuple[Contender, int]]:
    """BNP-SGD and BNP-AdamW in each variant; "fold" and "variant" are no options of BNP's."""
    found = {}
    for base, name in (("sgd", "BNP-SGD"), ("adamw", "BNP-AdamW")):
        for label, options in variants.items():
            options = dict(options)
            fold, variant = options.pop("fold", 0), options.pop("variant", "")
            found[f"{name}, {label}"] = bnp(f"{name}, {label}", base, variant, **options), fold
    return found


def _part(task: str, *batch_sizes: int) -> dict[int, int]:
    return {b: SHORT[task][b] for b in batch_sizes}


def _scales() -> dict[str, Contender]:
    found = {}
    for base, mode in (("sgd", "auto"), ("momentum", "gradient"), ("momentum", "two_sided"), ("adamw", "auto")):
        name = {"sgd": "SGD", "momentum": f"momentum, {mode.replace('_', '-')}", "adamw": "AdamW"}[base]
        for scale in SCALES:
            found[f"{name}, {scale}"] = bnp(f"{name}, {scale}", base, mode=mode, step_scale=scale)
    return found


QUESTIONS: dict[str, Question | StreamQuestion] = {
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
        StreamQuestion(
            "fold",
            "Does fold_normalization make raw inputs as good as scaled ones?",
            _around({"as it is": {}, "folded after 20 samples": {"fold": 20}}),
            tuple((s, i) for i in INPUTS for s in streams.SAMPLES if s not in ("Bananas", "ImageSegments, shift")),
        ),
        StreamQuestion(
            "fold_samples",
            "After how many samples of a raw stream?",
            _around({f"after {k}": {"fold": k} for k in (5, 20, 50, 100)}),
            tuple((s, "raw") for s in streams.SAMPLES if s not in ("Bananas", "ImageSegments, shift")),
        ),
        StreamQuestion(
            "stat_decay",
            "How long a memory, under shift and drift?",
            _around({f"ρ = {r}": {"stat_decay": r} for r in (0.9, 0.99, 0.999)}),
            (("ImageSegments, shift", "raw"), ("ImageSegments, shift", "scaled"), ("Agrawal, drift", "scaled"),
             ("SEA, drift", "raw"), ("ImageSegments", "scaled"), ("Bananas", "raw")),
        ),
        StreamQuestion(
            "floors",
            "Which floor for small variances?",
            _around({
                "ε1 = 0.01": {},
                "ε1 = 0.0001": {"var_rel_eps": 1e-4},
                "ε1 = 0": {"var_rel_eps": 0.0},
                "geometric mean": {"variant": "geometric floors"},
                "in the units of the fold": {"fold": 20},
                "ε1 = 0.01, folded": {"fold": 20, "variant": "layer floors"},
                "ε1 = 0, folded": {"fold": 20, "var_rel_eps": 0.0},
                "geometric mean, folded": {"fold": 20, "variant": "geometric floors"},
                "own in the first layer, folded": {"fold": 20, "variant": "first floors"},
            }),
            (("ImageSegments", "raw"), ("Agrawal, drift", "raw"), ("Shuttle", "raw"), ("TrumpApproval", "raw"),
             ("ImageSegments", "scaled")),
        ),
    )
}  # fmt: skip
