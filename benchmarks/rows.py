"""One row of the overhead benchmark, a workload at a batch size: measured in a process of its own, and kept."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_workloads import GPU_WORKLOADS
from benchmarks.memory import peak_bytes
from benchmarks.methods import METHODS, Training, why_not
from benchmarks.phases import profile
from benchmarks.runs import package_digest
from benchmarks.timing import Contestant, OutOfTimeError, Plan, alarm, interleave, ratio, summary
from benchmarks.workloads import CPU_WORKLOADS, Workload

WORKLOADS: dict[str, Workload] = CPU_WORKLOADS | GPU_WORKLOADS
PEERS = ("singd", "pytorch_optimizer")
# For a measuring process: glibc keeps what is freed. Otherwise it hands large blocks back and fetches them again
# page by page, or not, by the luck of the heap's layout, which moves steps by a quarter. And no profiler chatter.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    "KINETO_LOG_LEVEL": "99",
}
_SOURCES = ("workloads", "gpu_workloads", "methods", "timing", "memory", "phases", "rows")
Progress = Callable[[float], None]


def sources_digest() -> str:
    """A hash of the sources that a row's numbers hang on."""
    digest = hashlib.sha256(package_digest().encode())
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str | None]:
    """Of torch and of the peers' packages; None if not installed."""
    found: dict[str, str | None] = {"torch": torch.__version__}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@dataclass(frozen=True)
class Row:
    """All that decides a row's numbers, but for the machine's mood.

    Args:
        methods: Names in METHODS; the bases of those are among them.
        plan: How long each method is timed.
        profiled: The methods among them whose phases are timed too, on the CPU.
        machine: The processor or accelerator, in words.
    """

    workload: str
    batch_size: int
    methods: tuple[str, ...]
    plan: Plan
    profiled: tuple[str, ...] = ()
    device: str = "cpu"
    compiled: bool = False
    threads: int = 1
    machine: str = ""
    versions: dict[str, str | None] = field(default_factory=versions, hash=False)
    sources: str = field(default_factory=sources_digest)

    @property
    def name(self) -> str:
        return f"{self.workload}:{self.batch_size}" + (":compiled" if self.compiled else "")

    @property
    def file_name(self) -> str:
        short = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"overhead_{self.name.replace(':', '_')}_{short}.json"


def set_up(threads: int) -> None:
    """What a measuring process does first."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    gc.freeze()  # what is imported needs no collection between rounds


def measure(row: Row, progress: Progress = lambda share: None) -> dict[str, Any]:
    """Time the row's methods, interleaved; then their memory, one by one; then where the wrapper's time goes."""
    work = WORKLOADS[row.workload]
    start = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    trainings: dict[str, Training] = {}
    for name in row.methods:
        reason = why_not(METHODS[name], work, row.batch_size)
        if reason is not None:
            results[name] = {"skipped": reason}
        else:
            trainings[name] = Training(work, row.batch_size, METHODS[name], device=row.device, compiled=row.compiled)
    contestants = {
        name: Contestant(name, _timed(training), METHODS[name].period, METHODS[name].peer)
        for name, training in trainings.items()
    }
    clocks = time.process_time(), time.perf_counter()
    protocol = interleave(list(contestants.values()), row.plan, lambda share: progress(0.7 * share))
    share = (time.process_time() - clocks[0]) / (time.perf_counter() - clocks[1])
    for name, contestant in contestants.items():
        if contestant.over:
            results[name] = {"over_s": contestant.spent, "steps_taken": contestant.taken}
            continue
        base = METHODS[name].base
        results[name] = {
            **summary(contestant),
            "base": base,
            **ratio(contestant, contestants[base]),
            "finite": trainings[name].finite(),
        }
    copies = {name: training.preconditioned_bytes() for name, training in trainings.items()}
    del trainings, contestants

    for i, (name, copy) in enumerate(copies.items()):
        if "over_s" not in results[name]:
            results[name] |= {"peak_bytes": _peak(row, work, name), "preconditioned_bytes": copy}
            if row.device == "cuda":
                results[name]["host_waits_in_step"] = _host_waits(row, work, name)
        progress(0.7 + 0.2 * (i + 1) / len(copies))
    for result in results.values():
        base_peak = results.get(result.get("base", ""), {}).get("peak_bytes")
        if base_peak and result.get("peak_bytes"):
            result["memory_ratio"] = result["peak_bytes"] / base_peak

    brief = replace(row.plan, seconds=row.plan.seconds / 3, min_rounds=3)
    profiled = [name for name in row.profiled if name in copies]
    profiles = {name: profile(work, row.batch_size, name, brief) for name in profiled}
    progress(1.0)
    return {
        "row": row.name,
        "workload": row.workload,
        "batch_size": row.batch_size,
        "compiled": row.compiled,
        **protocol,
        "cpu_share": share,  # of one core; with one thread, far below 1 means that others were on it
        "seconds": round(time.perf_counter() - start, 1),
        "methods": {name: results[name] for name in row.methods},
        "profiles": profiles,
    }


def _timed(training: Training) -> Callable[[], float]:
    """One training step that returns its seconds."""
    synchronize = torch.cuda.synchronize if training.device == "cuda" else None

    def step() -> float:
        start = time.perf_counter()
        training.step()
        if synchronize is not None:
            synchronize()
        return time.perf_counter() - start

    return step


def _peak(row: Row, work: Workload, name: str) -> int | None:
    """Peak bytes of a whole period, in a training of its own; None if the limit ends it."""
    method = METHODS[name]

    def build() -> Training:
        return Training(work, row.batch_size, method, device=row.device, compiled=row.compiled, batches=1)

    try:
        with alarm(row.plan.limit if method.peer else math.inf):
            return peak_bytes(build, 3 if method.period == 1 else method.period + 2, row.device)
    except OutOfTimeError:
        return None


def _host_waits(row: Row, work: Workload, name: str) -> bool:
    """Whether the optimizer's step makes the host wait for the device."""
    training = Training(work, row.batch_size, METHODS[name], device=row.device)
    for _ in range(3):
        training.step()
    training.zero_grad()
    training.forward().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.optimize()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def measure_apart(row: Row, progress: Progress) -> dict[str, Any]:
    """``measure`` in a fresh process, so that nothing leaks from row to row.

    Raises:
        RuntimeError: if the process ends without a result; it then says on stderr why.
    """
    os.environ.update(_ENVIRONMENT)
    try:
        context: Any = get_context("forkserver")  # its server imports things once, and does nothing else
        context.set_forkserver_preload(["benchmarks.rows", "torch._dynamo"])  # the latter: optimizers do
    except ValueError:  # a system without it
        context = get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(row, send))
    process.start()
    send.close()
    result: dict[str, Any] | None = None
    try:
        while result is None:
            message = receive.recv()
            if isinstance(message, dict):
                result = message
            else:
                progress(message)
    except EOFError:
        raise RuntimeError(f"{row.name}: the measuring process ended without a result") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    return result


def _work(row: Row, send: Connection) -> None:
    try:
        set_up(row.threads)
        send.send(measure(row, send.send))
    except KeyboardInterrupt:
        sys.exit(1)


def kept(row: Row, cache: Path) -> dict[str, Any] | None:
    """The result of a finished row, or None."""
    path = cache / row.file_name
    return json.loads(path.read_text()) if path.is_file() else None


def keep(row: Row, result: dict[str, Any], cache: Path) -> None:
    """Leave a result in ``cache``: whole, or not at all."""
    partial = cache / f"{row.file_name}.{os.getpid()}"
    partial.write_text(json.dumps(result))
    partial.replace(cache / row.file_name)
