"""What the command line of the convergence benchmark does with a preset."""

from __future__ import annotations

import argparse
import math
import sys
import time

from benchmarks.evidence.contenders import CONTENDERS, PEERS
from benchmarks.evidence.plan import PRESETS, impossible
from benchmarks.evidence.report import write
from benchmarks.evidence.runner import Cache, published, run_all
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.times import keep_times, step_times


def main(args: argparse.Namespace) -> None:
    """Run what is missing and write the report of what is there; ``args`` are those of benchmarks/convergence.py."""
    preset = PRESETS[args.preset]
    cache = Cache(args.output / ".cache" / "evidence", published(args.output))
    until = -math.inf if args.report else time.monotonic() + 60 * args.minutes
    known = {scope.task for scope in preset.scopes}
    if unknown := set(args.tasks or ()) - known:
        sys.exit(f"--tasks {' '.join(sorted(unknown))}: preset {preset.name} has {', '.join(sorted(known))}")
    for scope in preset.scopes:
        if args.tasks and scope.task not in args.tasks:
            continue
        if args.times:
            task, part = TASKS[scope.task], scope.only(args.methods, args.batch_sizes)
            split = task.load(args.data_dir)
            for batch_size in part.samples:
                names = [n for n in part.contenders if n in PEERS]  # a folded net's steps cost what others' do
                chosen = [CONTENDERS[n] for n in names if not impossible(CONTENDERS[n], batch_size)]
                path = args.output / f"convergence_{scope.task}_times.json"
                keep_times(path, batch_size, step_times(task, split, chosen, batch_size))
            until = -math.inf
        if args.fresh:
            cache.forget(scope.only(args.methods, args.batch_sizes, args.schedules).everything())
        options = {"workers": args.workers, "until": until}
        for schedule in args.schedules or scope.schedules:
            part = scope.only(args.methods, args.batch_sizes, (schedule,))
            label = f"{scope.task}, {schedule}"
            found = run_all(part.tuning(), cache, args.data_dir, label=f"{label}, tuning", **options)
            run_all(part.reporting(found), cache, args.data_dir, label=f"{label}, reporting", **options)
            whole = scope.only(args.methods, None, (schedule,))  # the one rate is that of all batch sizes
            runs = [r for r in whole.at_one_rate(cache.found(whole.tuning())) if r.batch_size in part.samples]
            run_all(runs, cache, args.data_dir, label=f"{label}, at one rate", **options)
        print(write(scope, preset, cache, args.output))
