"""StepDivergenceProbe: how far a step could go before the loss explodes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import BNPCoordinates, Coordinates, coordinates_of
from bnp_optim.diagnostics import STEP_SIZES, StepDivergence, checked_step_sizes, step_divergence
from lightning_callbacks._lightning import LightningModule, MisconfigurationException, rank_zero_info
from lightning_callbacks._probe import Probe
from lightning_callbacks._products import Estimator, parameters_of
from lightning_callbacks._schedule import Findings, IndexedBatch, Monitor, Progress

__all__ = ["StepDivergenceProbe"]


class StepDivergenceProbe(Monitor):
    """Measures the relative loss over a grid of step sizes, along the gradient and along the preconditioned step.

    The relative loss is that after a step, on the same batch, over that before it. The preconditioned step is S Sᵀg
    in the coordinates w = S z that the optimizer descends in (:func:`bnp_optim.curvature.coordinates_of`): P Pᵀg for
    SGD in a BNPreconditioner, and with Adam's diagonal for Adam and AdamW, wrapped or not, so that step sizes compare
    with learning rates. There is none for plain SGD, nor for other optimizers; wrapped ones have P Pᵀg. Momentum,
    averaged gradients and weight decay are left out.

    **Logged metrics**, under ``step/gradient/`` and ``step/preconditioned/`` (as in
    :class:`bnp_optim.diagnostics.StepDivergence`, where they are defined):

    - ``divergence``: the first step size of the grid whose relative loss exceeds ``threshold``; missing if none does
    - ``best_step_size``, ``best_relative_loss``: where on the grid the loss is smallest, and how small
    - ``relative_loss/<step size>``: at each; missing where it is not finite

    and ``step/num_samples``, what the losses were taken on.

    With several optimizers each moves its own parameters, and keys end in ``/`` and its name as LearningRateMonitor
    has it. Over several ranks all is rank zero's.

    **Logged figure**: ``relative_loss``, against the step size, to loggers with ``add_figure`` (TensorBoard).

    An estimate costs one backward pass per batch, and a forward pass per batch, step size and direction.

    Args:
        step_sizes: Positive numbers. By default half decades from 1e-4 to 1e2.
        threshold: What relative loss counts as divergence. 1e3: that of J. Bjorck et al., NeurIPS 2018.
        **schedule: As for :class:`Monitor`.

    Attributes:
        reports: The latest reports, by the optimizer's name.
    """

    def __init__(self, *, step_sizes: Iterable[float] = STEP_SIZES, threshold: float = 1e3, **schedule: Any) -> None:
        super().__init__(**schedule)
        try:
            self.step_sizes = checked_step_sizes(step_sizes)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error
        if not 1 < threshold < math.inf:
            raise MisconfigurationException(f"threshold is {threshold!r}, it must be above 1, such as 1e3")
        self.threshold = threshold
        self.reports: dict[str, StepDivergence] = {}
        self._said: set[str] = set()

    def loss(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        """The loss, which must be positive; by default as for :class:`HessianConditionMonitor`."""
        if self._probe is None:
            raise RuntimeError("loss() is called by the monitor, inside its guard")
        return self._probe.training_loss(batch, batch_idx)

    def estimate(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> Findings:
        """See :class:`Monitor`."""
        self.reports = probe.of_rank_zero(lambda: self._reports(probe, batches, progress))
        findings = Findings()
        for name, report in self.reports.items():
            suffix = f"/{name}" if len(self.reports) > 1 else ""
            findings.values |= {f"step/{key}{suffix}": x for key, x in _numbers(report).items()}
            findings.figures[f"relative_loss{suffix}"] = partial(_figure, report)
        return findings

    def _reports(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> dict[str, StepDivergence]:
        closures = Estimator(probe, batches, self.loss).closures
        found = {}
        for index, (name, optimizer) in enumerate(probe.optimizers.items()):
            probe.optimizer_index = index
            params = parameters_of(optimizer)
            found[name] = step_divergence(
                probe.pl_module,
                closures,
                params=params,
                step_sizes=self.step_sizes,
                preconditioner=self._coordinates(optimizer, params),
                threshold=self.threshold,
            )
            progress(index + 1, len(probe.optimizers))
        return found

    def _coordinates(self, optimizer: Optimizer, params: list[Tensor]) -> list[Coordinates]:
        try:
            found = coordinates_of(optimizer, params)
        except (TypeError, ValueError) as error:
            if str(error) not in self._said:
                self._said.add(str(error))
                rank_zero_info(f"{type(self).__name__}: the preconditioned step is P Pᵀg, or missing: {error}")
            found = [BNPCoordinates(params, optimizer)] if isinstance(optimizer, BNPreconditioner) else []
        # a P that acts on nothing (no layer that BNP knows) is no preconditioned step
        return [s for s in found if not isinstance(s, BNPCoordinates) or s.num_preconditioned]


def _numbers(report: StepDivergence) -> dict[str, float]:
    """What is not finite is NaN, which is not logged."""
    samples = report.num_samples
    values = {"num_samples": math.nan if samples is None else float(samples)}
    for direction, losses in report.relative_losses.items():
        best = min(range(len(losses)), key=losses.__getitem__)
        values[f"{direction}/divergence"] = report.divergence[direction]
        values[f"{direction}/best_step_size"] = report.step_sizes[best]
        values[f"{direction}/best_relative_loss"] = losses[best]
        values |= {f"{direction}/relative_loss/{a:g}": x for a, x in zip(report.step_sizes, losses, strict=True)}
    return {key: x if math.isfinite(x) else math.nan for key, x in values.items()}


def _figure(report: StepDivergence) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    report.plot(axes)
    axes.legend()
    return figure
