"""From a probe and some batches to ``estimate_conditioning``, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from bnp_optim.curvature import Batch, ConditioningReport, Coordinates, estimate_conditioning
from lightning_callbacks._probe import Probe, RankMean, num_samples_of

__all__ = ["Estimator", "parameters_of"]


class Estimator:
    """Curvature of what ``function`` makes of the batches.

    Args:
        probe: Evaluates it.
        batches: Pairs (batch, batch index).
        function: ``function(pl_module, batch, batch_idx)``: the loss, or (outputs, loss as a function of outputs).
    """

    def __init__(self, probe: Probe, batches: Sequence[tuple[Any, int]], function: Callable[..., Any]) -> None:
        self._probe = probe
        sizes = [num_samples_of(batch) for batch, _ in batches]
        known = all(size is not None for size in sizes)
        self.closures = [
            Batch(partial(probe.evaluate, function, batch, index), size if known else None)
            for (batch, index), size in zip(batches, sizes, strict=True)
        ]

    def conditioning(
        self,
        params: Sequence[Tensor],
        coordinates: Sequence[Coordinates],
        *,
        matrix: Literal["hessian", "gauss_newton"],
        **options: Any,
    ) -> ConditioningReport:
        """``estimate_conditioning``; over several ranks, of the mean of their matrices."""
        if self._probe.trainer.world_size == 1:
            return estimate_conditioning(
                self.closures, params, preconditioner=list(coordinates) or None, matrix=matrix, **options
            )
        self._probe.on_all_ranks(self._evaluate)
        sizes = [batch.num_samples for batch in self.closures]
        mean = RankMean(self._probe.trainer, None if None in sizes else sum(x or 0 for x in sizes))
        report = estimate_conditioning(
            self.closures, params, preconditioner=[*coordinates, mean], matrix=matrix, **options
        )
        described = ", ".join(c.description for c in coordinates)
        return replace(report, num_samples=mean.num_samples, preconditioned=bool(coordinates), coordinates=described)

    def _evaluate(self) -> None:
        """Once, without products: an error of one rank must reach all before they wait for each other."""
        from bnp_optim.curvature.batches import loss_of

        for batch in self.closures:
            loss_of(batch)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Those that it trains, each once."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return list({id(p): p for p in params}.values())
