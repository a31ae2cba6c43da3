"""A stream from river with an abrupt shift, one sample at a time: predict, then learn; about half a minute on a CPU.

    python examples/river_stream.py       # a live progress line, then river_stream.png

ImageSegments (2,310 samples, 18 features, seven classes) passes twice in two random orders. Before the second pass
every sensor is replaced: each feature gets another scale and another zero. The networks see what river's StandardScaler
makes of that. Each optimizer has the best of a few rates (0.01 to 0.3 for SGD, 0.001 to 0.01 for Adam) behind another
draw of sensors, and there is one seed: an illustration, no benchmark. Needs river, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from river import datasets, metrics, preprocessing, stream
from torch import Tensor, nn
from tqdm import tqdm

from bnp_optim import BNPreconditioner

WINDOW = 200  # samples that the live accuracy looks back on
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD, rate 0.03": lambda model: torch.optim.SGD(model.parameters(), lr=0.03),
    "Adam, rate 0.01": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "BNP-SGD, rate 0.3": lambda model: BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.3), model),
}


def shifted_segments() -> Iterator[tuple[dict[str, float], str]]:
    """Two passes, the second one through other sensors."""
    known = [features for features, _ in datasets.ImageSegments()]
    random = np.random.default_rng(0)
    spread = {name: float(np.std([f[name] for f in known])) for name in known[0]}
    sensors = {name: (np.exp(random.uniform(-1.1, 1.1)), 2 * spread[name] * random.normal()) for name in spread}
    first, second = (stream.shuffle(datasets.ImageSegments(), buffer_size=500, seed=seed) for seed in (1, 2))
    yield from first
    for features, label in second:
        yield {name: a * features[name] + b for name, (a, b) in sensors.items()}, label


class Learner:
    """A network that learns from one sample after the other, and what it has got right so far."""

    def __init__(self, build: Callable[[nn.Module], torch.optim.Optimizer], features: int, classes: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, classes))
        self.optimizer = build(self.model)
        self.accuracy = metrics.Accuracy()
        self.hits: deque[bool] = deque(maxlen=WINDOW)
        self.history: list[float] = []

    def predict_then_learn(self, x: Tensor, y: Tensor) -> None:
        output = self.model(x)
        guess = int(output.argmax())
        self.accuracy.update(int(y), guess)
        self.hits.append(guess == int(y))
        self.history.append(sum(self.hits) / len(self.hits))
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(output, y).backward()
        self.optimizer.step()


def run(steps: int | None) -> dict[str, Learner]:
    """All learners side by side on the first ``steps`` samples, or on all."""
    scaler = preprocessing.StandardScaler()
    learners = {name: Learner(build, features=18, classes=7) for name, build in OPTIMIZERS.items()}
    numbers: dict[str, int] = {}
    samples = 2 * datasets.ImageSegments().n_samples
    bar = tqdm(islice(shifted_segments(), steps), total=min(steps or samples, samples), unit="sample")
    for i, (features, label) in enumerate(bar):
        scaler.learn_one(features)
        scaled = scaler.transform_one(features)
        x = torch.tensor([[scaled[name] for name in sorted(scaled)]], dtype=torch.float32)
        y = torch.tensor([numbers.setdefault(label, len(numbers))])
        for learner in learners.values():
            learner.predict_then_learn(x, y)
        if i % 20 == 0:
            bar.set_postfix({name.split(",")[0]: f"{x.history[-1]:.2f}" for name, x in learners.items()})
    return learners


def figure(learners: dict[str, Learner]) -> Figure:
    fig = Figure(figsize=(8, 4), layout="constrained")
    axes = fig.subplots()
    for name, learner in learners.items():
        axes.plot(range(WINDOW, len(learner.history)), learner.history[WINDOW:], label=name)
    shift = datasets.ImageSegments().n_samples
    if any(len(x.history) > shift for x in learners.values()):
        axes.axvline(shift, color="0.5", linestyle=":")
        axes.text(shift, 0.03, " other sensors", transform=axes.get_xaxis_transform())
    axes.set(xlabel="samples", ylabel=f"accuracy on the last {WINDOW}", title="ImageSegments, one sample at a time")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="stop after so many samples")
    parser.add_argument("--figure", type=Path, default=Path("river_stream.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small run no faster on more
    learners = run(options.steps)
    figure(learners).savefig(options.figure, dpi=120)
    print("\nprogressive accuracy")
    for name, learner in learners.items():
        print(f"  {name:20s} {learner.accuracy.get():.3f}")


if __name__ == "__main__":
    main()
