"""Theory around BNP, predicted against measured: one figure per paper.

    python -m benchmarks.theory [--only NAME]

Each check writes OUTPUT/theory_NAME.json and theory_NAME.png. Measured points are kept under OUTPUT/.cache and not
measured again; ``--fresh`` forgets them. A check of your own: a module with a ``Check``, and a line in ``CHECKS``.
Two are commands of their own, which measure everything anew: ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from benchmarks import (
    theory_batchnorm,
    theory_convergence,
    theory_fisher,
    theory_gamma,
    theory_initialization,
    theory_products,
)
from benchmarks.documents import environment
from benchmarks.theory_common import Check

CHECKS = {
    module.CHECK.name: module.CHECK for module in (theory_fisher, theory_batchnorm, theory_convergence, theory_products)
}
COMMANDS = {"gamma": theory_gamma.main, "initialization": theory_initialization.main}


def run(check: Check, output: Path, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Measure what is not kept yet; write the JSON and the figure."""
    kept_at = output / ".cache" / f"theory_{check.name}.json"
    kept_at.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {} if fresh or not kept_at.exists() else json.loads(kept_at.read_text(encoding="utf-8"))
    rows = []
    for point in tqdm(check.points, desc=check.name, unit="point", dynamic_ncols=True):
        key = json.dumps(point, sort_keys=True)
        if key not in kept:
            kept[key] = check.measure(**point)
            part = kept_at.with_suffix(".part")
            part.write_text(json.dumps(kept), encoding="utf-8")
            part.replace(kept_at)
        rows.append({**point, **kept[key]})
    document = {"settings": environment(), "rows": rows}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    (output / f"theory_{check.name}.json").write_text(text, encoding="utf-8")
    figure = check.draw(rows)
    figure.savefig(output / f"theory_{check.name}.png", dpi=110)
    plt.close(figure)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=sorted(CHECKS | COMMANDS), action="append", help="this check (repeat for several)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="(benchmarks/results)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in args.only or (*CHECKS, *COMMANDS):
        if name in COMMANDS:
            COMMANDS[name](["--output", str(args.output)])
            continue
        rows = run(CHECKS[name], args.output, fresh=args.fresh)
        print("\n".join(CHECKS[name].summary(rows)))


if __name__ == "__main__":
    main()
