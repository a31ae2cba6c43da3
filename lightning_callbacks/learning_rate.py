"""MaxLearningRateMonitor: how far the learning rate is from the largest stable one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import BNPCoordinates, Coordinates, coordinates_of, max_learning_rate
from lightning_callbacks._lightning import LightningModule, rank_zero_info
from lightning_callbacks._probe import Probe
from lightning_callbacks._products import Estimator, parameters_of
from lightning_callbacks._schedule import Findings, IndexedBatch, Monitor, Progress, checked_count

__all__ = ["MaxLearningRateMonitor"]


class MaxLearningRateMonitor(Monitor):
    """Estimates λ_max of the Gauss-Newton (Fisher) matrix and, from it, the largest stable learning rate.

    The matrix is taken in the coordinates that the optimizer descends in: PᵀGP under a BNPreconditioner, and Adam's
    diagonal on top for Adam and AdamW. The rate is 2/λ_max for gradient descent, with the factors of heavy ball,
    Nesterov's momentum and Adam (:func:`bnp_optim.curvature.max_learning_rate`). It is an upper estimate.

    **Logged metrics**:

    - ``learning_rate/lambda_max_gauss_newton``: λ_max in these coordinates; ``learning_rate/lambda_max_hessian``
      instead, of the Hessian, where :meth:`outputs_and_loss` is not overridden
    - ``learning_rate/max``: the largest stable rate; missing for optimizers without a known rule, for which a message
      says so once
    - ``learning_rate/current``: the rate now; of several parameter groups each ends in ``/pg1``, ``/pg2`` or the
      group's name
    - ``learning_rate/ratio``: the largest current rate over ``learning_rate/max``; above 1 is unstable
    - ``learning_rate/num_samples``: λ_max of a minibatch is biased upward

    With several optimizers the keys end in ``/`` and the name as LearningRateMonitor has it.

    The Gauss-Newton matrix needs to know where outputs end and the loss begins::

        class Monitor(MaxLearningRateMonitor):
            def outputs_and_loss(self, pl_module, batch):
                x, y = batch
                return pl_module(x), lambda outputs: F.cross_entropy(outputs, y)

    An estimate makes at most ``num_steps`` products of some three gradients each; it stops when λ_max has converged.

    Args:
        num_steps: Products at most. 20: enough for λ_max to 1e-4.
        seed: Of the start vector.
        warn_after: Warn once when so many estimates in a row found the rate above the largest stable one. None: never.
        **schedule: As for :class:`Monitor`.
    """

    def __init__(self, *, num_steps: int = 20, seed: int = 0, warn_after: int | None = None, **schedule: Any) -> None:
        super().__init__(**schedule)
        checked_count("num_steps", num_steps)
        if warn_after is not None:
            checked_count("warn_after", warn_after)
        self.num_steps = num_steps
        self.seed = seed
        self.warn_after = warn_after
        self._above: dict[str, int] = {}  # estimates in a row above the stable rate, by optimizer
        self._said: set[str] = set()

    def outputs_and_loss(self, pl_module: LightningModule, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The module's outputs on the batch, and the mean loss as a function of them; override it.

        Without it the Hessian of the training loss stands in for the Gauss-Newton matrix.
        """
        raise NotImplementedError

    def estimate(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> Findings:
        """See :class:`Monitor`."""
        splits = type(self).outputs_and_loss is not MaxLearningRateMonitor.outputs_and_loss
        if not splits:
            self._say("outputs_and_loss is not overridden, so λ_max is the Hessian's, not the Gauss-Newton matrix's")
        estimator = Estimator(
            probe,
            batches,
            (lambda module, batch, _: self.outputs_and_loss(module, batch))
            if splits
            else (lambda _, batch, index: probe.training_loss(batch, index)),
        )
        findings = Findings()
        for index, (name, optimizer) in enumerate(probe.optimizers.items()):
            probe.optimizer_index = index
            params = parameters_of(optimizer)
            coordinates, known = self._coordinates(optimizer, params)
            report = estimator.conditioning(
                params,
                coordinates,
                matrix="gauss_newton" if splits else "hessian",
                num_steps=self.num_steps,
                num_probes=0,
                seed=self.seed,
                progress=progress,
            )
            values = {
                f"lambda_max_{report.matrix}": report.lambda_max,
                "max": max_learning_rate(report.lambda_max, optimizer) if known else math.nan,
                "num_samples": math.nan if report.num_samples is None else float(report.num_samples),
            }
            values |= _current_rates(optimizer)
            highest = max(float(group["lr"]) for group in optimizer.param_groups)
            values["ratio"] = highest / values["max"]
            suffix = f"/{name}" if len(probe.optimizers) > 1 else ""
            findings.values |= {f"learning_rate/{key}{suffix}": x for key, x in values.items()}
            self._count(name, highest, values["max"])
        return findings

    def state_dict(self) -> dict[str, Any]:
        """The estimates in a row that were above, too."""
        return super().state_dict() | {"above": dict(self._above)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._above = dict(state_dict["above"])

    def _coordinates(self, optimizer: Optimizer, params: list[Tensor]) -> tuple[list[Coordinates], bool]:
        """The coordinates in which the optimizer descends, and whether its stable rate is known there."""
        try:
            found = coordinates_of(optimizer, params)
            max_learning_rate(1.0, optimizer)
        except (TypeError, ValueError) as error:
            self._say(f"no learning_rate/max is logged: {error}")
            return ([BNPCoordinates(params, optimizer)] if isinstance(optimizer, BNPreconditioner) else []), False
        return found, True

    def _count(self, name: str, rate: float, largest: float) -> None:
        self._above[name] = self._above.get(name, 0) + 1 if rate > largest else 0
        if self.warn_after is not None and self._above[name] == self.warn_after and name not in self._said:
            self._said.add(name)
            assert self._probe is not None
            if self._probe.trainer.is_global_zero:
                warnings.warn(
                    f"{type(self).__name__}: the learning rate {rate:.3g} of {name} was above the largest stable one, "
                    f"now {largest:.3g}, in {self.warn_after} estimates in a row: lower it, or warm up",
                    stacklevel=2,
                )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_info(f"{type(self).__name__}: {message}")


def _current_rates(optimizer: Optimizer) -> dict[str, float]:
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {"current": float(groups[0]["lr"])}
    return {f"current/{group.get('name', f'pg{i}')}": float(group["lr"]) for i, group in enumerate(groups, start=1)}
