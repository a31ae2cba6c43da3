"""What a training step of a recurrent layer costs with BNP, as a multiple of the plain base's; about five minutes.

    python -m benchmarks.sequence_cost

A layer above the first makes BNP run the layers below once more, so depth is what the rows differ in. One thread;
methods take turns (benchmarks/timing.py). Prints a table in Markdown.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.runs import make_optimizer
from benchmarks.timing import Contestant, Plan, interleave, ratio, summary

STEPS_OF_TIME = 28
SHAPES = ((1, 28, 64), (32, 28, 64), (32, 256, 256))  # batch size, features, units
DEPTHS = (1, 2, 3)
PLAN = Plan(seconds=3.0)


def stepper(method: str, layers: int, batch_size: int, features: int, units: int) -> Callable[[], float]:
    """A function that takes one step of forward, backward and ``step()``, and returns its seconds."""
    torch.manual_seed(0)
    rnn = nn.LSTM(features, units, layers)
    optimizer = make_optimizer(method, 1e-3, rnn)
    x = torch.randn(STEPS_OF_TIME, batch_size, features)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        rnn(x)[0][-1].square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def table(plan: Plan = PLAN) -> str:
    """Rows of shapes, columns of depths."""
    lines = [
        "| LSTM, 28 steps | base | " + " | ".join(f"{n} layer{'s' * (n > 1)}" for n in DEPTHS) + " |",
        "| --- | --- |" + " --- |" * len(DEPTHS),
    ]
    for shape in SHAPES:
        for base in ("SGD", "AdamW"):
            texts = []
            for layers in DEPTHS:
                plain, ours = (Contestant(m, stepper(m, layers, *shape)) for m in (base, f"BNP-{base}"))
                interleave([plain, ours], plan)
                texts.append(f"{ratio(ours, plain)['ratio']:.2f} ({summary(plain)['step_ms']:.2g} ms)")
            lines.append(f"| batch {shape[0]}, {shape[1]} → {shape[2]} | {base} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(table())
