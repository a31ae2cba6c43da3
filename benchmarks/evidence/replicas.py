"""Many small nets on one stream at once: all learning rates and seeds of a contender, stacked.

One step of a 32-32 net costs a fraction of a millisecond of arithmetic and several times that of overhead, so the
nets of a stream are trained side by side as (replicas, outputs, inputs) tensors, forward, backward and BNP written out
for batch size 1. tests/test_evidence_replicas.py holds it against BNPreconditioner, sample by sample; what is
not written out here (:func:`supports`) is trained net by net.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.evidence.contenders import Contender
from benchmarks.evidence.progressive import WIDTHS, StreamRun, score
from benchmarks.evidence.replica_statistics import OPTIONS, VARIANTS, Statistics
from benchmarks.evidence.runner import Cache, run_all, single_threaded
from benchmarks.evidence.streams import Stream, load
from benchmarks.workloads import mlp
from bnp_optim import fold_normalization
from bnp_optim.units import UNITS

WRITTEN_OUT = {("sgd", "none"), ("momentum", "none"), ("adamw", "none"), ("sgd", "on"), ("adamw", "on")}


def supports(contender: Contender) -> bool:
    """Whether it is written out: SGD, momentum and AdamW, Online Normalization, and BNP with some of its options."""
    options = dict(contender.bnp or ())
    form = options.pop("mode", None)  # a Contender has it only where it is not the base's implied one
    return (
        (contender.base, contender.norm) in WRITTEN_OUT
        and form == ("two_sided" if contender.base == "momentum" and contender.bnp is not None else None)
        and set(options) <= OPTIONS
        and options.get("step_scale", "trace") in ("trace", None)
        and contender.variant in VARIANTS
    )


class Adam:
    """Moments of one parameter of all replicas, and the update that AdamW makes of them, without its decay."""

    def __init__(self, like: Tensor, rates: Tensor) -> None:
        self.mean, self.square, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0
        self.rates = rates.view(-1, *(1,) * (like.dim() - 1))

    def update(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = self.square.sqrt().div_((1 - 0.999**self.steps) ** 0.5).add_(1e-8)
        return (self.mean / root).mul_(self.rates * (-1 / (1 - 0.9**self.steps)))


class Momentum:
    """The buffer of one parameter of all replicas, and the update that SGD with momentum .9 makes of it."""

    def __init__(self, like: Tensor, rates: Tensor) -> None:
        self.buffer = torch.zeros_like(like)
        self.rates = rates.view(-1, *(1,) * (like.dim() - 1))

    def update(self, gradient: Tensor) -> Tensor:
        return self.buffer.mul_(0.9).add_(gradient) * -self.rates


REMEMBER: dict[str, type[Adam] | type[Momentum]] = {"adamw": Adam, "momentum": Momentum}
DECAY = {"adamw": 0.01, "momentum": 0.0}  # their defaults in torch


class Online:
    """Online Normalization of one layer of all replicas, for one sample: see benchmarks/evidence/online_norm.py."""

    A, B, EPS = 0.999, 0.99, 1e-5

    def __init__(self, replicas: int, channels: int, rates: Tensor, adaptive: bool, like: Tensor) -> None:
        def full(value: float) -> Tensor:
            return torch.full((replicas, channels), value, dtype=like.dtype)

        self.mean, self.variance, self.error_y, self.error_1 = full(0), full(1), full(0), full(0)
        self.affine = [full(1), full(0)]
        self.rates = rates[:, None]
        self.adam = [Adam(p, rates) for p in self.affine] if adaptive else []

    def forward(self, u: Tensor) -> Tensor:
        self.inv_std = (self.variance + self.EPS).rsqrt()
        delta = u - self.mean
        self.variance = (self.A * self.variance).addcmul_(delta, delta, value=self.A * (1 - self.A))
        self.mean = torch.add(self.mean, delta, alpha=1 - self.A)
        self.y = delta * self.inv_std
        z = self.y * self.affine[0] + self.affine[1]
        self.inv_root = (z.square().mean(1, keepdim=True) + self.EPS).rsqrt()
        self.out = z * self.inv_root
        return self.out

    def backward(self, g: Tensor) -> Tensor:
        g = (g - (g * self.out).mean(1, keepdim=True) * self.out) * self.inv_root
        gradients = [g * self.y, g]
        g = g * self.affine[0]
        g = torch.addcmul(g, self.error_y, self.y, value=self.B - 1)
        self.error_y = torch.addcmul(self.error_y, g, self.y)
        g = torch.addcmul((self.B - 1) * self.error_1, g, self.inv_std)
        self.error_1 = self.error_1 + g
        for i, gradient in enumerate(gradients):
            if self.adam:
                self.affine[i] = self.affine[i] * (1 - 0.01 * self.rates) + self.adam[i].update(gradient)
            else:
                self.affine[i] = self.affine[i] - self.rates * gradient
        return g


class Stack:
    """The nets: weights (replicas, outputs, inputs) and biases (replicas, outputs) of each layer."""

    def __init__(self, contender: Contender, models: Sequence[nn.Module], rates: Sequence[float]) -> None:
        linear = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in models]
        self.weights = [torch.stack([m.weight.detach() for m in same]) for same in zip(*linear, strict=True)]
        self.biases = [
            None if same[0].bias is None else torch.stack([m.bias.detach() for m in same])
            for same in zip(*linear, strict=True)
        ]
        first = self.weights[0]
        self.rates = torch.tensor(rates, dtype=first.dtype)
        options = dict(contender.bnp or ())
        self.max_norm, self.follows = options.get("max_norm"), options.get("follow_inputs", False)
        base = REMEMBER.get(contender.base)
        self.decay = DECAY.get(contender.base, 0.0)
        self.bases = [base(w, self.rates) for w in self.weights] if base else []
        self.bias_bases = [None if b is None else base(b, self.rates) for b in self.biases] if base else []
        units = [
            torch.stack([m._buffers[UNITS] for m in same]) if UNITS in same[0]._buffers else None  # type: ignore[misc]
            for same in zip(*linear, strict=True)
        ]
        self.statistics = [
            Statistics(contender, torch.zeros(len(models), w.shape[2], dtype=w.dtype), w is first, u)
            for w, u in zip(self.weights, units, strict=True)
            if contender.bnp is not None
        ]
        self.norms = [
            Online(len(models), w.shape[1], self.rates, contender.base == "adamw", first)
            for w in (self.weights[:-1] if contender.norm == "on" else ())
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (replicas, outputs) for one sample (inputs,)."""
        a = x.expand(len(self.rates), -1)
        self.inputs: list[Tensor] = []
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            self.inputs.append(a)
            a = torch.bmm(w, a.unsqueeze(2)).squeeze(2)
            if b is not None:
                a = a + b
            if i < len(self.weights) - 1:
                a = (self.norms[i].forward(a) if self.norms else a).relu()
        return a

    def learn(self, delta: Tensor) -> None:
        """One step, given the loss's gradient with respect to the outputs."""
        deltas = [delta]
        for i in range(len(self.weights) - 1, 0, -1):
            below = torch.bmm(deltas[0].unsqueeze(1), self.weights[i]).squeeze(1) * (self.inputs[i] > 0)
            deltas.insert(0, self.norms[i - 1].backward(below) if self.norms else below)
        if not self.statistics:
            for i, delta in enumerate(deltas):
                self._step_plainly(i, delta)
            return
        self._precondition(deltas)
        bias = self.biases[0]
        if self.follows and bias is not None:
            self.statistics[0].follow(self.inputs[0], self.weights[0], bias)

    def _precondition(self, deltas: list[Tensor]) -> None:
        found = [of.update(a) for of, a in zip(self.statistics, self.inputs, strict=True)]
        if not self.bases:
            for i, delta in enumerate(deltas):
                self._step_by_gradient(i, delta, *found[i])
            return
        rows = [self._row(i, *found[i]) for i in range(len(found))]
        if self.max_norm is not None:
            squares = [
                d.square().sum(1) * (row.square().sum(1) + one[:, 0] ** 2)
                for d, (row, _, one) in zip(deltas, rows, strict=True)
            ]
            shrink = (self.max_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp_max(1)
            deltas = [delta * shrink[:, None] for delta in deltas]
        for i, delta in enumerate(deltas):
            self._step_in_z(i, delta, *rows[i])

    def _step_plainly(self, i: int, delta: Tensor) -> None:
        w, b, a, rates = self.weights[i], self.biases[i], self.inputs[i], self.rates[:, None]
        if self.bases:
            self._add(i, self.bases[i].update(_outer(delta, a)), self._bias_update(i, delta))
            return
        w.baddbmm_((-rates * delta).unsqueeze(2), a.unsqueeze(1))
        if b is not None:
            b.addcmul_(rates, delta, value=-1)

    def _step_by_gradient(self, i: int, delta: Tensor, centred: Tensor, inverse: Tensor, q2: Tensor) -> None:
        """SGD, whose step P maps as it is."""
        b, rates = self.biases[i], self.rates[:, None]
        assert b is not None
        row = centred * inverse / q2
        self.weights[i].baddbmm_((-rates * delta).unsqueeze(2), row.unsqueeze(1))
        b.sub_(rates * delta * (1 / q2 - (row * self.statistics[i].mean).sum(1, keepdim=True)))

    def _row(self, i: int, centred: Tensor, inverse: Tensor, q2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input in z, what scales Δz back to w, and 1/q, which is both for the bias."""
        scale = inverse.sqrt() / q2.sqrt() * (not self.statistics[i].single)
        return centred * scale, scale, q2.rsqrt()

    def _step_in_z(self, i: int, delta: Tensor, row: Tensor, scale: Tensor, inv_q: Tensor) -> None:
        dz = self.bases[i].update(_outer(delta, row)) * scale.unsqueeze(1)
        dz_bias = self._bias_update(i, delta * inv_q)
        assert dz_bias is not None
        mean = self.statistics[i].mean
        self._add(i, dz, dz_bias * inv_q - torch.bmm(dz, mean.unsqueeze(2)).squeeze(2))

    def _bias_update(self, i: int, gradient: Tensor) -> Tensor | None:
        base = self.bias_bases[i]
        return None if base is None else base.update(gradient)

    def _add(self, i: int, update: Tensor, bias_update: Tensor | None) -> None:
        """Decoupled decay, as of AdamW, and the update."""
        keep = 1 - self.decay * self.rates
        self.weights[i].mul_(keep[:, None, None]).add_(update)
        b = self.biases[i]
        if b is not None and bias_update is not None:
            b.mul_(keep[:, None]).add_(bias_update)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(2) * columns.unsqueeze(1)


def errors_of(
    contender: Contender, stream: Stream, rates: Sequence[float], seeds: Sequence[int], fold: int = 0, *,
    dtype: torch.dtype = torch.float32, widths: Sequence[int] = WIDTHS,
) -> np.ndarray:  # fmt: skip
    """Errors (replicas, samples) of nets with ``rates[i]`` and ``seeds[i]``; NaN from a loss on that is not finite."""
    x = torch.from_numpy(stream.x).to(dtype)
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(mlp((x.shape[1], *widths, stream.classes or 1), contender.norm).to(dtype))
    stack = Stack(contender, models, rates)
    errors = np.empty((len(rates), len(x)))
    dead = torch.zeros(len(rates), dtype=torch.bool)
    for i in range(len(x)):
        if fold and i == fold:
            for model in models:
                fold_normalization(model, x[:i])
            stack = Stack(contender, models, rates)
            for j in range(i):
                stack.learn(_slope(stream, j, stack.forward(x[j])))
        output = stack.forward(x[i])
        if stream.classes:
            error = (output.argmax(1) != int(stream.y[i])).double()
            dead |= ~(output.logsumexp(1) - output[:, int(stream.y[i])]).isfinite()
        else:
            error = stream.gap(i, output[:, 0].double()).abs()
            dead |= ~output[:, 0].square().isfinite()
        errors[:, i] = torch.where(dead, torch.nan, error).numpy()
        if i >= fold:
            stack.learn(_slope(stream, i, output))
    return errors


def _slope(stream: Stream, i: int, output: Tensor) -> Tensor:
    """The loss's gradient with respect to the outputs (replicas, outputs)."""
    if stream.classes:
        delta = output.softmax(1)
        delta[:, int(stream.y[i])] -= 1
        return delta
    return 2 * (output - stream.target(i))


def run_streams(
    runs: Sequence[StreamRun], cache: Cache, *, workers: int = 1, until: float = float("inf"), label: str = "streams"
) -> dict[StreamRun, dict[str, Any]]:
    """As :func:`benchmarks.evidence.runner.run_all`, the runs of a contender on a stream at once where they can be."""
    results = cache.found(runs)
    todo = [run for run in dict.fromkeys(runs) if run not in results and supports(run.contender)]
    groups = [list(g) for _, g in groupby(sorted(todo, key=_group), key=_group)]
    groups.sort(key=lambda group: runs.index(group[0]))
    single_threaded()
    if groups and time.monotonic() < until:
        for group in tqdm(groups, desc=label, unit="stack", mininterval=5, dynamic_ncols=True):
            if time.monotonic() > until:
                break
            run, start = group[0], time.process_time()
            stream = load(run.stream, run.inputs, run.samples)
            errors = errors_of(
                run.contender, stream, [r.learning_rate for r in group], [r.seed for r in group], run.fold
            )
            seconds = (time.process_time() - start) / len(group)
            for member, found in zip(group, errors, strict=True):
                results[member] = score(found, stream, seconds)
                cache.save(member, results[member])
    others = [run for run in runs if not supports(run.contender)]
    return results | run_all(others, cache, Path(), workers=workers, until=until, label=label)


def _group(run: StreamRun) -> tuple[str, str, int, str, int]:
    return run.stream, run.inputs, run.samples, repr(run.contender), run.fold
