"""What the wrapper may cost, and whether it does: step time, milliseconds against others', memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

# Ratios of step times: (method, workload, batch size or None for all) -> at most.
SPEED: dict[tuple[str, str, int | None], float] = {
    ("bnp-sgd", "mlp-64", None): 1.5,
    ("bnp-sgd", "mlp-1024", 1): 1.25,
    ("bnp-sgd", "mlp-1024", 60): 1.05,
    ("bnp-sgd", "mlp-1024", 256): 1.05,
    ("bnp-sgd", "cnn", 32): 1.05,
    ("bnp-sgd", "cnn", 128): 1.05,
    ("bnp-sgd", "resnet18", 64): 1.05,
    ("bnp-sgd", "gpt-block", 8): 1.05,  # 1024 positions
    ("bnp-adamw", "mlp-64", 64): 1.15,
    ("bnp-adamw", "mlp-1024", 60): 1.15,
    ("bnp-adamw", "mlp-1024", 256): 1.15,
    ("bnp-adamw", "cnn", 32): 1.15,
    ("bnp-adamw", "cnn", 128): 1.15,
    ("bnp-adamw", "resnet18", 64): 1.15,
    ("bnp-adamw", "gpt-block", 8): 1.15,
    ("bnp-sgd", "resnet50", None): 1.03,
    ("bnp-adamw", "vit-b", None): 1.03,
    ("bnp-adamw", "gpt2-124m", None): 1.03,
}
RIVALS = ("bn", "muon", "kfac", "kfac-10", "soap", "shampoo", "shampoo-10")  # of bnp-sgd, in added milliseconds
MEMORY = 1.02  # of the base's peak; in the two-sided form one more copy of the preconditioned parameters on top
TWO_SIDED = ("bnp-adamw",)


def evaluate(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """All targets that ``rows`` have numbers for.

    Each has: row, method, kind ("speed", "added" or "memory"), against, value, limit, met; for speed also
    low, high and paired. Values and limits of "added" are milliseconds per step over plain SGD's, of the
    other kinds ratios to the base's. Where a rival was cut off, the limit is what it takes at least, and above that
    met is None: unknown.
    """
    found = []
    for row in rows:
        for name in ("bnp-sgd", "bnp-adamw"):
            found += _speed(row, name)
            if name == "bnp-sgd":
                found += _added(row, name)
            found += _memory(row, name)
    return found


def added_ms(row: Result, name: str) -> tuple[float, bool] | None:
    """Milliseconds per step over plain SGD's, and whether that is only a lower bound; None if it did not run."""
    result, base = row["methods"].get(name, {}), row["methods"].get("sgd", {})
    if "step_ms" not in base:
        return None
    if "over_s" in result:
        return 1e3 * result["over_s"] / (result["steps_taken"] + 1) - base["step_ms"], True
    return (result["step_ms"] - base["step_ms"], False) if "step_ms" in result else None


def _speed(row: Result, name: str) -> list[dict[str, Any]]:
    result = row["methods"].get(name, {})
    limit = SPEED.get((name, row["workload"], row["batch_size"]), SPEED.get((name, row["workload"], None)))
    if limit is None or "ratio" not in result:
        return []
    verdict = _verdict(row, name, "speed", result["base"], result["ratio"], limit)
    return [verdict | {key: result[key] for key in ("low", "high", "paired")}]


def _added(row: Result, name: str) -> list[dict[str, Any]]:
    ours = added_ms(row, name)
    if ours is None:
        return []
    found = []
    for rival in RIVALS:
        theirs = added_ms(row, rival)
        if theirs is not None:
            verdict = _verdict(row, name, "added", rival, ours[0], theirs[0])
            found.append(verdict | {"met": verdict["met"] or (None if theirs[1] else False)})
    return found


def _memory(row: Result, name: str) -> list[dict[str, Any]]:
    result = row["methods"].get(name, {})
    if result.get("memory_ratio") is None:
        return []
    limit = MEMORY
    if name in TWO_SIDED:
        limit += result["preconditioned_bytes"] / row["methods"][result["base"]]["peak_bytes"]
    return [_verdict(row, name, "memory", result["base"], result["memory_ratio"], limit)]


def _verdict(row: Result, name: str, kind: str, against: str, value: float, limit: float) -> dict[str, Any]:
    return {
        "row": row["row"],
        "method": name,
        "kind": kind,
        "against": against,
        "value": value,
        "limit": limit,
        "met": value <= limit,
    }
