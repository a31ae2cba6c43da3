"""The ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.evidence import streams
from benchmarks.evidence.contenders import CONTENDERS, Contender, bnp
from benchmarks.evidence.plan import SHORT
from benchmarks.evidence.question import Question, StreamQuestion
from benchmarks.evidence.streaming_plan import INPUTS
from benchmarks.evidence.streams import Inputs
from benchmarks.evidence.variants import FOLLOWS, RESTARTS

SCALES = ("trace", "common", "spectral", "fan_in", None)


TWO_SIDED, POSITIONS = "BNP-momentum, two-sided", "N = samples × positions"
BASES = {"sgd": "BNP-SGD", "momentum": "BNP-momentum", "adamw": "BNP-AdamW"}


def _around(variants: Mapping[str, dict[str, Any]]) -> dict[str, tuple[Contender, int]]:
    """BNP-SGD and BNP-AdamW in each variant; "fold" and "variant" are no options of BNP's."""
    found = {}
    for base, name in (("sgd", BASES["sgd"]), ("adamw", BASES["adamw"])):
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


def _all_around(variants: Mapping[str, dict[str, Any]]) -> dict[str, Contender]:
    """The plain bases, and BNP around each in each variant; around momentum in the gradient form."""
    found = {n: CONTENDERS[n] for n in ("SGD", "momentum", "AdamW")}
    for base, name in BASES.items():
        form = {"mode": "gradient"} if base == "momentum" else {}
        for label, options in variants.items():
            found[f"{name}, {label}"] = bnp(f"{name}, {label}", base, **form, **options)
    return found


def _against(default: str, variants: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    return {f"{name}, {variant}": f"{name}, {default}" for name in names for variant in variants}


def _samples_of_convolutions() -> dict[str, Contender]:
    """The question is that of "trace"; "spectral" averages over positions as it is."""
    found = {n: CONTENDERS[n] for n in ("SGD", "AdamW")}
    two_sided = {"base": "momentum", "mode": "two_sided"}
    for name, options in {"BNP-SGD": {"base": "sgd"}, "BNP-AdamW": {"base": "adamw"}, TWO_SIDED: two_sided}.items():
        found[f"{name}, N = samples"] = bnp(f"{name}, N = samples", **options)
        found[f"{name}, {POSITIONS}"] = bnp(f"{name}, {POSITIONS}", variant="positions", **options)
    return found | {f"{TWO_SIDED}, spectral": bnp(f"{TWO_SIDED}, spectral", step_scale="spectral", **two_sided)}


def _scales_around_muon() -> dict[str, Contender]:
    """Muon's step has one size whatever the gradient's, so that 1/q is a rate of each layer's own."""
    scales = {f"BNP-Muon, {scale}": bnp(f"BNP-Muon, {scale}", "muon", step_scale=scale) for scale in SCALES}
    return {"Muon": CONTENDERS["Muon"]} | scales


def _starts() -> dict[str, Contender]:
    """Batch normalization undoes what folding does, so nets that have it are not folded."""
    found = {}
    for name in ("momentum", "AdamW", "Muon", "BNP-momentum", "BNP-AdamW", "BNP-Muon", "BN + SGD", "BN + AdamW"):
        for variant, label in (("", "PyTorch's"), ("He", "He"), ("folded", "folded")):
            if variant != "folded" or CONTENDERS[name].norm == "none":
                found[f"{name}, {label}"] = replace(CONTENDERS[name], name=f"{name}, {label}", variant=variant)
    return found


LEFT_OUT = ("without the first", "without the last", "without both", "first only")
SHIFTS: tuple[tuple[str, Inputs], ...] = (
    ("ImageSegments, shift", "raw"), ("ImageSegments, shift", "scaled"), ("Agrawal, drift", "scaled"),
    ("SEA, drift", "raw"), ("ImageSegments", "scaled"), ("Bananas", "raw"),
)  # fmt: skip
QUESTIONS: dict[str, Question | StreamQuestion] = {
    q.name: q
    for q in (
        Question(
            "step_scale",
            "Which q²?",
            {**{n: CONTENDERS[n] for n in ("SGD", "momentum", "AdamW")}, **_scales()},
            {"fashion": _part("fashion", 256, 16, 1), "cifar": _part("cifar", 256, 16, 1)},
            _against("trace", ["common"], ["SGD", "momentum, two-sided", "AdamW"]),
        ),
        Question(
            "step_scale_muon",
            "Which q² around a base whose step has one size?",
            _scales_around_muon(),
            {"fashion": _part("fashion", 64, 16, 4)},
            _against("trace", [str(s) for s in SCALES if s != "trace"], ["BNP-Muon"]),
        ),
        Question(
            "conv_samples",
            "What is a sample of a convolution?",
            _samples_of_convolutions(),
            {"cifar": _part("cifar", 64, 16, 1)},
            _against("N = samples", [POSITIONS], ["BNP-SGD", "BNP-AdamW", TWO_SIDED]),
        ),
        Question("start", "Which initial weights?", _starts(), {"cifar": _part("cifar", 64)}),
        Question(
            "inclusion",
            "First and last layer, in or out?",
            _all_around({"all layers": {}} | {v: {"variant": v} for v in LEFT_OUT}),
            {"fashion": _part("fashion", 64, 16, 1)},
            _against("all layers", LEFT_OUT, list(BASES.values())),
        ),
        Question(
            "debias",
            "Bias correction of the statistics, or a start from mean 0 and variance 1?",
            _all_around({"corrected": {}, "from 0 and 1": {"debias": False}}),
            {"fashion": _part("fashion", 16)},
            _against("corrected", ["from 0 and 1"], list(BASES.values())),
        ),
        StreamQuestion(
            "debias_streams",
            "Bias correction of the statistics, on streams?",
            _around({"corrected": {}, "from 0 and 1": {"debias": False}}),
            (("ImageSegments", "scaled"), ("ImageSegments", "raw"), ("Bananas", "raw"), ("SEA, drift", "raw")),
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
            SHIFTS,
        ),
        StreamQuestion(
            "restart",
            "A memory that shortens itself when new samples do not fit?",
            _around(
                {f"ρ = {r}": {"stat_decay": r} for r in (0.9, 0.99)} | {name: {"variant": name} for name in RESTARTS}
            ),
            SHIFTS,
        ),
        StreamQuestion(
            "following",
            "Weights that follow a change of units, and how soon?",
            _around(
                {"folded": {"fold": 20}, "following": {"fold": 20, "follow_inputs": True}}
                | {name: {"fold": 20, "follow_inputs": True, "variant": name} for name in FOLLOWS}
            ),
            (("ImageSegments, shift", "raw"), ("ImageSegments, shift", "scaled"), ("ImageSegments", "raw"),
             ("TrumpApproval, target scaled", "raw"), ("Shuttle", "raw"), ("Phishing", "scaled")),
        ),
        StreamQuestion(
            "outlier",
            "How fast does one absurd sample pass?",
            {n: (CONTENDERS[n], 0) for n in ("SGD", "AdamW")} | _around({"trace": {}, "None": {"step_scale": None}}),
            tuple((stream, "scaled") for stream in streams.ABSURD),
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
