"""A character GPT on the source of Python's standard library: BNP, its plain bases, Muon and SOAP.

    python -m benchmarks.language                     # all of it: see benchmarks/evidence/language_plan.py
    python -m benchmarks.language --preset short      # 3×96, fewer steps
    python -m benchmarks.language --quick             # 2×64, a few steps: minutes

No download: the text is what is installed, and its digest is part of what a run is known by. Every method runs its
whole grid of rates on seed 0, and at the rate chosen there on the reporting seeds, at batch sizes 16 and 1, under one
schedule: linear warm-up, then linear decay. The measure is the validation loss in nats per character.

Finished runs are kept under OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.language_plan import METHODS, PRESETS
from benchmarks.evidence.language_report import write
from benchmarks.evidence.language_times import measure
from benchmarks.evidence.runner import Cache, published, run_all


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.language", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="full", help="how much is run (%(default)s)")
    parser.add_argument("--quick", action="store_const", const="quick", dest="preset", help="--preset quick")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="(16 and 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many (no limit)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    parser.add_argument("--times", action="store_true", help="measure what steps cost, and no loss")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figures of what is there")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}, it must be at least 1")
    scopes = PRESETS[args.preset]
    if unknown := set(args.batch_sizes or ()) - set(scopes[0].steps):
        parser.error(f"--batch-sizes {min(unknown)} is none of {sorted(scopes[0].steps)}")
    cache = Cache(args.output / ".cache" / "evidence", published(args.output))
    until = -math.inf if args.report or args.times else time.monotonic() + 60 * args.minutes
    for scope in scopes:
        part = scope.only(args.methods, args.batch_sizes)
        try:
            if args.times:
                measure(part, args.output)
            options = {"workers": args.workers, "until": until}
            found = run_all(part.tuning(), cache, Path(), label=f"{scope.net.name}, tuning", **options)
            run_all(part.reporting(found), cache, Path(), label=f"{scope.net.name}, reporting", **options)
        except KeyboardInterrupt:
            sys.exit("\nInterrupted. The same command goes on from the last finished run.")
        print(write(scope, args.preset, cache, args.output))


if __name__ == "__main__":
    main()
