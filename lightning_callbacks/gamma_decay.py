"""GammaDecay: adds the gradient of Σ ζγ² at each optimizer step, and logs what it adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from bnp_optim.nn import GammaDecayPenalty
from bnp_optim.nn.activations import Activation
from bnp_optim.nn.population import PopulationNorm
from lightning_callbacks._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_callbacks._probe import num_samples_of, unwrapped

__all__ = ["GammaDecay"]


class GammaDecay(Callback):
    """Gives a net without batch noise the regularization that batch normalization's noise would be.

    Unlike the monitors it changes training: at each optimizer step, after the gradients were unscaled and before they
    are clipped, it adds the gradient of :class:`bnp_optim.nn.GammaDecayPenalty`, whose docstring has the formulas. It
    serves nets with PopulationNorm layers under any optimizer, and nets free of normalization under a
    :class:`bnp_optim.BNPreconditioner`.

    ζ is measured in the forward passes of training; what monitors run beside it does not count.

    **Logged metrics** (by ``pl_module.log_dict``, as often as ``Trainer(log_every_n_steps=...)`` says):

    - ``gamma_decay/penalty``: strength·Σ ζγ², as of before the step
    - ``gamma_decay/zeta/<layer>``: the mean over the layer's units of ζ, ``strength`` not counted

    Args:
        batch_size: M of the batch normalization to imitate, at least 2. None: the number of samples of the first
            batch, as each device sees it.
        strength: Multiplies ζ. 1: the paper's formula.
        activation: What follows the layers, where no ``nn.Sequential`` shows it; as for ``GammaDecayPenalty``. Names
            are those in the LightningModule.
        interval: Measure every so many forward passes.
        log: Whether to log.

    Attributes:
        penalties: From the first step on; one, or without normalization layers one per BNPreconditioner.

    Raises:
        MisconfigurationException: (at the first step) if there is nothing to decay, or an argument does not fit.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        *,
        strength: float = 1.0,
        activation: Activation | Mapping[str, Activation] | None = None,
        interval: int = 10,
        log: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.strength = strength
        self.activation = activation
        self.interval = interval
        self.to_loggers = log  # NOTE: Lightning itself sets an attribute `log` on every callback
        self.penalties: list[GammaDecayPenalty] = []
        self._loaded: list[dict[str, Any]] = []

    # Hooks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the penalties before the first forward pass."""
        if not self.penalties:
            self._make(trainer, pl_module, self.batch_size or num_samples_of(batch) or 0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient, to the parameters of this optimizer."""
        optimizer = unwrapped(optimizer)
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        for penalty in self.penalties:
            if penalty.optimizer is not None and penalty.optimizer is not optimizer:
                continue
            added = penalty.add_gradients(mine)
            if self.to_loggers:
                values: dict[str, Any] = {"gamma_decay/penalty": added.to(pl_module.device)}
                values |= {f"gamma_decay/zeta/{name}": zeta.mean() for name, zeta in penalty.coefficients.items()}
                pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks away."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        made = [{name: meter.state_dict() for name, meter in p.meters.items()} for p in self.penalties]
        return {"meters": made or self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, once training starts."""
        self._loaded = state_dict["meters"]

    # The penalties

    def _make(self, trainer: Trainer, pl_module: LightningModule, batch_size: int) -> None:
        optimizers = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        bnp = [optimizer for optimizer in optimizers if isinstance(optimizer, BNPreconditioner)]
        several = len(bnp) > 1 and not any(isinstance(m, PopulationNorm) for m in pl_module.modules())
        options: dict[str, Any] = {"strength": self.strength, "interval": self.interval}
        try:
            for optimizer in bnp if several else (bnp[0] if bnp else None,):
                activation = self._of(optimizer, pl_module) if several and optimizer else self.activation
                self.penalties.append(
                    GammaDecayPenalty(pl_module, batch_size, optimizer=optimizer, activation=activation, **options)
                )
        except (TypeError, ValueError) as error:
            self._release()
            raise MisconfigurationException(f"GammaDecay: {error}") from error
        for penalty, states in zip(self.penalties, self._loaded, strict=False):
            for name, meter in penalty.meters.items():
                if name in states:
                    meter.load_state_dict(states[name])

    def _of(self, optimizer: BNPreconditioner, pl_module: LightningModule) -> Any:
        """What was told of the layers that ``optimizer`` owns."""
        if not isinstance(self.activation, Mapping):
            return self.activation
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        modules = dict(pl_module.named_modules())
        others = {n for n, m in modules.items() if all(id(p) not in owned for p in m.parameters(recurse=False))}
        return {name: activation for name, activation in self.activation.items() if name not in others}

    def _release(self) -> None:
        """Detach the hooks; the next training makes its own, and goes on from what was measured."""
        self._loaded = self.state_dict()["meters"]
        for penalty in self.penalties:
            penalty.remove()
        self.penalties = []
