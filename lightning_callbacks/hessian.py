"""HessianConditionMonitor: the Hessian of the training loss, and PᵀHP beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import BNPCoordinates, ConditioningReport
from lightning_callbacks._lightning import LightningModule, rank_zero_info
from lightning_callbacks._probe import Probe
from lightning_callbacks._products import Estimator, parameters_of
from lightning_callbacks._schedule import Findings, IndexedBatch, Monitor, Progress, checked_count

__all__ = ["HessianConditionMonitor"]

METRICS = (
    "lambda_max",
    "lambda_min",
    "ritz_residual",
    "kappa_mean",
    "kappa_mean_error",
    "kappa_q90",
    "kappa_q75",
    "kappa_lower_bound",
    "negative_ratio",
    "max_learning_rate",
    "num_samples",
    "seconds",
)


class HessianConditionMonitor(Monitor):
    """Estimates the conditioning of the loss's Hessian H, and of PᵀHP where the optimizer is a BNPreconditioner.

    **Logged metrics**, each under ``hessian/`` and, for PᵀHP, under ``preconditioned_hessian/`` (as fields of
    :class:`bnp_optim.curvature.ConditioningReport`, where they are defined):

    - ``kappa_mean``, ``kappa_mean_error``: λ_max over the mean |λ|, the headline, and its standard error
    - ``kappa_q90``, ``kappa_q75``: over quantiles of |λ|
    - ``kappa_lower_bound``: over the smallest converged |λ|: the condition number is at least that
    - ``lambda_max``, ``lambda_min``, ``ritz_residual``: the extreme eigenvalues
    - ``negative_ratio``: |λ_min|/λ_max where λ_min is negative
    - ``max_learning_rate``: 2/λ_max
    - ``num_samples``, ``seconds``: a minibatch's λ_max is biased upward, so look at the first

    With several optimizers each has its own parameters, and keys end in ``/`` and its name as LearningRateMonitor has
    it ("SGD", "SGD-1"). Where a second derivative is missing, finite differences stand in, and a message says so once.

    **Logged figure**: ``spectrum``, the eigenvalue densities, to loggers with ``add_figure`` (TensorBoard).

    An estimate costs ``num_probes × num_steps`` Hessian-vector products, each some three gradients of the batches, and
    twice that with PᵀHP. See :class:`Monitor` for schedules and what is left untouched.

    Args:
        num_steps: Lanczos steps per probe. 30: λ_max has converged at 20; more sharpen the quantiles.
        num_probes: Random vectors. 3: the least that gives ``kappa_mean`` an error worth its name. 0: no averages and
            no figure, only extreme eigenvalues.
        seed: Of the vectors.
        **schedule: As for :class:`Monitor`.

    Attributes:
        reports: The latest reports, by the key without the metric: ``"hessian"``, ``"preconditioned_hessian"``.
    """

    def __init__(self, *, num_steps: int = 30, num_probes: int = 3, seed: int = 0, **schedule: Any) -> None:
        super().__init__(**schedule)
        checked_count("num_steps", num_steps)
        checked_count("num_probes", num_probes, least=0)
        self.num_steps = num_steps
        self.num_probes = num_probes
        self.seed = seed
        self.reports: dict[str, ConditioningReport] = {}
        self._said: set[str] = set()

    def loss(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        """The loss whose Hessian it is; override it for another one.

        By default what ``training_step`` returns; under manual optimization, what it sends backward for the optimizer
        that is being looked at. Called inside the guard, on a copy of the batch.

        Returns:
            The mean loss over the batch, a scalar with gradient history.
        """
        if self._probe is None:
            raise RuntimeError("loss() is called by the monitor, inside its guard")
        return self._probe.training_loss(batch, batch_idx)

    def estimate(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> Findings:
        """See :class:`Monitor`."""
        findings = Findings()
        several = len(probe.optimizers) > 1
        jobs = [(i, p) for i, x in enumerate(probe.optimizers.values()) for p in _sides(x)]
        self.reports = {}
        for number, (index, preconditioned) in enumerate(jobs):
            probe.optimizer_index = index
            name, optimizer = list(probe.optimizers.items())[index]
            params = parameters_of(optimizer)
            report = Estimator(probe, batches, self.loss).conditioning(
                params,
                [BNPCoordinates(params, optimizer)]
                if isinstance(optimizer, BNPreconditioner) and preconditioned
                else [],
                matrix="hessian",
                num_steps=self.num_steps,
                num_probes=self.num_probes,
                seed=self.seed,
                progress=_part(progress, number, len(jobs)),
            )
            self._say(report)
            key = "preconditioned_hessian" if preconditioned else "hessian"
            suffix = f"/{name}" if several else ""
            self.reports[f"{key}{suffix}"] = report
            numbers = report.to_dict()
            findings.values |= {f"{key}/{metric}{suffix}": numbers[metric] for metric in METRICS}
            if report.density is not None:
                group = [r for k, r in self.reports.items() if k.endswith(f"hessian{suffix}")]
                findings.figures[f"spectrum{suffix}"] = partial(_figure, group)
        return findings

    def _say(self, report: ConditioningReport) -> None:
        """What was done instead of double backward."""
        if report.method.startswith("finite") and report.method not in self._said:
            self._said.add(report.method)
            rank_zero_info(f"{type(self).__name__}: {report.method}")


def _sides(optimizer: Optimizer) -> tuple[bool, ...]:
    """H, and with BNP also PᵀHP."""
    return (False, True) if isinstance(optimizer, BNPreconditioner) else (False,)


def _part(progress: Progress, number: int, parts: int) -> Progress:
    return lambda done, total: progress(number * total + done, parts * total)


def _figure(reports: Sequence[ConditioningReport]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for report in reports:
        report.plot(axes)
    axes.legend()
    return figure
