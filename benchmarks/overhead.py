"""What a training step costs with BNP, beside the plain base, normalization layers and second-order methods.

    python -m benchmarks.overhead            # about 1.5 hours, on one thread
    python -m benchmarks.overhead --quick    # two minutes, without peers and the ResNet
    python -m benchmarks.overhead --profile mlp-64:1

Each row, a workload at a batch size, is measured in a process of its own; within it the methods take turns, and
ratios are of costs in the same run. Finished rows are kept under OUTPUT/.cache and skipped the next time, until a
source that they hang on changes. Peers that need more than --limit seconds for one row are cut off there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import numpy  # noqa: F401
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"benchmarks need {error.name}: pip install numpy matplotlib tqdm")

import torch

from benchmarks.methods import LEARNING_RATE, METHODS
from benchmarks.overhead_report import markdown
from benchmarks.phases import phase_table, profile
from benchmarks.rows import WORKLOADS, Row, keep, kept, measure_apart, set_up, versions
from benchmarks.targets import evaluate
from benchmarks.timing import Plan

GPU_METHODS = ("sgd", "bnp-sgd", "bn", "adamw", "bnp-adamw", "muon", "soap")


def pick_rows(args: argparse.Namespace, machine: str) -> list[Row]:
    """The rows that the options ask for."""
    cuda = args.device == "cuda"
    if args.methods:
        methods = args.methods
    elif cuda:
        methods = list(GPU_METHODS)
    else:
        methods = [n for n, m in METHODS.items() if not m.optional and not (args.quick and m.peer)]
    wanted = {*methods, *(METHODS[n].base for n in methods)}
    names = tuple(n for n in METHODS if n in wanted)
    if args.workloads:
        pairs = args.workloads
    else:
        works = [w for w in WORKLOADS.values() if w.gpu == cuda and not (args.quick and w.slow)]
        pairs = [(w.name, batch) for w in works for batch in w.batch_sizes]
    quick = Plan(seconds=0.7, min_rounds=3, max_rounds=25, block=0.01, limit=args.limit, warm_up=0.1)
    plan = quick if args.quick else Plan(args.seconds, limit=args.limit)
    ours = () if cuda else tuple(n for n in ("bnp-sgd", "bnp-adamw")[: 1 if args.quick else 2] if n in names)
    return [
        Row(work, batch, names, plan, ours, args.device, compiled, args.threads, machine)
        for work, batch in pairs
        for compiled in ((False, True) if cuda else (False,))
    ]


def run_all(rows: Sequence[Row], cache: Path) -> list[dict[str, Any]]:
    """The results of ``rows`` in their order; those in ``cache`` are read, the others measured one by one."""
    cache.mkdir(parents=True, exist_ok=True)
    results = []
    shape = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
    with tqdm(total=float(len(rows)), bar_format=shape, dynamic_ncols=True) as bar:
        for done, row in enumerate(rows):
            bar.set_description_str(f"{row.name} ({done + 1}/{len(rows)})")
            result = kept(row, cache)
            if result is None:
                result = measure_apart(row, lambda share, done=done: bar.update(done + share - bar.n))
                keep(row, result, cache)
            bar.update(done + 1 - bar.n)
            results.append(result)
    return results


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were had with."""
    from benchmarks.documents import environment  # draws too, and measuring processes import this module

    found = environment()
    machine, bf16 = found.pop("cpu"), None
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").is_file():
        bf16 = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    found |= {"machine": machine, "bf16_instructions": bf16, "threads": args.threads, "versions": versions()}
    return found


def write_report(results: list[dict[str, Any]], args: argparse.Namespace, about: dict[str, Any]) -> str:
    """Write the JSON, the Markdown and the PNG; returns the Markdown."""
    from benchmarks.overhead_plot import plot

    targets = evaluate(results)
    names = dict.fromkeys(n for r in results for n in r["methods"])
    document = {
        "benchmark": "overhead",
        "quick": args.quick,
        "configuration": {
            "learning_rate": LEARNING_RATE,
            "flush_denormal": True,
            "limit_s": args.limit,
            "methods": {n: {"base": METHODS[n].base, "note": METHODS[n].note} for n in names},
        },
        "environment": about,
        "targets": targets,
        "rows": [r | {"targets": [t for t in targets if t["row"] == r["row"]]} for r in results],
    }
    text = markdown(document)
    part = "_part" if args.methods or args.workloads else ""
    stem = "overhead" + ("_cuda" if args.device == "cuda" else "") + ("_quick" if args.quick else "") + part
    (args.output / f"{stem}.json").write_text(_compact(document) + "\n")
    (args.output / f"{stem}.md").write_text(text)
    plot(document, args.output / f"{stem}.png")
    return text


def _compact(document: dict[str, Any]) -> str:
    """Indented JSON with one line per method of a row and per target, and five significant digits."""
    rows = []
    for row in document["rows"]:
        row = {key: value for key, value in row.items() if key != "targets"}
        methods = ",\n".join(f'        "{n}": {json.dumps(_rounded(m))}' for n, m in row.pop("methods").items())
        rows.append(f'    {{"methods": {{\n{methods}\n      }},\n      ' + json.dumps(_rounded(row))[1:])
    targets = ",\n".join(f"    {json.dumps(_rounded(t))}" for t in document["targets"])
    head = json.dumps({**document, "targets": [], "rows": []}, indent=2)
    head = head.replace('"targets": []', f'"targets": [\n{targets}\n  ]')
    return head.replace('"rows": []', '"rows": [\n' + ",\n".join(rows) + "\n  ]")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [n for n in names if n not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    return names


def _workloads(text: str) -> list[tuple[str, int]]:
    """mlp-64 for all its batch sizes, or mlp-64:1 for one."""
    pairs = []
    for item in text.split(","):
        name, _, batch = item.partition(":")
        if name not in WORKLOADS or not (batch.isdigit() or batch == ""):
            raise argparse.ArgumentTypeError(
                f"no workload {item!r}; write one of {', '.join(WORKLOADS)}, or NAME:BATCH"
            )
        pairs += [(name, int(batch))] if batch else [(name, b) for b in WORKLOADS[name].batch_sizes]
    return pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, without the ResNet and the peers")
    parser.add_argument("--methods", type=_methods, help="a,b: only these, and their bases")
    parser.add_argument("--workloads", type=_workloads, help="x,y or x:BATCH: only these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each method in each row, about (%(default)g)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a peer in a row, at most (%(default)g)")
    parser.add_argument("--profile", type=_workloads, metavar="NAME:BATCH", help="just print where the time goes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="discard finished rows")
    args = parser.parse_args(arguments)
    for name in ("threads", "seconds", "limit"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name)}, it must be above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if args.profile:
        set_up(args.threads)
        for work, batch in args.profile:
            for name in (n for n in args.methods or ["bnp-sgd"] if n.startswith("bnp-")):
                result = profile(WORKLOADS[work], batch, name, Plan(seconds=5.0))
                print(phase_table(result, f"{work}:{batch}, {name}", METHODS[name].base) + "\n")
        return
    about = describe(args)
    cache = args.output / ".cache"
    if args.fresh:
        for path in cache.glob("overhead_*"):
            path.unlink()
    try:
        results = run_all(pick_rows(args, about["machine"]), cache)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last finished row.")
    except RuntimeError as error:
        sys.exit(f"{error}. The same command goes on from there.")
    print(write_report(results, args, about))


if __name__ == "__main__":
    main()
