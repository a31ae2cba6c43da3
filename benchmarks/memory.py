"""The most tensor bytes that live at once during a training step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "benchmarks.memory: step"


def peak_bytes(build: Callable[[], Any], steps: int, device: str = "cpu") -> int:
    """Peak of live bytes of the steps after the first two, with all that lives before them.

    On the CPU the profiler sees every allocation and release from before the net is built on, so the running sum
    is what lives. On CUDA the allocator keeps the count.

    Args:
        build: Makes the net, its inputs and its optimizers; the result has ``step()``.
        steps: To take in all, at least 3; a method whose work repeats every k steps needs k + 2.
    """
    if steps < 3:
        raise ValueError(f"steps is {steps}: the first two allocate states, so it must be at least 3")
    gc.collect()  # what an earlier run has left in cycles must not be released in this one
    if device == "cuda":
        return _cuda_peak(build, steps)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training = build()
        for _ in range(steps):
            with record_function(_MARK):
                training.step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    marks = sorted((e.start_ns(), e.duration_ns()) for e in events if e.name() == _MARK)
    start, end = marks[2][0], sum(marks[-1])
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return highest(changes, start, end)


def highest(changes: Iterable[tuple[int, int]], start: int, end: int) -> int:
    """The highest running sum of (time, bytes) while time is in [start, end], with the sum before it."""
    before, inside = 0, []
    for moment, size in sorted(changes, key=lambda change: change[0]):
        if moment < start:
            before += size
        elif moment <= end:
            inside.append(size)
    live = peak = before
    for size in inside:
        live += size
        peak = max(peak, live)
    return peak


def _cuda_peak(build: Callable[[], Any], steps: int) -> int:
    before = torch.cuda.memory_allocated()
    training = build()
    training.step()
    training.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps - 2):
        training.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
