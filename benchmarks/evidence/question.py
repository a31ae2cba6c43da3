"""What an ablation is: a question, the contenders that answer it, and where they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.evidence import streams
from benchmarks.evidence.contenders import Contender
from benchmarks.evidence.engine import Run
from benchmarks.evidence.plan import TUNING_SEED
from benchmarks.evidence.progressive import StreamRun
from benchmarks.evidence.streams import Inputs
from benchmarks.evidence.tasks import TASKS


@dataclass(frozen=True)
class Question:
    """Every contender at every rate of its grid, at a constant rate.

    Args:
        contenders: By what tables call them; a plain base among them is what "lift" refers to.
        samples: By task and batch size, trimmed; ``--preset full`` takes the task's own at the same batch sizes.
        against: For variants, the contender that they vary: see benchmarks/evidence/confirm.py.
    """

    name: str
    title: str
    contenders: Mapping[str, Contender]
    samples: Mapping[str, Mapping[int, int]]
    against: Mapping[str, str] = field(default_factory=dict)

    def samples_of(self, task: str, batch_size: int, preset: str) -> int:
        return self.samples[task][batch_size] if preset == "short" else TASKS[task].samples[batch_size]

    def runs(self, preset: str, seeds: tuple[int, ...] = (TUNING_SEED,)) -> list[Run]:
        """All runs, task by task, seed by seed."""
        return [
            Run(task, c, rate, b, self.samples_of(task, b, preset), seed)
            for task, samples in self.samples.items()
            for seed in seeds
            for b in samples
            for c in self.contenders.values()
            for rate in c.rates
        ]


@dataclass(frozen=True)
class StreamQuestion:
    """Every contender at every rate of its grid, on streams.

    Args:
        contenders: By what tables call them, with the sample at which :func:`bnp_optim.fold_normalization` is called,
            or 0.
        places: (stream, inputs).
    """

    name: str
    title: str
    contenders: Mapping[str, tuple[Contender, int]]
    places: tuple[tuple[str, Inputs], ...]

    def runs(self, preset: str, seeds: tuple[int, ...] = (TUNING_SEED,)) -> list[StreamRun]:
        """All runs, seed by seed, place by place, over whole streams whatever the preset."""
        return [
            StreamRun(stream, inputs, contender, rate, seed, streams.samples_of(stream), fold)
            for seed in seeds
            for stream, inputs in self.places
            for contender, fold in self.contenders.values()
            for rate in contender.rates
        ]
