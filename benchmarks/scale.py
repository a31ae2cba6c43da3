"""What the exchange of statistics costs under DistributedDataParallel and fully_shard: 1, 2 and 4 processes on gloo.

    python -m benchmarks.scale [--rounds 30] [--output benchmarks/results/scale]

All ranks of a row take blocks of steps by turns: the plain base, the wrapper, and the wrapper whose ranks keep their
statistics to themselves (a process group of one rank), which tells what the exchange adds. A ratio is one of medians
over rank 0's blocks. Where there are more processes than cores they wait for one another: read ratios, not times.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.workloads import cnn, mlp
from bnp_optim import BNPreconditioner

METHODS = ("plain", "wrapped", "wrapped, not shared")
# network, shape of a sample, batch of each rank, options
ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, dict[str, Any]]] = {
    "MLP 4×64, batch 64": (lambda: mlp((32, 64, 64, 64, 64, 10), "none"), (32,), 64, {}),
    "MLP 784-1024³-10, batch 64": (lambda: mlp((784, 1024, 1024, 1024, 10), "none"), (784,), 64, {}),
    "MLP 784-1024³-10, batch 64, spectral": (
        lambda: mlp((784, 1024, 1024, 1024, 10), "none"),
        (784,),
        64,
        {"step_scale": "spectral"},
    ),
    "CNN, batch 32": (lambda: cnn("none"), (3, 32, 32), 32, {}),
    "MLP 784-1024³-10, batch 64, fully_shard": (lambda: mlp((784, 1024, 1024, 1024, 10), "none"), (784,), 64, {}),
    "CNN, batch 32, fully_shard": (lambda: cnn("none"), (3, 32, 32), 32, {}),
}
WORLDS = (1, 2, 4)
BLOCK = 4  # steps, of which the first is not counted


def work(rank: int, world: int, port: int, name: str, rounds: int, answer: Any) -> None:
    """One rank of one row."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    build, shape, batch, options = ROWS[name]
    groups = {"wrapped": None, "wrapped, not shared": alone}
    steps: dict[str, Callable[[Tensor, Tensor], None]] = {}
    optimizers: dict[str, Any] = {}
    models: dict[str, nn.Module] = {}
    for method in METHODS:
        torch.manual_seed(0)
        models[method] = build()
        front = (fully_shard if name.endswith("fully_shard") else DistributedDataParallel)(models[method])
        base = torch.optim.SGD(models[method].parameters(), lr=1e-3, momentum=0.9)
        optimizers[method] = (
            base
            if method == "plain"
            else BNPreconditioner(base, models[method], mode="gradient", process_group=groups[method], **options)
        )
        steps[method] = _step(front, optimizers[method])
    generator = torch.Generator().manual_seed(rank)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for i in range(rounds + 2):
        for method in METHODS:
            dist.barrier()
            for step in range(BLOCK):
                x = torch.randn(batch, *shape, generator=generator)
                y = torch.randint(10, (batch,), generator=generator)
                start = time.perf_counter()
                steps[method](x, y)
                if step and i > 1:
                    times[method].append(time.perf_counter() - start)
        answer.put(("round", None))
    shared = optimizers["wrapped"].synchronization
    weights = torch.cat([_whole(p.detach()).flatten() for p in models["wrapped"].parameters()])
    everybodys = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everybodys, weights)
    channels = sum(s.mean.numel() for s in optimizers["wrapped"].statistics.values())
    if rank == 0:
        found = {
            "row": name,
            "processes": world,
            "ms": {m: 1e3 * statistics.median(t) for m, t in times.items()},
            "bytes": 0 if shared is None else shared.bytes,
            "channels": channels,
            "gradient_bytes": weights.numel() * 4,
            "same_parameters": all(torch.equal(w, weights) for w in everybodys),
        }
        answer.put(("row", found))
    dist.barrier()
    dist.destroy_process_group()


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _step(front: nn.Module, optimizer: Any) -> Callable[[Tensor, Tensor], None]:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(front(x), y).backward()
        optimizer.step()

    return step


def run(name: str, world: int, rounds: int, bar: Any) -> dict[str, Any]:
    """One row: as many processes as it says."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    context = mp.get_context("spawn")
    answer = context.Queue()
    processes = [context.Process(target=work, args=(rank, world, port, name, rounds, answer)) for rank in range(world)]
    for p in processes:
        p.start()
    try:
        while True:
            kind, found = answer.get(timeout=300)
            if kind == "row":
                return dict(found)
            bar.update(1 / world)
    finally:
        for p in processes:
            p.join(timeout=20)
            p.kill()


def markdown(document: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# What the exchange of statistics costs (DistributedDataParallel or fully_shard, gloo)",
        "",
        f"{document['cpu']}, {document['cores']} cores, one thread per process; torch {document['torch']}, "
        f"{document['date']}. Milliseconds of a step are rank 0's median; ratios are of medians, by blocks in turns. "
        f"Load average before: {document['load']:.0f}.",
        "",
        "| network (batch per process) | processes | plain ms | wrapped / plain | not shared / plain | "
        "bytes per rank and step | 8·Σ channels | of the gradients' bytes | parameters the same |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in document["rows"]:
        ms = r["ms"]
        lines.append(
            f"| {r['row']} | {r['processes']} | {ms['plain']:.2f} | {ms['wrapped'] / ms['plain']:.3f} | "
            f"{ms['wrapped, not shared'] / ms['plain']:.3f} | {r['bytes']:,} | {8 * r['channels']:,} | "
            f"{100 * r['bytes'] / r['gradient_bytes']:.2f} % | {'yes' if r['same_parameters'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], path: Path) -> None:
    """Ratios by row and number of processes."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["row"] for r in document["rows"]))
    lines = -(-len(names) // 3)
    size = (9.3, 3.2 * lines)
    figure, grid = plt.subplots(lines, 3, figsize=size, sharey=True, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for ax in axes[len(names) :]:
        ax.remove()
    for ax, name in zip(axes, names, strict=False):
        rows = [r for r in document["rows"] if r["row"] == name]
        worlds = [str(r["processes"]) for r in rows]
        for method, marker in (("wrapped", "o"), ("wrapped, not shared", "s")):
            ax.plot(worlds, [r["ms"][method] / r["ms"]["plain"] for r in rows], marker=marker, label=method)
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.set_title(name.replace(", ", "\n", 1), fontsize=9)
        ax.set_xlabel("processes")
    for ax in axes[: len(names) : 3]:
        ax.set_ylabel("time of a step / plain base's")
    axes[0].legend(fontsize=8)
    axes[0].set_ylim(bottom=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scale")
    args = parser.parse_args(arguments)
    from benchmarks.documents import environment  # draws too, and measuring processes import this module

    document: dict[str, Any] = environment() | {"rounds": args.rounds, "load": os.getloadavg()[0]}
    kept = args.output.with_suffix(".partial.json")  # finished rows, so that a run that was cut off goes on
    rows = json.loads(kept.read_text()) if kept.is_file() else []
    todo = [(name, world) for name in args.rows for world in args.worlds]
    with tqdm(total=len(todo) * (args.rounds + 2), unit="round", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        for name, world in todo:
            bar.set_description(f"{name}, {world}")
            if any((r["row"], r["processes"], r["rounds"]) == (name, world, args.rounds) for r in rows):
                bar.update(args.rounds + 2)
                continue
            rows.append(run(name, world, args.rounds, bar) | {"rounds": args.rounds})
            kept.write_text(json.dumps(rows))
    document["rows"] = rows
    args.output.with_suffix(".json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    args.output.with_suffix(".md").write_text(markdown(document))
    plot(document, args.output.with_suffix(".png"))
    kept.unlink()
    print(markdown(document))


if __name__ == "__main__":
    main()
