"""OutputCentering: the mean subtraction that takes the Fisher information's sharpest directions away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnp_optim.checks import check_number
from bnp_optim.moments import statistics_dtype
from bnp_optim.nn.running import check_momentum, newest_share

__all__ = ["OutputCentering"]


class OutputCentering(nn.Module):
    """Subtracts from each output of a net its mean over the batch.

    To be the last module, behind the last linear layer: ``nn.Sequential(net, OutputCentering(10))``. In a wide net
    λ_max of the Fisher information grows with the width M, since all samples' gradients share a direction; with the
    mean over the batch subtracted it is O(1) as long as the number of samples grows with M (R. Karakida, S. Akaho,
    S. Amari, *The Normalization Method for Alleviating Pathological Sharpness in Wide Neural Networks*, NeurIPS 2019,
    1906.02926). The mean is part of the function: gradients flow through it.

    In training the batch's mean is subtracted, over samples and positions. With one sample, and with ``online=True``
    always, it is the running mean of the batches *before* this one, a constant (zero for the very first): with the
    sample in it the output would be scaled by 1 - its weight, and that times too large a gradient. In evaluation it
    is the running mean. NOTE: a constant leaves the Jacobian as it is, so online it is the outputs that get centered
    and not λ_max that shrinks.

    As in BatchNorm the mode decides whether the running mean is updated (under ``torch.no_grad`` too). It is bias
    corrected: after the first batch it is that batch's mean. Batches with an output that is not finite are left out.

    Args:
        num_features: Outputs C.
        momentum: Weight of the newest batch in the running mean, in (0, 1]; None: plain average of all. 0.1: that of
            BatchNorm, since outputs drift while a net trains.
        online: Subtract the running mean in training, too.

    Shape:
        (N, C) or (N, C, *) to the same.

    Attributes:
        running_mean: (C,).
        num_batches_tracked: Batches seen, an int64 scalar.

    Raises:
        TypeError, ValueError: if an argument is out of its range, or the input has another shape.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, momentum: float | None = 0.1, *, online: bool = False) -> None:
        super().__init__()
        check_number("num_features", num_features, lambda n: n >= 1 and n == int(n), "a whole number of at least 1")
        check_momentum(momentum)
        self.num_features = num_features
        self.momentum = momentum
        self.online = online
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        """The centered outputs."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, it must be (N, {self.num_features}) or "
                f"(N, {self.num_features}, *): OutputCentering({self.num_features}) centers dimension 1"
            )
        if not self.training:
            return input - self._over(input, self.running_mean)
        if input.shape[0] == 0:
            return input
        dims = (0, *range(2, input.dim()))
        batch_mean = input.to(torch.promote_types(statistics_dtype(input), self.running_mean.dtype)).mean(dims)
        before = self.running_mean.clone()
        self._advance(batch_mean.detach())
        own = input.shape[0] > 1 and not self.online
        return input - self._over(input, batch_mean if own else before)

    def _advance(self, batch_mean: Tensor) -> None:
        with torch.no_grad():
            finite = batch_mean.isfinite().all()
            seen = self.num_batches_tracked + 1
            mean = self.running_mean
            mixed = mean + newest_share(self.momentum, seen, mean.dtype) * (batch_mean.to(mean) - mean)
            mean.copy_(torch.where(finite, mixed, mean))
            self.num_batches_tracked += finite

    @staticmethod
    def _over(input: Tensor, mean: Tensor) -> Tensor:
        return mean.to(input.dtype).view(1, -1, *(1 for _ in input.shape[2:]))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.num_features}, momentum={self.momentum}" + (", online=True" if self.online else "")
