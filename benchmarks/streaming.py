"""Predict, then learn: BNP at one default rate on streams, against nets with tuned rates and river's own models.

    python -m benchmarks.streaming

river's streams (inside the package: no download), raw and as its StandardScaler hands them on, one with an abrupt
shift, two synthetic ones with drift; batch size 1; MLP 32-32. Every net runs at every rate of its grid, on the tuning
seed 0 and on reporting seeds. Seed 0 chooses the rate that is best for a stream, and the single rate that is best over
all streams; the tables report what those two do on the other seeds. ``--quick``: two streams, one reporting seed.

Finished runs are kept under OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.progressive import OTHERS, OtherRun
from benchmarks.evidence.replicas import run_streams
from benchmarks.evidence.runner import Cache, published, run_all
from benchmarks.evidence.streaming_plan import NETS, QUICK, SEEDS, TUNING_SEED, all_runs, without_curve
from benchmarks.evidence.streaming_report import write
from benchmarks.evidence.streams import SAMPLES


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.streaming", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two streams, one reporting seed: under five minutes")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="for reporting (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=NETS, default=list(NETS), help="nets (all)")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many (no limit)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figure of what is there")
    args = parser.parse_args(arguments)
    streams = QUICK if args.quick else SAMPLES
    nets = [n for n in args.methods if not args.quick or n != "ON + AdamW"]
    seeds = SEEDS[:1] if args.quick else tuple(args.seeds)
    cache = Cache(args.output / ".cache" / "evidence", published(args.output))
    until = -math.inf if args.report else time.monotonic() + 60 * args.minutes
    try:
        others = [OtherRun(stream, name, n) for stream, n in streams.items() for name in OTHERS]
        run_all(others, cache, Path(), until=until, label="river's models")
        runs = all_runs(streams, nets, (TUNING_SEED, *seeds))
        found = run_streams(runs, cache, workers=args.workers, until=until, label="nets")
        if not args.report:
            cache.forget(bare := without_curve(found, streams, nets))
            run_streams(bare, cache, workers=args.workers, until=until, label="curves")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last finished run.")
    print(write(streams, nets, seeds, cache, args.output, quick=args.quick))


if __name__ == "__main__":
    main()
