"""LayerConditionMonitor: each layer's input before and after P, its output gradient, and BNP's own statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.curvature import layer_conditioning
from bnp_optim.discovery import find_layers
from lightning_callbacks._lightning import LightningModule, MisconfigurationException
from lightning_callbacks._probe import Probe
from lightning_callbacks._products import Estimator, parameters_of
from lightning_callbacks._schedule import Findings, IndexedBatch, Monitor, Progress

__all__ = ["LayerConditionMonitor"]

METRICS = ("lambda_max", "kappa", "kappa_p")


class LayerConditionMonitor(Monitor):
    """Measures how well each layer's input and output gradient are conditioned, and what BNP makes of the input.

    **Logged metrics**, each under ``layers/<layer name>/`` (as fields of
    :class:`bnp_optim.curvature.LayerConditioning`, where they are defined):

    - ``kappa``, ``kappa_p``, ``lambda_max``: condition number, percentile condition number and largest eigenvalue of
      the input's second moment, with the bias's column of ones
    - ``kappa_preconditioned``, ``kappa_p_preconditioned``, ``lambda_max_preconditioned``: the same after P, under a
      BNPreconditioner
    - ``kappa_gradient``, ``kappa_p_gradient``, ``lambda_max_gradient``: the same of the output gradient's covariance
    - ``num_observations``, ``num_varying``: rows, and features that are not constant; only these count
    - ``bnp_mean_min``, ``bnp_mean_mean``, ``bnp_mean_max``: over the features, of BNP's running mean μ
    - ``bnp_std_min``, ``bnp_std_mean``, ``bnp_std_max``: the same of σ̃
    - ``bnp_q``: the step scale q

    ``kappa`` is infinite where the batch has fewer observations than features; ``kappa_p`` or ``epsilon`` helps. An
    estimate costs one forward and one backward pass per batch, and dense eigenvalues, O(N d² + d³) per layer. Over
    several ranks the batches are rank zero's.

    Args:
        share: Of the eigenvalues, in (0, 1], for ``kappa_p``. 0.9: all but the last tenth.
        epsilon: Added to the eigenvalues, relative to the largest. 0: nothing; otherwise no condition number exceeds
            1 + 1/epsilon.
        **schedule: As for :class:`Monitor`.
    """

    def __init__(self, *, share: float = 0.9, epsilon: float = 0.0, **schedule: Any) -> None:
        super().__init__(**schedule)
        if not 0 < share <= 1:
            raise MisconfigurationException(f"share is {share!r}, it must be in (0, 1], such as 0.9")
        if not 0 <= epsilon < float("inf"):
            raise MisconfigurationException(f"epsilon is {epsilon!r}, it must be at least 0, such as 1e-8")
        self.share = share
        self.epsilon = epsilon

    def loss(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        """The loss behind the output gradients; by default as for :class:`HessianConditionMonitor`."""
        if self._probe is None:
            raise RuntimeError("loss() is called by the monitor, inside its guard")
        return self._probe.training_loss(batch, batch_idx)

    def estimate(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> Findings:
        """See :class:`Monitor`."""
        return Findings(probe.of_rank_zero(lambda: self._values(probe, batches, progress)))

    def _values(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> dict[str, float]:
        weights = {layer.name: layer.weight for layer in find_layers(probe.pl_module).layers}
        values: dict[str, float] = {}
        for index, optimizer in enumerate(probe.optimizers.values()):
            probe.optimizer_index = index
            mine = {id(p) for p in parameters_of(optimizer)}
            records = layer_conditioning(
                probe.pl_module,
                Estimator(probe, batches, self.loss).closures,
                preconditioner=optimizer if isinstance(optimizer, BNPreconditioner) else None,
                share=self.share,
                epsilon=self.epsilon,
            )
            for name, record in records.items():
                if id(weights[name]) not in mine:  # another optimizer's, or frozen
                    continue
                numbers = record.to_dict()
                keys = [f"{key}{end}" for end in ("", "_preconditioned", "_gradient") for key in METRICS]
                keys += ["num_observations", "num_varying"]
                values |= {f"layers/{name}/{key}": numbers[key] for key in keys}
            values |= _statistics(optimizer, weights)
            progress(index + 1, len(probe.optimizers))
        return values


def _statistics(optimizer: Optimizer, weights: dict[str, Tensor | None]) -> dict[str, float]:
    """BNP's own μ, σ̃ and q, by the layers' names in the module."""
    if not isinstance(optimizer, BNPreconditioner):
        return {}
    names = {id(weight): name for name, weight in weights.items()}
    values: dict[str, float] = {}
    tracker = optimizer._tracker
    for layer in tracker.layers:
        if layer not in tracker.ready or id(layer.weight) not in names:
            continue
        factors = tracker.factors(layer)
        for what, x in (("mean", factors.mean), ("std", factors.inv_std.reciprocal())):
            for how, number in (("min", x.min()), ("mean", x.mean()), ("max", x.max())):
                values[f"layers/{names[id(layer.weight)]}/bnp_{what}_{how}"] = float(number)
        values[f"layers/{names[id(layer.weight)]}/bnp_q"] = float(factors.q2.sqrt())
    return values
