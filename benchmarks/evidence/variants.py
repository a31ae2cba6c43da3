"""What a training could be beyond BNP's options: in the net, its start, what is left out, how statistics are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim import fold_normalization
from bnp_optim.bank import StatisticsBank
from bnp_optim.layers import Samples, register_layer
from bnp_optim.layers.conv import ConvAdapter

Layers = Sequence[nn.Module]


@dataclass(frozen=True)
class Variant:
    """One of VARIANTS.

    Args:
        context: What must hold while it trains.
        prepare: The net as it wants it.
        start: Given the net and FOLD inputs, change its initial weights; None: leave them.
        leaves_out: Of a net's layers, in the order of the net, those that are not preconditioned.
        clip: The norm at which the gradient of all parameters is clipped, before any preconditioning; None: it is not.
    """

    context: Callable[[], AbstractContextManager[None]] = nullcontext
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    start: Callable[[nn.Module, Tensor], Any] | None = None
    leaves_out: Callable[[Layers], Layers] = lambda layers: ()
    clip: float | None = None

    def clipping(self, optimizer: Optimizer) -> Optimizer:
        """``optimizer``, whose steps clip first if they should."""
        if self.clip is not None:
            parameters, norm = [p for group in optimizer.param_groups for p in group["params"]], self.clip
            optimizer.register_step_pre_hook(lambda *_: _clip(parameters, norm))
        return optimizer

    def left_out(self, model: nn.Module) -> Layers:
        """For the option ``skip``."""
        return self.leaves_out([m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)])


def _clip(parameters: list[Tensor], norm: float) -> None:
    nn.utils.clip_grad_norm_(parameters, norm)


class PositionsConv2d(nn.Conv2d):
    """A ``Conv2d`` for which N counts samples × positions; computes what ``Conv2d`` does."""


class _PositionsAdapter(ConvAdapter):
    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        values = super().samples(module, input).values
        assert isinstance(values, Tensor)
        return Samples(values, values.numel() // values.shape[1])


register_layer(PositionsConv2d, _PositionsAdapter())


def with_positions(model: nn.Module) -> nn.Module:
    """``model``, its convolutions :class:`PositionsConv2d`."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = PositionsConv2d
    return model


@contextmanager
def feature_floors() -> Iterator[None]:
    """Inside, the floor of a feature is relative to itself: σ̃² = (1 + ε1) σ² + ε2."""

    def invert(self: StatisticsBank, values: Any) -> None:
        floored = values.variance.mul(1 + self.options.var_rel_eps).add_(self.options.var_eps)
        torch.rsqrt(floored, out=values.inv_std)

    with mock.patch.object(StatisticsBank, "_invert", invert):
        yield


@contextmanager
def geometric_floors() -> Iterator[None]:
    """Inside, floors are relative to the geometric mean of σ² + ε2: σ̃² = σ² + ε1·exp(mean(log(σ² + ε2))) + ε2."""

    def invert(self: StatisticsBank, values: Any) -> None:
        real = torch.tensor([r.statistics for r in self.rows_])
        inside = torch.arange(values.variance.shape[1]) < real[:, None]
        logs = (values.variance + self.options.var_eps).log().where(inside, 0.0).sum(1) / real
        floor = self.options.var_rel_eps * logs.exp() + self.options.var_eps
        torch.rsqrt(values.variance + floor[:, None].to(values.variance), out=values.inv_std)

    init = StatisticsBank.__init__

    def remember(self: Any, rows: Any, *args: Any, **options: Any) -> None:
        self.rows_ = rows
        init(self, rows, *args, **options)

    with mock.patch.object(StatisticsBank, "_invert", invert), mock.patch.object(StatisticsBank, "__init__", remember):
        yield


@contextmanager
def first_floors() -> Iterator[None]:
    """Inside, the first layer's floors are those of :func:`feature_floors`, the other layers' as ever.

    For small nets, whose layers are in one bank in the order of the model.
    """

    def invert(self: StatisticsBank, values: Any) -> None:
        floor = self.options.var_rel_eps * values.variance.amax(1, keepdim=True) + values.variance
        floor[0] = values.variance[0] * (1 + self.options.var_rel_eps)
        torch.rsqrt(floor + self.options.var_eps, out=values.inv_std)

    with mock.patch.object(StatisticsBank, "_invert", invert):
        yield


@contextmanager
def layer_floors() -> Iterator[None]:
    """Inside, floors are relative to the layer's largest variance in its inputs' own units, folded or not."""
    with mock.patch.object(StatisticsBank, "set_units", return_value=None):
        yield


FAST = 0.9  # ρ of the second memory
# per unit of variance, of the difference of the means of the two memories (ρ = .9 and .99) of independent samples
SPREAD = 0.1 / 1.9 + 0.01 / 1.99 - 2 * 0.1 * 0.01 / (1 - 0.9 * 0.99)
RESTARTS = {"restart at 3": 3.0, "restart at 5": 5.0}


@contextmanager
def restarting(standard_errors: float) -> Iterator[None]:
    """Inside, a memory shortens itself where new samples do not fit.

    Each layer has a second memory, ρ = FAST. Where its mean is more than so many standard errors from the first one's
    (root mean square over the features, in σ̃), the first goes on from the second's mean, variance and mass, and so
    forgets what was before; debiasing then lets it grow long again. A single sample, however large, moves the means
    4.6 standard errors apart and no further, since it is in σ² too.
    """
    propose = StatisticsBank.propose

    def proposed(self: Any, batch: Any, counts: Any = None) -> None:
        if not hasattr(self, "fast_"):
            options = replace(self.options, stat_decay=FAST, step_scale=None)
            self.fast_ = StatisticsBank(
                self.rows, options, device=self.now.mean.device, dtype=self.now.mean.dtype, squared=True, on_host=True
            )
        fast = self.fast_
        gaps = ((fast.now.mean - self.now.mean) * self.now.inv_std).square().sum(1)
        for i, row in enumerate(self.rows):
            if gaps[i] > standard_errors**2 * SPREAD * row.statistics:
                self.restore(i, fast.snapshot(i))
        propose(fast, batch, counts)
        fast.settle(fast.conclude())
        propose(self, batch, counts)

    with mock.patch.object(StatisticsBank, "propose", proposed):
        yield


FOLLOWS = {"following at 1": 1.0, "following at 4": 4.0, "following at 8": 8.0}  # by what factor σ̃ must have changed


@contextmanager
def following_at(ratio: float) -> Iterator[None]:
    """``follow_inputs`` with another band for σ̃, and half of it for μ; at 1 whatever the witnesses let through."""
    with mock.patch.multiple("bnp_optim.following", _RATIO=ratio, _DISTANCE=ratio / 2):
        yield


FOLD = 256  # inputs that fold_normalization sees
MAX_NORM = 1.0  # where clipped contenders clip


@torch.no_grad()
def he_start(model: nn.Module) -> nn.Module:
    """``model``, its convolutions initialized for the ReLU behind them (He et al., ICCV 2015, eq. 10)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


VARIANTS: dict[str, Variant] = {
    "": Variant(),
    "folded": Variant(start=fold_normalization),
    "He": Variant(prepare=he_start),
    "g clipped": Variant(clip=MAX_NORM),
    "folded, g clipped": Variant(start=fold_normalization, clip=MAX_NORM),
    "positions": Variant(prepare=with_positions),
    "feature floors": Variant(feature_floors),
    "geometric floors": Variant(geometric_floors),
    "first floors": Variant(first_floors),
    "layer floors": Variant(layer_floors),
    **{name: Variant(partial(restarting, c)) for name, c in RESTARTS.items()},
    **{name: Variant(partial(following_at, ratio)) for name, ratio in FOLLOWS.items()},
    "without the first": Variant(leaves_out=lambda layers: layers[:1]),
    "without the last": Variant(leaves_out=lambda layers: layers[-1:]),
    "without both": Variant(leaves_out=lambda layers: [layers[0], layers[-1]]),
    "first only": Variant(leaves_out=lambda layers: layers[1:]),
}
