"""The Markdown of the overhead benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.phases import PHASES
from benchmarks.targets import RIVALS, added_ms

Result = Mapping[str, Any]


def markdown(document: Result) -> str:
    """The tables, with how they were had."""
    rows, environment = document["rows"], document["environment"]
    names = [n for n in METHODS if any(n in r["methods"] for r in rows)]
    steady, peers = [n for n in names if not METHODS[n].peer], [n for n in names if METHODS[n].peer]
    parts = [
        f"# Overhead{', quick' if document['quick'] else ''}",
        "",
        "What one training step costs (zero_grad, forward, loss, backward, step): ratio to the base's step in the "
        "same run, interleaved block by block, with the central 95 % of a bootstrap over rounds. bnp-adamw is "
        "measured against adamw, everything else against sgd. The cost of a step is the median over steps; of "
        "methods that do their expensive work every tenth step, the median over means of ten.",
        "",
        *_ratios(rows, steady, with_ms=True),
    ]
    if peers:
        parts += ["", *_ratios(rows, peers, with_ms=False)]
    parts += ["", "## Targets", "", *_targets(document["targets"])]
    rivals = [n for n in RIVALS if any(added_ms(r, n) for r in rows)]
    if rivals:
        parts += ["", *_added(rows, rivals)]
    parts += ["", "## Memory", "", *_memory(rows, names)]
    if any(r["profiles"] for r in rows):
        parts += ["", "## Where the wrapper's time goes", "", *_profiles(rows)]
    parts += ["", "## How", "", *_notes(rows, names, environment["threads"]), "", _environment_line(environment), ""]
    return "\n".join(parts)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def _ratios(rows: Sequence[Result], names: Sequence[str], *, with_ms: bool) -> list[str]:
    names = [n for n in names if n != "sgd"]
    head = ["row"] + ["sgd, ms"] * with_ms + [f"{n} / {METHODS[n].base}" for n in names]
    lines = []
    for row in rows:
        base = row["methods"].get("sgd", {}).get("step_ms")
        lines.append(
            [row["row"]]
            + ["" if base is None else _digits(base)] * with_ms
            + [_ratio_text(row["methods"].get(n, {})) for n in names]
        )
    return table(head, lines)


def _ratio_text(result: Result) -> str:
    if "over_s" in result:
        return f"over {result['over_s']:.0f} s ({result['steps_taken']} steps)"
    if "ratio" not in result:
        return "–"
    text = _times(result["ratio"])
    if result["low"] is not None:
        text += f" ({_times(result['low'])}–{_times(result['high'])})"
    return text if result["finite"] else text + ", diverged"


def _targets(targets: Sequence[Result]) -> list[str]:
    lines = []
    for t in targets:
        if t["kind"] == "speed":
            inside = t["low"] is not None and t["low"] <= t["limit"] <= t["high"]
            text = f"{t['value']:.3f}" + ("" if t["low"] is None else f" ({t['low']:.3f}–{t['high']:.3f})")
            verdict = ("met" if t["met"] else "missed") + (", within the interval" if inside else "")
            paired = "–" if t["paired"] is None else f"{t['paired']:.3f}"
            lines.append([t["row"], f"{t['method']} / {t['against']}", f"{t['limit']:.2f}", text, paired, verdict])
    return table(["row", "step time", "at most", "measured", "median of rounds' ratios", "verdict"], lines)


def _added(rows: Sequence[Result], rivals: Sequence[str]) -> list[str]:
    lines = []
    for row in rows:
        ours = added_ms(row, "bnp-sgd")
        if ours is None:
            continue
        cells = [row["row"], _digits(ours[0])]
        for name in rivals:
            theirs = added_ms(row, name)
            if theirs is None:
                cells.append("–")
            else:
                verdict = "met" if ours[0] <= theirs[0] else "unknown" if theirs[1] else "**missed**"
                cells.append(f"{'over ' if theirs[1] else ''}{_digits(theirs[0])}, {verdict}")
        lines.append(cells)
    head = ["ms per step over sgd's", "bnp-sgd", *(f"≤ {name}" for name in rivals)]
    return table(head, lines)


def _memory(rows: Sequence[Result], names: Sequence[str]) -> list[str]:
    verdicts = {(t["row"], t["method"]): t for row in rows for t in row["targets"] if t["kind"] == "memory"}
    lines = []
    for row in rows:
        peak = row["methods"].get("sgd", {}).get("peak_bytes")
        cells = [row["row"], "" if peak is None else f"{peak / 2**20:.2f}"]
        for name in names[1:]:
            value = row["methods"].get(name, {}).get("memory_ratio")
            text = "–" if value is None else f"{value:.3f}"
            verdict = verdicts.get((row["row"], name))
            if verdict is not None:
                text += f" ({'met' if verdict['met'] else '**missed**'}, ≤ {verdict['limit']:.3f})"
            cells.append(text)
        lines.append(cells)
    said = (
        "Most tensor bytes alive at once in a step, as a ratio to the base's. Targets: the gradient form 1.02; the "
        "two-sided form (bnp-adamw) 1.02 and one more copy of the preconditioned parameters."
    )
    return [said, "", *table(["row", "sgd, MiB", *(f"{n} / {METHODS[n].base}" for n in names[1:])], lines)]


def _profiles(rows: Sequence[Result]) -> list[str]:
    lines = []
    for row in rows:
        for name, result in row["profiles"].items():
            whole = result["all"]["base_us"]
            cells = [f"{r['added_us']:+.0f} ({r['added_us'] / whole:+.1%})" for r in result.values()]
            lines.append([f"{row['row']}, {name}", f"{whole:.0f}", *cells])
    head = [
        "added µs (share of the base's step)",
        "base's step",
        *(PHASES.get(k, "whole step") for k in (*PHASES, "all")),
    ]
    said = "Differences between medians by phase, in the same interleaved way; they need not add up to the whole."
    return [said, "", *table(head, lines)]


def _notes(rows: Sequence[Result], names: Sequence[str], threads: int) -> list[str]:
    lines = [f" * {n}: {METHODS[n].note}." for n in names if METHODS[n].note]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, result in row["methods"].items():
            if "skipped" in result:
                reasons.setdefault((name, result["skipped"]), []).append(row["row"])
    lines += [f" * Not run: {name} on {', '.join(where)}: {why}." for (name, why), where in reasons.items()]
    busy = [f"{r['row']} ({r['cpu_share']:.0%})" for r in rows if r["cpu_share"] < 0.95]
    if busy and threads == 1:
        lines.append(f" * Others were on the core, which left the benchmark less of it: {', '.join(busy)}.")
    rounds = ", ".join(f"{r['row']} {r['rounds']} × {r['steps_per_block']}" for r in rows)
    lines.append(
        " * A row is measured in a process of its own, whose allocator keeps what is freed, with denormals flushed and "
        "no garbage collection in timed steps. All rates are tiny, so that nothing diverges or is learnt by heart."
    )
    return [*lines, f" * Rounds × steps of each (peers may take part in fewer): {rounds}."]


def _environment_line(environment: Result) -> str:
    packages = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    bf16 = "" if environment["bf16_instructions"] is None else (
        f", {'with' if environment['bf16_instructions'] else 'without'} bfloat16 instructions"
    )  # fmt: skip
    return (
        f"{environment['machine']}, {environment['cores']} cores{bf16}; {environment['threads']} thread(s); Python "
        f"{environment['python']}, {packages}; {environment['date'][:10]}."
    )


def _digits(ms: float) -> str:
    return f"{ms:.3g}" if abs(ms) < 1000 else f"{ms:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
