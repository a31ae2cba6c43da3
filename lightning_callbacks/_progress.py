"""Say in the trainer's progress bar that an estimate is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["progress_in"]

_INTERVAL = 0.2  # seconds between updates: a bar is for eyes


@contextmanager
def progress_in(trainer: Any, title: str, *, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """The bar's description says ``title`` and how far it is; afterwards it says again what it said.

    Bars that are neither tqdm's nor rich's, and whatever goes wrong with one of these, are left alone.

    Yields:
        To call with (done, of how many).
    """
    bar = trainer.progress_bar_callback if enabled and trainer.is_global_zero else None
    describe, before = _description(bar)
    last = -_INTERVAL

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if describe is not None and (now - last >= _INTERVAL or done >= total):
            last = now
            with suppress(Exception):
                describe(f"{title} {done}/{total}")

    try:
        yield update
    finally:
        if describe is not None:
            with suppress(Exception):
                describe(before)


def _description(bar: Any) -> tuple[Callable[[str], None] | None, str]:
    """How to set the description of the training bar, and what it is now."""
    if bar is None or not getattr(bar, "is_enabled", False):
        return None, ""
    with suppress(Exception):
        inner, task = getattr(bar, "progress", None), getattr(bar, "train_progress_bar_id", None)
        if inner is not None and task is not None:  # rich

            def describe(text: str) -> None:
                inner.update(task, description=text)
                bar.refresh()

            return describe, str(inner.tasks[inner.task_ids.index(task)].description)
        tqdm = bar.train_progress_bar
        # set_description appends the colon that a description has already
        return tqdm.set_description, str(tqdm.desc or "").removesuffix(": ")
    return None, ""
