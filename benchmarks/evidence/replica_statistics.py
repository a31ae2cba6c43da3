"""BNP's statistics of many small nets at once, one sample at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.evidence.contenders import Contender
from benchmarks.evidence.variants import FAST, FOLLOWS, RESTARTS, SPREAD

OPTIONS = {  # those that are written out
    "stat_decay", "var_rel_eps", "var_eps", "step_scale", "debias", "max_norm", "follow_inputs",
}  # fmt: skip
VARIANTS = {"", "feature floors", "geometric floors", "first floors", "layer floors", *RESTARTS, *FOLLOWS}


class Statistics:
    """Of one layer, (replicas, inputs).

    Args:
        first: Whether it is the net's first layer.
        units: Of a fold, (replicas, inputs).
        decay: ρ, in place of the contender's.
    """

    def __init__(
        self, contender: Contender, mean: Tensor, first: bool, units: Tensor | None = None, decay: float | None = None
    ) -> None:
        options = dict(contender.bnp or ())
        self.variant, self.first = contender.variant, first
        self.units = None if contender.variant == "layer floors" else units
        self.decay = options.get("stat_decay", 0.99) if decay is None else decay
        self.rel, self.eps = options.get("var_rel_eps", 1e-2), options.get("var_eps", 1e-4)
        self.bounded = options.get("step_scale", "trace") is not None
        self.debias = options.get("debias", True)
        self.mean = mean
        self.variance = torch.zeros_like(mean) if self.debias else torch.ones_like(mean)
        self.mass: float | Tensor = 0.0  # a tensor, (replicas, 1), where replicas differ
        self.count = 0
        self.origin: Tensor | None = None
        self.ratio = FOLLOWS.get(contender.variant, 2.0)
        self.fast = None
        if decay is None and contender.variant in RESTARTS:
            self.fast = Statistics(contender, torch.zeros_like(mean), first, units, FAST)

    @property
    def single(self) -> bool:
        """Whether σ² rests on one sample, so that what a gradient shows of deviations is rounding."""
        return self.debias and self.count == 1

    def update(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in one sample; returns a − μ (0 while single), 1/σ̃², and q²."""
        if self.fast is not None:
            self._restart(self.fast)
            self.fast.update(a)
        self.count += 1
        self.mass = self.decay * self.mass + 1
        gain = 1 / self.mass if self.debias else 1 - self.decay
        r = 1 - gain
        delta = a - self.mean
        square = delta.square()
        self.mean = self.mean + gain * delta
        self.variance = r * self.variance + (r * gain) * square
        inverse = self._floored().reciprocal_()
        q2 = 1 + (r * r) * (square * inverse).sum(1, keepdim=True) if self.bounded else torch.ones_like(a[:, :1])
        return (torch.zeros_like(delta) if self.single else r * delta), inverse, q2

    def follow(self, sample: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Express the weights anew where the statistics have left ``origin``: see bnp_optim/following.py."""
        now = torch.stack((self.mean, self._floored()))
        if self.origin is None or self.mass * (1 - self.decay) < 0.5:
            self.origin, self.beyond, self.went = now, torch.zeros_like(self.mean), torch.zeros_like(self.mean).bool()
            return
        mean, square = self.origin
        growth = (now[1] / square).sqrt()
        left = (growth > self.ratio) | ((now[0] - mean).square() > (self.ratio / 2) ** 2 * square)
        far = (sample - mean).square() > 4 * (square * now[1]).sqrt()
        self.beyond = (self.beyond + 1) * (left & far)
        grown = self.beyond >= 3
        self.went = self.went | grown
        moved = grown | ((growth < 1 / self.ratio) & self.went)
        if bool(moved.any()):
            new = torch.where(moved.unsqueeze(1), weight / growth.unsqueeze(1), weight)
            bias.add_(
                torch.bmm(weight, (mean * moved).unsqueeze(2)).squeeze(2)
                - torch.bmm(new, (now[0] * moved).unsqueeze(2)).squeeze(2)
            )
            weight.copy_(new)
            self.origin, self.beyond = torch.where(moved, now, self.origin), self.beyond * ~moved
            if self.units is not None:
                self.units = torch.where(moved, now[1], self.units)

    def _restart(self, fast: Statistics) -> None:
        """See :func:`benchmarks.evidence.variants.restarting`."""
        surprise = ((fast.mean - self.mean).square() / self._floored()).mean(1, keepdim=True)
        over = surprise > RESTARTS[self.variant] ** 2 * SPREAD
        if bool(over.any()):
            self.mean = torch.where(over, fast.mean, self.mean)
            self.variance = torch.where(over, fast.variance, self.variance)
            self.mass = torch.where(over, fast.mass, self.mass)

    def _floored(self) -> Tensor:
        variance = self.variance
        if self.variant == "feature floors" or (self.variant == "first floors" and self.first):
            return variance * (1 + self.rel) + self.eps
        if self.variant == "geometric floors":
            return variance + self.rel * (variance + self.eps).log().mean(1, keepdim=True).exp() + self.eps
        if self.units is not None:
            return variance + self.rel * (variance / self.units).amax(1, keepdim=True) * self.units + self.eps
        return variance + self.rel * variance.amax(1, keepdim=True) + self.eps
