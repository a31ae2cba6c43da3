"""What should layers without bias, zero-padded convolutions and embeddings get? Three choices, measured.

    python -m benchmarks.layer_choices --data-dir path/to/data

1. Weights without bias: the rank-one P against a plain scaling of the columns.
2. Zero padding: statistics per channel of the unpadded input against those of the patches, which see the zeros.
3. Embeddings: passed through against scaled by token frequency.

One pass over CIFAR-10 images, or 1,500 steps on the standard library's own source code, at a constant rate. Within a
seed all methods share initial weights and order, so differences are paired. Finished runs are kept under
OUTPUT/.cache and skipped the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data import DataMissingError
from benchmarks.documents import environment
from benchmarks.layer_report import plot, write
from benchmarks.layer_variants import (
    CONTEXT,
    NETS,
    VOCABULARY,
    Text,
    contexts,
    load_text,
    measure_by_patches,
    plain_columns,
)
from benchmarks.runs import package_digest
from benchmarks.sampling import load_cifar10
from bnp_optim import BNPreconditioner

ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RATES = {
    "cnn-no-bias": {"SGD": (0.001, 0.003, 0.01, 0.03, 0.1), "AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
    "resnet8-bn": {"SGD": (0.01, 0.03, 0.1, 0.3, 1.0), "AdamW": ADAM_RATES},
    "resnet8": {"SGD": (0.001, 0.003, 0.01, 0.03, 0.1), "AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
    "cnn": {"SGD": (0.003, 0.01, 0.03, 0.1, 0.3), "AdamW": ADAM_RATES},
    "text": {"SGD": (0.03, 0.1, 0.3, 1.0, 3.0), "AdamW": ADAM_RATES},
}
_CNN_SAMPLES, _RESNET_SAMPLES = {64: 8000, 4: 3200}, {64: 6400, 4: 2560}
SAMPLES = {
    "cnn-no-bias": _CNN_SAMPLES,
    "resnet8-bn": _RESNET_SAMPLES,
    "resnet8": _RESNET_SAMPLES,
    "cnn": _CNN_SAMPLES,
    "text": {64: 64 * 1500},
}
VARIANTS = {
    "cnn-no-bias": ("base", "bnp", "columns", "patch"),
    "resnet8-bn": ("base", "bnp", "columns"),
    "resnet8": ("base", "bnp", "columns"),
    "cnn": ("base", "bnp", "patch"),
    "text": ("base", "bnp", "frequency", "faster"),
}
LATER = (("cnn-no-bias", "patch"), ("resnet8", "base"), ("resnet8", "bnp"), ("resnet8", "columns"))
LATER_SEEDS = 2
FASTER = {"SGD": 100.0, "AdamW": 10.0}  # what the embedding's rate is multiplied with, frequent and rare tokens alike
TEST_IMAGES, VALIDATION_POSITIONS = 2000, 4096
_BASES: dict[str, type[torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
_CHECK_EVERY = 20  # steps between looks for NaN
Data = tuple[Tensor, Tensor, Tensor, Tensor] | Text


@dataclass(frozen=True)
class Run:
    """All that decides the outcome of a run.

    Args:
        net: A key of NETS.
        variant: "base": without BNP; "bnp": the package as it is; or an alternative of benchmarks.layer_variants.
        samples: Of training data, seen once.
    """

    net: str
    base: str
    variant: str
    learning_rate: float
    batch_size: int
    samples: int
    seed: int
    sources: str
    torch_version: str = torch.__version__

    @property
    def file_name(self) -> str:
        short = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"layers_{self.net}_{self.base}_{self.variant}_b{self.batch_size}_s{self.seed}_{short}.json"


def plan(nets: Sequence[str], seeds: int) -> list[Run]:
    """All runs, seed by seed, so that a plan cut short is a plan of fewer seeds; the less important ones last."""
    variants = hashlib.sha256((Path(__file__).parent / "layer_variants.py").read_bytes()).hexdigest()[:16]
    package = package_digest()
    runs = []
    for later in (False, True):
        for seed in range(min(seeds, LATER_SEEDS) if later else seeds):
            chosen = [(net, v) for net in nets for v in VARIANTS[net] if ((net, v) in LATER) is later]
            for net, variant in chosen:
                sources = variants if variant == "base" else f"{variants}-{package}"
                for batch_size, samples in SAMPLES[net].items():
                    for base, rates in RATES[net].items():
                        runs += [Run(net, base, variant, r, batch_size, samples, seed, sources) for r in rates]
    return runs


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The run's optimizer, with defaults but for the learning rate."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if run.variant == "faster":
        embedding, *rest = model.parameters()
        groups = [{"params": [embedding], "lr": run.learning_rate * FASTER[run.base]}, {"params": rest}]
    base = _BASES[run.base](groups, lr=run.learning_rate)  # type: ignore[call-arg]
    if run.variant == "base":
        return base
    passed_through = [nn.Embedding] if run.net == "text" and run.variant != "frequency" else []
    return BNPreconditioner(base, model, skip=passed_through)


def train(run: Run, data: Data) -> dict[str, Any]:
    """Train once; returns the run with its score: test accuracy, or for text the validation loss in nats.

    A run that diverged scores chance: a tenth, or the loss of knowing nothing.
    """
    torch.manual_seed(run.seed)
    model = NETS[run.net]()
    if run.variant == "patch":
        measure_by_patches(model)
    optimizer = make_optimizer(run, model)
    start, loss, finite = time.process_time(), torch.zeros(()), True
    with plain_columns() if run.variant == "columns" else nullcontext():
        for step, (x, y) in enumerate(_batches(run, data), start=1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            if step % _CHECK_EVERY == 0 and not math.isfinite(loss.item()):
                finite = False
                break
    seconds = time.process_time() - start
    finite = finite and all(bool(p.isfinite().all()) for p in model.parameters())
    score = _score(model, data)
    if isinstance(data, Text):
        chance = math.log(VOCABULARY + 1)
        finite = finite and score < chance
        score = score if finite else chance
    elif not finite:
        score = 0.1
    return {**asdict(run), "score": score, "diverged": not finite, "seconds": round(seconds, 2)}


def _batches(run: Run, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(run.seed)
    if isinstance(data, Text):
        for positions in torch.randint(CONTEXT, len(data.train), (run.samples,), generator=generator).split(
            run.batch_size
        ):
            yield contexts(data.train, positions)
        return
    x, y = data[:2]
    order = torch.randperm(len(x), generator=generator)[: run.samples]
    for index in order.split(run.batch_size):
        yield x[index].contiguous(memory_format=torch.channels_last), y[index]  # faster on CPUs, by a third


@torch.no_grad()
def _score(model: nn.Module, data: Data) -> float:
    model.eval()
    if isinstance(data, Text):
        positions = torch.linspace(CONTEXT, len(data.validation) - 1, VALIDATION_POSITIONS).long()
        x, y = contexts(data.validation, positions)
        return F.cross_entropy(model(x), y).item()
    x, y = data[2][:TEST_IMAGES], data[3][:TEST_IMAGES]
    found = [model(part.contiguous(memory_format=torch.channels_last)).argmax(1) for part in x.split(500)]
    return (torch.cat(found) == y).double().mean().item()


def run_all(runs: Sequence[Run], data_dir: Path, cache: Path, until: float) -> list[dict[str, Any]]:
    """The results of ``runs``: kept ones, and new ones as long as the clock (``time.monotonic``) is below ``until``."""
    cache.mkdir(parents=True, exist_ok=True)
    text = load_text() if any(r.net == "text" for r in runs) else None
    images = load_cifar10(data_dir, _CNN_SAMPLES[64]) if any(r.net != "text" for r in runs) else None
    results = []
    for run in tqdm(runs, desc="runs", mininterval=2):
        path = cache / run.file_name
        if not path.is_file():
            if time.monotonic() > until:
                continue
            data = text if run.net == "text" else images
            assert data is not None
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(train(run, data)))
            partial.replace(path)  # whole, or not at all
        results.append(json.loads(path.read_text()))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.layer_choices", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds cifar10/cifar10.npz (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="which (all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after so many (no limit)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    runs = plan(args.nets, args.seeds)
    try:
        results = run_all(runs, args.data_dir, args.output / ".cache", time.monotonic() + 60 * args.minutes)
    except DataMissingError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the last finished run.")
    configuration = {
        "samples_by_batch_size": SAMPLES,
        "learning_rates": RATES,
        "test_images": TEST_IMAGES,
        "validation_positions": VALIDATION_POSITIONS,
        "runs_planned": len(runs),
    }
    document = {
        "benchmark": "layer_choices",
        "configuration": configuration,
        "environment": environment(),
        "cpu_seconds": round(sum(r["seconds"] for r in results), 1),
        "runs": results,
    }
    print(write(document, args.output))
    plot(document["runs"], args.output / "layer_choices.png")


if __name__ == "__main__":
    main()
