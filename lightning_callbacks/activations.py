"""ActivationMonitor: what becomes of activations and gradients with depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from bnp_optim.diagnostics import ActivationHealth, activation_health
from bnp_optim.diagnostics.choice import LayerRule, chosen_modules
from lightning_callbacks._lightning import LightningModule, MisconfigurationException, Trainer
from lightning_callbacks._probe import Probe
from lightning_callbacks._products import Estimator, parameters_of
from lightning_callbacks._schedule import Findings, IndexedBatch, Monitor, Progress

__all__ = ["ActivationMonitor"]

METRICS = ("logit_cosine", "gradient_kurtosis", "median_kurtosis", "loss", "num_samples")
LAYER_METRICS = ("mean", "std", "mean_to_std", "cosine", "gradient_kurtosis")


class ActivationMonitor(Monitor):
    """Watches means, spread and direction of activations by depth, and how heavy-tailed gradients are.

    **Logged metrics**, as fields of :class:`bnp_optim.diagnostics.ActivationHealth` and
    :class:`bnp_optim.diagnostics.LayerHealth`, where they are defined:

    - ``activations/logit_cosine``: the mean cosine between the last watched layer's outputs for two samples, or
      between the outputs where :meth:`outputs_and_loss` is overridden
    - ``activations/gradient_kurtosis``, ``activations/median_kurtosis``: of all gradient entries together, and the
      median over layers; 3 for a Gaussian
    - ``activations/loss``, ``activations/num_samples``: the loss that the gradients are of, and what it was taken on
    - ``activations/<layer name>/mean``, ``std``, ``mean_to_std``, ``cosine``, ``gradient_kurtosis``: of the layer

    With several optimizers each has its own parameters; the keys without a layer end in ``/`` and its name as
    LearningRateMonitor has it, and a layer is its weights' optimizer's. Over several ranks all is rank zero's.

    **Logged figure**: ``activations``, the layers' numbers by depth, to loggers with ``add_figure`` (TensorBoard).

    An estimate costs one forward and one backward pass per batch.

    Args:
        layers: Modules to watch: names as in the LightningModule's ``named_modules()``, classes or modules. None: the
            layers that BNP knows; classes such as ``nn.BatchNorm1d`` show what normalization makes of these.
        **schedule: As for :class:`Monitor`.

    Attributes:
        reports: The latest reports, by the optimizer's name.

    Raises:
        MisconfigurationException: also, at the start of training, if ``layers`` fit no module.
    """

    def __init__(self, *, layers: Sequence[LayerRule] | None = None, **schedule: Any) -> None:
        super().__init__(**schedule)
        self.layers = layers
        self.reports: dict[str, ActivationHealth] = {}

    def loss(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
        """The loss behind the gradients; by default as for :class:`HessianConditionMonitor`."""
        if self._probe is None:
            raise RuntimeError("loss() is called by the monitor, inside its guard")
        return self._probe.training_loss(batch, batch_idx)

    def outputs_and_loss(self, pl_module: LightningModule, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """As for :class:`MaxLearningRateMonitor`; where it is overridden, :meth:`loss` is not called."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check ``layers``, now that the module is whole."""
        if self.layers is None:  # lazy modules become layers that BNP knows later
            return
        try:
            chosen_modules(pl_module, self.layers)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def estimate(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> Findings:
        """See :class:`Monitor`."""
        self.reports = probe.of_rank_zero(lambda: self._reports(probe, batches, progress))
        findings = Findings()
        for name, report in self.reports.items():
            suffix = f"/{name}" if len(self.reports) > 1 else ""
            numbers = report.to_dict()
            findings.values |= {f"activations/{key}{suffix}": numbers[key] for key in METRICS}
            for x in report.layers:
                findings.values |= {f"activations/{x.name}/{key}": getattr(x, key) for key in LAYER_METRICS}
            findings.figures[f"activations{suffix}"] = partial(_figure, report)
        return findings

    def _reports(self, probe: Probe, batches: list[IndexedBatch], progress: Progress) -> dict[str, ActivationHealth]:
        splits = type(self).outputs_and_loss is not ActivationMonitor.outputs_and_loss
        function = (lambda module, batch, _: self.outputs_and_loss(module, batch)) if splits else self.loss
        closures = Estimator(probe, batches, function).closures
        found = {}
        taken: set[str] = set()
        watched = chosen_modules(probe.pl_module, self.layers)
        for index, (name, optimizer) in enumerate(probe.optimizers.items()):
            probe.optimizer_index = index
            params = parameters_of(optimizer)
            mine = {key: m for key, m in watched.items() if key not in taken and _belongs(m, params)}
            taken.update(mine)
            if mine:
                layers = list(mine.values())
                found[name] = activation_health(probe.pl_module, closures, layers=layers, params=params)
            progress(index + 1, len(probe.optimizers))
        return found


def _belongs(module: nn.Module, params: list[Tensor]) -> bool:
    """Whether an optimizer with these parameters has the module's; of those without any, the first one has them."""
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    ids = {id(p) for p in params}
    return not own or any(id(p) in ids for p in own)


def _figure(report: ActivationHealth) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    report.plot(axes)
    axes.legend()
    return figure
