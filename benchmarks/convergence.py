"""Accuracy on real data: BNP, its plain bases, and their peers.

    python -m benchmarks.convergence --quick                           # digits, all methods: minutes, no --data-dir
    python -m benchmarks.convergence --preset short --data-dir data    # trimmed: hours
    python -m benchmarks.convergence --data-dir data                   # all of it: see benchmarks/evidence/plan.py
    python -m benchmarks.convergence --preset five-seeds --data-dir data    # MNIST, BNP at one rate against its bases

Finished runs are kept, under OUTPUT/.cache and in the results that are published, and are not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

try:
    import matplotlib  # noqa: F401
    import numpy  # noqa: F401
    import tqdm  # noqa: F401
except ImportError as error:
    sys.exit(f"benchmarks need {error.name}: pip install numpy matplotlib tqdm")

from benchmarks import five_seeds
from benchmarks.data import DataMissingError
from benchmarks.evidence import command
from benchmarks.evidence.engine import SCHEDULES
from benchmarks.evidence.plan import PRESETS

FIVE_SEEDS = "five-seeds"
PART = ("tasks", "methods", "batch_sizes", "schedules", "minutes", "times", "report")  # what it does not take


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    usage = "\n".join((__doc__ or "").split("\n")[2:])
    result = argparse.ArgumentParser(
        "python -m benchmarks.convergence", description=(__doc__ or "").split("\n")[0], epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    amount = result.add_mutually_exclusive_group()
    amount.add_argument("--preset", choices=(*PRESETS, FIVE_SEEDS), default="full", help="how much (%(default)s)")
    amount.add_argument("--quick", dest="preset", action="store_const", const="quick", help="--preset quick")
    result.add_argument("--data-dir", type=Path, default=Path("data"), help="with mnist/ and others (%(default)s)")
    result.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    result.add_argument("--fresh", action="store_true", help="run again what is there already")
    part = result.add_argument_group(f"a part of a preset (not of {FIVE_SEEDS})")
    part.add_argument("--tasks", nargs="+", help="of the preset's (all)")
    part.add_argument("--methods", nargs="+", help="of the preset's (all)")
    part.add_argument("--batch-sizes", nargs="+", type=int, help="of the preset's (all)")
    part.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="of the preset's (all)")
    part.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many (no limit)")
    part.add_argument("--times", action="store_true", help="measure what steps cost, and no accuracy")
    part.add_argument("--report", action="store_true", help="run nothing: tables and figures of what is there")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    own = parser()
    args = own.parse_args(arguments)
    if args.workers < 1:
        own.error(f"--workers is {args.workers}, it must be at least 1")
    try:
        if args.preset != FIVE_SEEDS:
            command.main(args)
            return
        if part := [name for name in PART if getattr(args, name) != own.get_default(name)]:
            own.error(f"--preset {FIVE_SEEDS} is run whole: leave out --{part[0].replace('_', '-')}")
        print(five_seeds.main(args.data_dir, args.output, args.workers, fresh=args.fresh))
    except DataMissingError as error:
        own.error(str(error))
    except PackageNotFoundError as error:
        own.error(f"{error.name} is not installed: pip install -e '.[benchmarks]', or leave its method out (--methods)")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last finished run.")


if __name__ == "__main__":
    main()
