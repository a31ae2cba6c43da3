"""The command line of the full convergence benchmark."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace

from benchmarks.data import DataMissingError
from benchmarks.evidence.contenders import CONTENDERS
from benchmarks.evidence.engine import SCHEDULES
from benchmarks.evidence.plan import PRESETS, impossible
from benchmarks.evidence.report import write
from benchmarks.evidence.runner import Cache, published, run_all
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.times import keep_times, step_times


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the full benchmark takes beside the options of the quick one."""
    parser.add_argument("--preset", choices=PRESETS, default="full", help="how much is run (%(default)s)")
    parser.add_argument("--tasks", nargs="+", help="of the preset's (all)")
    parser.add_argument("--methods", nargs="+", help="of the preset's (all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="of the preset's (all)")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="of the preset's (all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many (no limit)")
    parser.add_argument("--times", action="store_true", help="measure what steps cost, and no accuracy")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figures of what is there")


def main(args: argparse.Namespace) -> None:
    """Run what is missing and write the report of what is there."""
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
                chosen = [CONTENDERS[n] for n in part.contenders if not impossible(CONTENDERS[n], batch_size)]
                path = args.output / f"convergence_{scope.task}_times.json"
                keep_times(path, batch_size, step_times(task, split, chosen, batch_size))
            until = -math.inf
        options = {"workers": args.workers, "until": until}
        try:
            for schedule in args.schedules or scope.schedules:
                part = replace(scope.only(args.methods, args.batch_sizes), schedules=(schedule,))
                label = f"{scope.task}, {schedule}"
                found = run_all(part.tuning(), cache, args.data_dir, label=f"{label}, tuning", **options)
                run_all(part.reporting(found), cache, args.data_dir, label=f"{label}, reporting", **options)
        except DataMissingError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("\nInterrupted. The same command goes on from the last finished run.")
        print(write(scope, preset, cache, args.output))
