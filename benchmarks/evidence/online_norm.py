"""Online Normalization: a normalization layer that needs no batch.

Source: V. Chiley et al., Online Normalization for Training Neural Networks, NeurIPS 2019 (arXiv 1905.05894), with the
paper's α_f = 0.999, α_b = 0.99 and layer scaling. Written from its formulas; samples are taken one after the other,
whatever the batch size. With x_t one sample's channel, ⟨·⟩ the mean over its positions:

    y_t = (x_t − μ_{t−1}) / σ_{t−1}
    μ_t = α_f μ_{t−1} + (1 − α_f) ⟨x_t⟩
    σ²_t = α_f σ²_{t−1} + (1 − α_f) var(x_t) + α_f (1 − α_f) (⟨x_t⟩ − μ_{t−1})²

and backward, where the two ε control that gradients stay orthogonal to y and to 1 on average over time:

    x̃'_t = y'_t − (1 − α_b) ε^y_{t−1} y_t,           ε^y_t = ε^y_{t−1} + ⟨x̃'_t y_t⟩
    x'_t = x̃'_t / σ_{t−1} − (1 − α_b) ε^1_{t−1},     ε^1_t = ε^1_{t−1} + ⟨x'_t⟩
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


class OnlineNorm(nn.Module):
    """Normalize (samples, channels, *positions) by running statistics, then scale and shift, then scale the layer.

    Args:
        channels: Of the input.
        alpha_f: α_f, the decay of the statistics.
        alpha_b: α_b, of the gradient's control process.
        eps: Added to variances and to the layer's second moment.
    """

    def __init__(self, channels: int, alpha_f: float = 0.999, alpha_b: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.alpha_f, self.alpha_b, self.eps = alpha_f, alpha_b, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        for name, start in (("mean", 0.0), ("variance", 1.0), ("error_y", 0.0), ("error_1", 0.0)):
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        if self.training:
            y: Tensor = _Normalize.apply(x, self)
        else:
            y = (x - self.mean.view(shape)) * (self.variance + self.eps).rsqrt().view(shape)
        z = y * self.weight.view(shape) + self.bias.view(shape)
        return z * (z.square().flatten(1).mean(1) + self.eps).rsqrt().view((-1,) + (1,) * (x.dim() - 1))


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OnlineNorm) -> Tensor:
        ctx.layer = layer
        if len(x) == 1 and x.dim() == 2:  # the same in fewer steps
            inv_std = (layer.variance + layer.eps).rsqrt()
            delta = x[0] - layer.mean
            a = layer.alpha_f
            layer.variance = (a * layer.variance).addcmul(delta, delta, value=a * (1 - a))
            layer.mean = torch.add(layer.mean, delta, alpha=1 - a)
            y = delta * inv_std
            ctx.save_for_backward(y, inv_std)
            return y[None]
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        variance, mean = torch.var_mean(flat, 2, correction=0)
        a = layer.alpha_f
        means = _decayed(layer.mean, (1 - a) * mean, a)
        gains = (1 - a) * variance + a * (1 - a) * (mean - means[:-1]).square()
        variances = _decayed(layer.variance, gains, a)
        layer.mean, layer.variance = means[-1].clone(), variances[-1].clone()
        inv_std = (variances[:-1] + layer.eps).rsqrt()
        y = (flat - means[:-1].unsqueeze(2)) * inv_std.unsqueeze(2)
        ctx.save_for_backward(y, inv_std)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, inv_std = ctx.saved_tensors
        layer, b = ctx.layer, ctx.layer.alpha_b
        if y.dim() == 1:
            g = torch.addcmul(grads[0][0], layer.error_y, y, value=b - 1)
            layer.error_y = torch.addcmul(layer.error_y, g, y)
            g = torch.addcmul((b - 1) * layer.error_1, g, inv_std)
            layer.error_1 = layer.error_1 + g
            return g[None], None
        g = grads[0].reshape(y.shape)
        keep, gain = 1 - (1 - b) * y.square().mean(2), (g * y).mean(2)
        errors, error = [], layer.error_y
        for k, p in zip(keep, gain, strict=True):  # its decay depends on the data: no closed form
            errors.append(error)
            error = torch.addcmul(p, k, error)
        layer.error_y = error
        h = (g - (1 - b) * torch.stack(errors).unsqueeze(2) * y) * inv_std.unsqueeze(2)
        errors_1 = _decayed(layer.error_1, h.mean(2), b)
        layer.error_1 = errors_1[-1].clone()
        return (h - (1 - b) * errors_1[:-1].unsqueeze(2)).view(grads[0].shape), None


def _decayed(start: Tensor, gains: Tensor, decay: float) -> Tensor:
    """s_0 = start, s_t = decay · s_{t−1} + gains_t; all of them, (samples + 1, channels)."""
    powers, triangle = _powers(len(gains), decay, gains.dtype)
    return torch.addmm(torch.outer(powers, start), triangle, gains)


@lru_cache
def _powers(n: int, decay: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    t = torch.arange(n + 1, dtype=torch.float64)
    lag = t[:, None] - t[None, 1:]
    return (decay**t).to(dtype), torch.where(lag >= 0, decay ** lag.clamp(min=0), 0.0).to(dtype)
