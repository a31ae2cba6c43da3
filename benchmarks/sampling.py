"""What measuring less costs in accuracy, and saves in time: ``stat_interval`` and ``max_observations``.

    python -m benchmarks.sampling --data-dir path/to/data

The five-layer CNN of the overhead benchmark on CIFAR-10, BNP-SGD at one rate, batch size 32. All settings see the same
batches and step in turn, so that their times are comparable; accuracy is the mean over seeds, ± its standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data import DataMissingError
from benchmarks.workloads import cnn
from bnp_optim import BNPreconditioner

SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain SGD": None,
    "exact": {},
    "stat_interval=4": {"stat_interval": 4},
    "stat_interval=16": {"stat_interval": 16},
    "max_observations=8192": {"max_observations": 8192},
    "max_observations=2048": {"max_observations": 2048},
    "max_observations=512": {"max_observations": 512},
}
LEARNING_RATE = 0.03
BATCH_SIZE = 32


def load_cifar10(data_dir: Path, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardized images (samples, 3, 32, 32) and labels: the first ``samples`` for training, all for testing.

    Raises:
        DataMissingError: if the file is missing.
    """
    path = data_dir / "cifar10" / "cifar10.npz"
    if not path.is_file():
        raise DataMissingError(
            f"{path} is missing: point --data-dir at the folder that holds cifar10/cifar10.npz, with x_train, y_train, "
            "x_test and y_test (uint8 images as samples × 32 × 32 × 3, and their labels)"
        )
    raw = np.load(path)
    x, y, x_test, y_test = raw["x_train"][:samples], raw["y_train"][:samples], raw["x_test"], raw["y_test"]
    mean, std = (f(x / 255.0, axis=(0, 1, 2)) for f in (np.mean, np.std))

    def images(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(((pixels / 255.0 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2).contiguous()

    return images(x), torch.from_numpy(y).long(), images(x_test), torch.from_numpy(y_test).long()


def run(data: Sequence[Tensor], seeds: Sequence[int], learning_rate: float) -> list[dict[str, Any]]:
    """One entry per setting: accuracies by seed, and milliseconds of every step."""
    x, y, x_test, y_test = data
    rows = [{"setting": name, "accuracy": [], "step_ms": []} for name in SETTINGS]
    bar = tqdm(total=len(seeds) * (len(x) // BATCH_SIZE), desc="steps", mininterval=2)
    for seed in seeds:
        trainings: list[tuple[nn.Module, Any]] = []
        for options in SETTINGS.values():
            torch.manual_seed(seed)
            model = cnn("none")
            base = torch.optim.SGD(model.parameters(), lr=learning_rate)
            trainings.append((model, base if options is None else BNPreconditioner(base, model, **options)))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        for batch in order.split(BATCH_SIZE)[: len(x) // BATCH_SIZE]:
            for row, (model, optimizer) in zip(rows, trainings, strict=True):
                start = time.perf_counter()
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                row["step_ms"].append(1e3 * (time.perf_counter() - start))
            bar.update()
        for row, (model, _) in zip(rows, trainings, strict=True):
            model.eval()
            with torch.no_grad():
                hits = sum(
                    int((model(a).argmax(1) == b).sum())
                    for a, b in zip(x_test.split(500), y_test.split(500), strict=True)
                )
            row["accuracy"].append(hits / len(x_test))
    bar.close()
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean accuracy with its standard error, the paired difference to "exact", and mean step times.

    NOTE: the mean, not the median, of the times, with the slowest tenth left out: with ``stat_interval`` most steps
    are cheap and some are not.
    """
    exact = next(row for row in rows if row["setting"] == "exact")
    plain = next(row for row in rows if row["setting"] == "plain SGD")

    def time_of(row: dict[str, Any]) -> float:
        return statistics.fmean(sorted(row["step_ms"])[: max(1, len(row["step_ms"]) * 9 // 10)])

    found = []
    for row in rows:
        differences = [a - b for a, b in zip(row["accuracy"], exact["accuracy"], strict=True)]
        found.append(
            {
                "setting": row["setting"],
                "accuracy": statistics.fmean(row["accuracy"]),
                "standard_error": _standard_error(row["accuracy"]),
                "difference": statistics.fmean(differences),
                "difference_standard_error": _standard_error(differences),
                "step_ms": time_of(row),
                "ratio": time_of(row) / time_of(plain),
            }
        )
    return found


def table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| setting | test accuracy | difference to exact | ms per step | × plain SGD |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in summary:
        lines.append(
            f"| {row['setting']} | {row['accuracy']:.3f} ± {row['standard_error']:.3f} "
            f"| {row['difference']:+.3f} ± {row['difference_standard_error']:.3f} "
            f"| {row['step_ms']:.1f} | {row['ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds cifar10/cifar10.npz (%(default)s)")
    parser.add_argument("--samples", type=int, default=8000, help="training images, seen once (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="(benchmarks/results)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        data = load_cifar10(args.data_dir, args.samples)
    except DataMissingError as error:
        raise SystemExit(f"error: {error}") from None
    summary = summarize(run(data, range(args.seeds), args.learning_rate))
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "learning_rate": args.learning_rate,
        "batch_size": BATCH_SIZE,
        "samples": args.samples,
        "seeds": args.seeds,
    }
    settings |= {"torch": torch.__version__, "threads": 1, "date": time.strftime("%Y-%m-%d")}
    stem = "sampling" if args.learning_rate == LEARNING_RATE else f"sampling_{args.learning_rate:g}"
    (args.output / f"{stem}.json").write_text(json.dumps({"settings": settings, "rows": summary}, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in settings.items())
    (args.output / f"{stem}.md").write_text(f"{__doc__.splitlines()[0]}\n\n{table(summary)}\n({facts})\n")
    print(table(summary))


if __name__ == "__main__":
    main()
