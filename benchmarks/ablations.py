"""Which default is best? One question at a time, each answered by a table.

    python -m benchmarks.ablations --only step_scale --data-dir path/to/data

Classification questions run every contender over its whole grid of learning rates, at a constant rate, on the tasks
and batch sizes of benchmarks/evidence/questions.py, and where a variant looks better than the default, both again on
other seeds; those about streams (fold, stat_decay, floors, …) predict and then learn, sample by sample, as
benchmarks.streaming does. Within a seed all share initial weights and order. Finished
runs are kept under OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.data import DataMissingError
from benchmarks.evidence import confirm
from benchmarks.evidence.ablation_report import grids_of, write
from benchmarks.evidence.question import Question
from benchmarks.evidence.questions import QUESTIONS
from benchmarks.evidence.replicas import run_streams
from benchmarks.evidence.runner import Cache, published, run_all


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.ablations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions (all)")
    parser.add_argument("--tasks", nargs="+", help="of the question's (all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="of the question's (all)")
    parser.add_argument("--preset", choices=("full", "short"), default="full", help="samples (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(0)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many (no limit)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing: tables of what is there")
    args = parser.parse_args(arguments)
    cache = Cache(args.output / ".cache" / "evidence", published(args.output))
    until = -math.inf if args.report else time.monotonic() + 60 * args.minutes
    seeds = tuple(args.seeds)
    for name in args.only:
        question = QUESTIONS[name]
        runs: list[Any] = list(question.runs(args.preset, seeds))
        if isinstance(question, Question):
            runs = [r for r in runs if r.task in (args.tasks or [r.task])]
            runs = [r for r in runs if r.batch_size in (args.batch_sizes or [r.batch_size])]
        try:
            options = {"workers": args.workers, "until": until, "label": name}
            if isinstance(question, Question):
                run_all(runs, cache, args.data_dir, **options)
                grids = grids_of(question, args.preset, seeds, cache.found(question.runs(args.preset, seeds)))
                run_all(confirm.runs(question, args.preset, grids), cache, args.data_dir, **options)
            else:
                run_streams(runs, cache, **options)
        except DataMissingError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("\nInterrupted. The same command goes on from the last finished run.")
        print(write(question, args.preset, seeds, cache, args.output))


if __name__ == "__main__":
    main()
