"""Many runs: the cache of finished ones, and a progress bar for the others."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm


class Runnable(Protocol):
    """A run: hashable, with a key that differs where anything differs that its result depends on."""

    @property
    def key(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...

    def execute(self, data_dir: Path) -> dict[str, Any]: ...


R = TypeVar("R", bound=Runnable)


class Cache:
    """Finished runs: a file each in ``folder``, written whole or not at all, and those of results that were published.

    Args:
        published: JSON documents whose "runs" have keys; so a fresh clone goes on from what the repository holds.
    """

    def __init__(self, folder: Path, published: Iterable[Path] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[str, Any]] = {}
        for path in published:
            runs = json.loads(path.read_text()).get("runs", [])
            self._known.update({r["key"]: r["result"] for r in runs if "key" in r and "result" in r})

    def load(self, run: Runnable) -> dict[str, Any] | None:
        path = self.folder / f"{run.key}.json"
        return json.loads(path.read_text()) if path.is_file() else self._known.get(run.key)

    def save(self, run: Runnable, result: Mapping[str, Any]) -> None:
        path = self.folder / f"{run.key}.json"
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result))
        partial.replace(path)

    def forget(self, runs: Iterable[Runnable]) -> None:
        """As if they had never been, here and in what was published."""
        for run in runs:
            (self.folder / f"{run.key}.json").unlink(missing_ok=True)
            self._known.pop(run.key, None)

    def found(self, runs: Iterable[R]) -> dict[R, dict[str, Any]]:
        """The results that are there."""
        results = ((run, self.load(run)) for run in dict.fromkeys(runs))
        return {run: result for run, result in results if result is not None}


def published(output: Path) -> list[Path]:
    """The documents of ``output`` that a cache can start from."""
    return [p for p in sorted(output.glob("*.json")) if '"key"' in p.read_text()]


def run_all(
    runs: Sequence[R],
    cache: Cache,
    data_dir: Path,
    *,
    workers: int = 1,
    until: float = math.inf,
    label: str = "runs",
) -> dict[R, dict[str, Any]]:
    """The results of ``runs``: kept ones, and new ones begun before ``until`` (``time.monotonic``)."""
    results = cache.found(runs)
    todo = [run for run in dict.fromkeys(runs) if run not in results]
    if not todo or time.monotonic() > until:
        return results
    with tqdm(total=len(todo), desc=label, unit="run", mininterval=5, dynamic_ncols=True) as bar:
        if workers == 1:
            single_threaded()
            for run in todo:
                if time.monotonic() > until:
                    break
                results[run] = cache.load(run) or work(run, cache, data_dir)  # another process may have been there
                bar.update()
            return results
        deadline = time.time() + (until - time.monotonic())  # the clocks of processes differ
        with ProcessPoolExecutor(workers, get_context("spawn"), single_threaded) as pool:
            futures = {pool.submit(work, run, cache, data_dir, deadline): run for run in todo}
            try:
                for future in as_completed(futures):
                    if result := future.result():
                        results[futures[future]] = result
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return results


def work(run: Runnable, cache: Cache, data_dir: Path, deadline: float = math.inf) -> dict[str, Any]:
    """Execute and keep; nothing if ``deadline`` (``time.time``) has passed."""
    if time.time() > deadline:
        return {}
    result = run.execute(data_dir)
    cache.save(run, result)
    return result


def single_threaded() -> None:
    """What each process does first; moments of inputs that are rarely on decay to denormals, which are slow."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
