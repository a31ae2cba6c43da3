"""Train everything, print the tables, write ``digits`` and ``curvature`` (.json and .png) beside this file."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

    from demo import curvature
    from demo.models import TRAIN_SAMPLES, digits
    from demo.plots import plot
    from demo.training import EPOCHS, LEARNING_RATE, MODELS, SEED, Outcome, runs, silence_lightning, train
except ModuleNotFoundError as error:
    sys.exit(
        f"The demo needs {(error.name or 'a package').split('.')[0]}, which is not installed:\n"
        '    pip install "bnp-optim[lightning,plots]" scikit-learn rich'
    )

HERE = Path(__file__).parent


def train_all(console: Console) -> tuple[list[Outcome], str]:
    """All runs and a sentence on the curvature, under one progress bar that advances by optimizer steps."""
    data = digits()
    todo = runs()
    total = sum(EPOCHS[batch_size] * TRAIN_SAMPLES // batch_size for _, _, batch_size in todo)
    total += curvature.steps_of_watch()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcomes = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        for i, (model, method, batch_size) in enumerate(todo, start=1):
            name = f"{i}/{len(todo)} {model}, batch size {batch_size}, {method}"
            progress.update(task, description=f"{name:<42}")
            outcomes.append(train(data, model, method, batch_size, on_steps=lambda n: progress.advance(task, n)))
        progress.update(task, description=f"{'curvature of the MLP under BNP-SGD':<42}")
        sentence = curvature.run(data, HERE, on_step=lambda n: progress.advance(task, n))
    return outcomes, sentence


def table(model: str, outcomes: Sequence[Outcome]) -> Table:
    """Test accuracy of ``model``: a row per method, a column per batch size, the best in bold."""
    result = Table(title=f"{model}: test accuracy", title_justify="left")
    result.add_column("method (learning rate)")
    for batch_size, epochs in EPOCHS.items():
        result.add_column(f"batch {batch_size}\n{epochs} epoch{'s' if epochs > 1 else ''}", justify="right")
    accuracy = {(o.method, o.batch_size): o.accuracy for o in outcomes if o.model == model}
    best = {b: max(a for (_, other), a in accuracy.items() if other == b) for b in EPOCHS}
    for method, rate in LEARNING_RATE.items():
        cells = []
        for batch_size in EPOCHS:
            value = accuracy.get((method, batch_size))
            text = "impossible" if value is None else f"{value:.3f}"
            cells.append(f"[bold green]{text}[/]" if value == best[batch_size] else text)
        result.add_row(f"{method} ({rate:g})", *cells)
    return result


def write_json(outcomes: Sequence[Outcome], seconds: float, path: Path) -> None:
    """The numbers, one line per run."""
    head = {
        "data": f"scikit-learn's digits / 16, stratified split, {TRAIN_SAMPLES} to train",
        "epochs_by_batch_size": EPOCHS,
        "learning_rates": LEARNING_RATE,
        "seed": SEED,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(seconds, 1),
        "runs": [],
    }
    lines = ",\n".join(f"    {json.dumps(asdict(o))}" for o in outcomes)
    path.write_text(json.dumps(head, indent=2).replace('"runs": []', f'"runs": [\n{lines}\n  ]') + "\n")


def main() -> None:
    """Run the demo."""
    torch.set_num_threads(1)  # nets of this size only lose by more
    silence_lightning()
    console = Console()
    start = time.perf_counter()
    outcomes, sentence = train_all(console)
    seconds = time.perf_counter() - start
    for model in MODELS:
        console.print(table(model, outcomes))
    tested = len(digits().test_y)
    console.print(f"One seed, {tested} test images: a gap below two points means little. {seconds:.0f} seconds.")
    console.print(sentence)
    write_json(outcomes, seconds, HERE / "digits.json")
    plot(outcomes, HERE / "digits.png")
    console.print(
        "The curves are in demo/digits.png and demo/curvature.png, the numbers in the .json files beside them."
    )


if __name__ == "__main__":
    main()
