"""``mean_field_fisher_from_model``: the prediction for an ``nn.Sequential`` as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bnp_optim.theory.activations import Activation, as_activation, is_activation
from bnp_optim.theory.mean_field import MeanFieldFisher, fisher_of
from bnp_optim.theory.propagation import Average, Norm, Piece, Weights

__all__ = ["mean_field_fisher_from_model"]

_CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_IGNORED_LAST = (nn.Softmax, nn.LogSoftmax)
_FAR = 0.25  # running variances may differ so much from the theory's before it is said


def mean_field_fisher_from_model(
    model: nn.Sequential, x: Tensor | None = None, *, num_samples: int | None = None
) -> MeanFieldFisher:
    """Predict the Fisher matrix of a model from its widths and the variances of its weights as they are.

    Reads Linear, convolutions, activations, BatchNorm right after them (in training mode differentiated through the
    batch's statistics, in evaluation mode with constant ones), average pooling, Flatten, Identity, Dropout, and
    ``OutputCentering`` at the end. The theory is that of independent weights: after training it is a comparison, not
    a prediction. What did not enter is listed in ``unread``.

    Args:
        model: Of such modules, nested or not, that ends in a Linear layer, or a convolution averaged over positions.
        x: Inputs (T, …), whose second moments q̂1⁰ and q̂2⁰ are then used; convolutions need their size. None:
            inputs N(0, I).
        num_samples: T. None: that of ``x``.

    Raises:
        TypeError: if the model is no nn.Sequential, or has a module that the theory knows no rule for.
        ValueError: if neither ``x`` nor ``num_samples`` is given, modules come in an order without meaning, a layer's
            weights are all zero, or a lone sample meets BatchNorm.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(
            f"model is a {type(model).__name__}, it must be an nn.Sequential: pass one, or use mean_field_fisher"
        )
    if x is None and num_samples is None:
        raise ValueError("num_samples is None and so is x: give one of them, T is part of the prediction")
    if x is not None and (not isinstance(x, Tensor) or x.dim() < 2 or len(x) < 1):
        raise ValueError(f"x is {getattr(x, 'shape', x)!r}, it must be a tensor of samples (T, …)")
    reader = _Reader(size=None if x is None else tuple(x.shape[2:]), has_inputs=x is not None)
    for name, module in _leaves(model):
        reader.read(name, module)
    reader.finish()
    moment, overlap = (1.0, 0.0) if x is None else _input_moments(x, reader.unread)
    found = fisher_of(
        reader.pieces,
        num_samples=len(x) if num_samples is None and x is not None else num_samples or 0,
        num_outputs=reader.units,
        centered_output=reader.centered,
        input_moment=moment,
        input_overlap=overlap,
    )
    reader.compare(found)
    return replace(found, unread=tuple(reader.unread))


def _leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if type(module) is nn.Sequential:
            yield from _leaves(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


@dataclass
class _Reader:
    """Turns modules, in their order, into pieces.

    Args:
        size: Of the feature map that the next module sees; () once it is flat, None if it is not known.
        has_inputs: Whether ``size`` is that of inputs.
    """

    size: tuple[int, ...] | None
    has_inputs: bool
    pieces: list[Piece] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    units: int = 0
    centered: bool = False
    ended: bool = False
    _variances: list[tuple[str, str, float]] = field(default_factory=list)

    def read(self, name: str, module: nn.Module) -> None:
        """One module."""
        if self.ended:
            raise ValueError(f"model has {name} after OutputCentering, which must come last")
        kind = type(module)
        if isinstance(module, nn.Linear):
            if self.size:
                raise ValueError(
                    f"{name} is a Linear on features of shape {self.size}: flatten or average positions before it"
                )
            self._weights(name, module)
        elif kind in _CONVOLUTIONS:
            self._convolution(name, module)
        elif isinstance(module, _BatchNorm):
            self._norm(name, module)
        elif is_activation(module):
            self.pieces.append(as_activation(module))
        elif isinstance(module, (*_POOLS, *_ADAPTIVE)):
            self._average(name, module)
        elif kind is nn.Flatten:
            self.size = ()
        elif kind.__name__ == "OutputCentering":
            self.ended = True
            # in evaluation, and online, it subtracts a constant
            self.centered = module.training and not getattr(module, "online", False)
        elif isinstance(module, _DropoutNd):
            if module.training and module.p > 0:
                self.unread.append(f"{name}: Dropout({module.p}) is active, the prediction is that without it")
        elif kind in _IGNORED_LAST:
            self.unread.append(f"{name}: {kind.__name__}; F is that of the outputs before it")
        else:
            raise TypeError(
                f"model has {name}, a {kind.__name__}, which mean-field theory has no rule for: take it out, or use "
                "fisher_lambda_max, which measures"
            )

    def finish(self) -> None:
        """What comes after the last layer of weights is no part of the outputs' linear map."""
        last = max((i for i, piece in enumerate(self.pieces) if isinstance(piece, Weights)), default=-1)
        if last < 0:
            raise ValueError("model has no layer of weights: there is nothing to predict")
        after = self.pieces[last + 1 :]
        if any(isinstance(piece, Norm) for piece in after):
            raise ValueError("model ends in BatchNorm: the outputs must be those of a layer of weights")
        self.unread += [
            f"{p} after the last layer; F is that of the linear outputs" for p in after if isinstance(p, Activation)
        ]
        self.pieces = [*self.pieces[: last + 1], *(p for p in after if isinstance(p, Average))]
        if self.size and math.prod(self.size) > 1:
            raise ValueError(f"model's output still has positions {self.size}: average them, or flatten into a Linear")

    def compare(self, found: MeanFieldFisher) -> None:
        """Say where BatchNorm's constant statistics are others than those of the theory's inputs."""
        theirs = {layer.name: layer.q1 - layer.q2 for layer in found.layers}
        for norm, layer, variance in self._variances:
            v = theirs.get(layer)
            if v is not None and abs(variance / v - 1) > _FAR:
                self.unread.append(f"{norm}: its running variance is {variance:.3g}, the theory's {v:.3g} was used")

    def _weights(self, name: str, module: Any) -> None:
        weight: Tensor = module.weight.detach()
        bias: Tensor | None = module.bias
        fan_in = weight[0].numel()
        square = float(weight.double().square().mean())
        if not (square > 0 and math.isfinite(square)):
            raise ValueError(f"{name}.weight has mean square {square}: the theory is of random weights, initialize it")
        mean = float(weight.double().mean())
        if abs(mean) > 5 * math.sqrt(square / weight.numel()):
            self.unread.append(f"{name}: the weights' mean {mean:.2g} is not zero, as the theory has it")
        own = [p for p in (module.weight, bias) if p is not None and p.requires_grad]
        self.pieces.append(
            Weights(
                fan_in,
                fan_in * square,
                0.0 if bias is None else float(bias.detach().double().square().mean()),
                sum(p.numel() for p in own),
                trained=module.weight.requires_grad,
                name=name,
            )
        )
        self.units = len(weight)

    def _convolution(self, name: str, module: Any) -> None:
        if not self.size:
            raise ValueError(
                f"{name} is a convolution, whose feature maps must be known: pass x of shape (T, channels, …)"
            )
        self._weights(name, module)
        weight = module.weight.detach().to("meta")
        inside = torch.empty(1, module.in_channels, *self.size, device="meta", dtype=weight.dtype)
        options = (module.stride, module.padding, module.dilation, module.groups)
        before, self.size = self.size, tuple(_CONVOLUTIONS[type(module)](inside, weight, None, *options).shape[2:])
        if module.padding_mode != "circular" and module.padding not in ("valid", 0) and any(_tuple(module.padding)):
            self.unread.append(f"{name}: {module.padding_mode} padding of maps {before}, read as circular")

    def _norm(self, name: str, module: Any) -> None:
        if not self.pieces or not isinstance(self.pieces[-1], Weights):
            raise ValueError(
                f"{name} does not follow a layer of weights: the theory has BatchNorm between it and φ only"
            )
        scale2, frozen = 1.0, not module.training and module.running_var is not None
        if module.weight is not None:
            gamma = module.weight.detach().double()
            scale2 = float(gamma.square().mean())
            if not scale2 > 0:
                raise ValueError(f"{name}.weight (γ) is zero: nothing comes through")
            if float(gamma.abs().std(correction=0)) > 0.1 * math.sqrt(scale2):
                self.unread.append(f"{name}: γ varies between units, its mean square {scale2:.3g} was used")
            if float(module.bias.detach().abs().max()) > 0.1 * math.sqrt(scale2):
                self.unread.append(f"{name}: β is not zero, as the theory has it")
        if frozen:
            self._variances.append((name, self.pieces[-1].name, float(module.running_var.double().mean())))
        self.pieces.append(Norm(scale2, frozen, module.eps, math.prod(self.size or ())))

    def _average(self, name: str, module: Any) -> None:
        if not self.size:
            raise ValueError(
                f"{name} averages positions, of which there are none here: pass x of shape (T, channels, …)"
            )
        out = tuple(module(torch.empty(1, 1, *self.size, device="meta")).shape[2:])
        if isinstance(module, _POOLS):
            kernel, stride, padding = (_tuple(t) for t in (module.kernel_size, module.stride, module.padding))
            if kernel != stride or any(padding):
                raise ValueError(
                    f"{name} averages windows that overlap or are padded: the theory has disjoint ones only"
                )
            k = math.prod(kernel * (len(self.size) if len(kernel) == 1 else 1))
        else:
            k = math.prod(self.size) // math.prod(out)
        self.pieces.append(Average(k))
        self.size = out


def _tuple(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return (0,) if value == "valid" else (1,)
    return (value,) if isinstance(value, int) else tuple(value)


def _input_moments(x: Tensor, unread: list[str]) -> tuple[float, float]:
    """q̂1⁰ and q̂2⁰; convolutional inputs that are correlated between positions are pointed out."""
    h = x.detach().double().flatten(2) if x.dim() > 2 else x.detach().double().unsqueeze(-1)
    t, _, n = h.shape
    moment = float(h.square().mean())
    if not (moment > 0 and math.isfinite(moment)):
        raise ValueError(f"x has mean square {moment}, it must be positive and finite")
    overlap = 0.0 if t == 1 else float((h.sum(0).square() - h.square().sum(0)).mean()) / (t * (t - 1))
    if n > 1:
        beside = float((h.sum(2).square() - h.square().sum(2)).mean()) / (n * (n - 1))
        if abs(beside - overlap) > 0.1 * moment:
            unread.append(
                f"x: positions of a sample are correlated by {beside / moment:.2g}, not {overlap / moment:.2g}"
            )
    return moment, overlap
