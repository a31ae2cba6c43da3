"""PopulationNorm: batch normalization by the statistics of the population, and the way there and back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bnp_optim.checks import check_choice, check_number
from bnp_optim.nn.running import advanced, batch_statistics, check_momentum, newest_share

__all__ = ["PopulationNorm1d", "PopulationNorm2d", "PopulationNorm3d", "convert_batchnorm"]


class PopulationNorm(_NormBase):
    """Normalizes each channel by its running mean and variance, in training as in evaluation, then γ and β.

    h̄ = γ(h - μ_P)/√(σ_P² + eps) + β. Without the noise of batch statistics, and at any batch size, 1 included; what
    the noise was good for, :class:`GammaDecayPenalty` gives back (P. Luo, X. Wang, W. Shao, Z. Peng, *Towards
    Understanding Regularization in Batch Normalization*, ICLR 2019, 1809.00846).

    In training the statistics first take the batch in, then normalize it; in backward they are constants. So a sample
    is never further than √((1-m)/m) from the mean at batch size 1, m the momentum. The variance is the exponentially
    weighted one of all samples: it counts how far batch means lie from the running mean (BatchNorm's is the mean of
    batch variances, and unbiased). Both are bias corrected: after the first batch they are that batch's own. As in
    BatchNorm the mode decides whether they are updated (under ``torch.no_grad`` too). A batch with a value that is not
    finite leaves them as they are. Each process has its own; DistributedDataParallel spreads those of rank zero.

    Weights and buffers have the names of BatchNorm's, so that a ``state_dict`` of one loads into the other.

    NOTE: since the statistics are constants in backward, the gradient of the layer before is not free of its mean and
    of its scale, as BatchNorm's is: steps along these are taken back as the statistics follow, and the weights grow.
    It trains more slowly than BatchNorm at the same rate (docs/gamma_decay.md).

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight m of the newest batch, in (0, 1]; None: plain average of all batches. 0.01, where BatchNorm
            has 0.1: statistics that follow fast take back what a step has gained (measured in docs/gamma_decay.md).
        affine: Whether there are γ (``weight``) and β (``bias``).
        track_running_stats: Only True makes sense.

    Raises:
        TypeError, ValueError: if an argument is out of its range.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_number("num_features", num_features, lambda n: n >= 1 and n == int(n), "a whole number of at least 1")
        check_number("eps", eps, lambda e: 0 < e < float("inf"), "above 0, such as 1e-5")
        check_momentum(momentum)
        if not track_running_stats:
            raise ValueError(
                "track_running_stats is False, but running statistics are what PopulationNorm normalizes by: "
                "use nn.BatchNorm for batch statistics"
            )
        super().__init__(num_features, eps, momentum, affine, True, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The normalized input."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, variance = self.running_mean, self.running_var
        if self.training and input.numel():
            mean, variance = self._advance(input)
        return F.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    def _advance(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Take the batch in; returns the new statistics, as tensors that later batches do not change."""
        with torch.no_grad():
            mean, variance = self.running_mean, self.running_var
            dtype = torch.promote_types(mean.dtype, torch.float32)
            found = batch_statistics(input, dtype)
            seen = self.num_batches_tracked + 1
            share = newest_share(self.momentum, seen, dtype)
            new = advanced(mean.to(dtype), variance.to(dtype), *found, share)
            finite = (new[0].isfinite() & new[1].isfinite()).all()
            mean = torch.where(finite, new[0].to(mean.dtype), mean)
            variance = torch.where(finite, new[1].to(variance.dtype), variance)
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
            self.num_batches_tracked += finite
        return mean, variance


class PopulationNorm1d(PopulationNorm):
    """The counterpart of ``nn.BatchNorm1d``, on (N, C) or (N, C, L): running statistics in training, too.

    See :class:`PopulationNorm` (the base of all three) for what it does and for the arguments.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm1d._check_input_dim(self, input)  # type: ignore[arg-type]


class PopulationNorm2d(PopulationNorm):
    """The counterpart of ``nn.BatchNorm2d``, on (N, C, H, W): running statistics in training, too.

    See :class:`PopulationNorm` (the base of all three) for what it does and for the arguments.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm2d._check_input_dim(self, input)  # type: ignore[arg-type]


class PopulationNorm3d(PopulationNorm):
    """The counterpart of ``nn.BatchNorm3d``, on (N, C, D, H, W): running statistics in training, too.

    See :class:`PopulationNorm` (the base of all three) for what it does and for the arguments.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm3d._check_input_dim(self, input)  # type: ignore[arg-type]


_TO_POPULATION: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: PopulationNorm1d,
    nn.BatchNorm2d: PopulationNorm2d,
    nn.BatchNorm3d: PopulationNorm3d,
}
_TO_BATCH = {population: batch for batch, population in _TO_POPULATION.items()}


def convert_batchnorm(model: nn.Module, to: str = "population") -> nn.Module:
    """Make every BatchNorm of ``model`` a PopulationNorm, or the other way round.

    Nothing moves: each module stays the same object and changes its class. So weights, buffers, hooks, names, mode,
    device, dtype and what optimizers hold are what they were; there and back again is bitwise; and a model that is
    converted already stays as it is. Compile a model after converting it.

    Subclasses (``SyncBatchNorm``, sharded or quantized ones) may do something else in their forward pass: they are
    left alone, with a warning.

    The momentum stays what it was, too: BatchNorm's default of 0.1 is more than PopulationNorm likes.

    Args:
        model: Any module; may be a normalization itself.
        to: "population" or "batch".

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``to`` is neither, a lazy BatchNorm has not seen its first batch, or one to be converted keeps
            no running statistics or has momentum 0. Nothing is converted then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("to", to, ("population", "batch"))
    family: type[nn.Module] = _BatchNorm if to == "population" else PopulationNorm
    table = _TO_POPULATION if to == "population" else _TO_BATCH
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, family)]
    chosen = [(name, module) for name, module in found if type(module) in table]
    for name, module in found:
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise ValueError(f"{name or 'model'!r} is a {type(module).__name__} without weights yet: run a batch first")
    for name, module in chosen:
        if module.running_mean is None or module.running_var is None:
            raise ValueError(
                f"{name or 'model'!r} has track_running_stats=False, but running statistics are what PopulationNorm "
                "normalizes by: build it with track_running_stats=True"
            )
        if module.momentum == 0:
            raise ValueError(f"{name or 'model'!r} has momentum 0: set it to a number in (0, 1], or None")
    for _, module in chosen:
        module.__class__ = table[type(module)]
    left = [f"{name!r} ({type(module).__name__})" for name, module in found if (name, module) not in chosen]
    if left:
        warnings.warn(
            f"convert_batchnorm left alone what is no plain {'BatchNorm' if to == 'population' else 'PopulationNorm'}: "
            + ", ".join(left),
            stacklevel=2,
        )
    return model
