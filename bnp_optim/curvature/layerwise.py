"""The conditioning of each layer: of its input's second moment, before and after P, and of its output gradient.

The layer's block of the Fisher matrix is about the Kronecker product of the two, so its condition number is about their
product (L. Huang et al., Layer-wise Conditioning Analysis, ECCV 2020). BNP changes the first. All eigenvalues are dense
and in float64: exact for the batches given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnp_optim.curvature.batches import Closures, as_batches, loss_of
from bnp_optim.curvature.derivatives import second_derivatives
from bnp_optim.curvature.moments import SecondMoment
from bnp_optim.curvature.vectors import trained
from bnp_optim.discovery import Layer, Use, find_layers
from bnp_optim.layers import Samples, is_readable
from bnp_optim.preconditioner import BNPreconditioner
from bnp_optim.tracking import Tracker
from bnp_optim.transform import Factors, from_z

__all__ = ["LayerConditioning", "layer_conditioning"]


@dataclass(frozen=True, kw_only=True)
class LayerConditioning:
    """The conditioning of one layer. Numbers that do not exist there are NaN.

    ``kappa`` is the largest over the smallest eigenvalue λ, each after ``epsilon · λ_max`` was added; infinite where
    the smallest is zero to rounding (fewer observations than features, or outputs behind a softmax, whose gradients sum
    to zero). ``kappa_p`` is the largest over the one that a ``share`` of the eigenvalues reach. Of a layer with groups:
    the largest over its groups.

    Args:
        name: Of the layer.
        num_observations: Rows that the input's moment averages over: samples × positions.
        num_features: Input features; of a convolution, channels (its patches are not unfolded).
        num_varying: Those that are not constant over the batches. Only these, and the bias's column of ones, count.
        bias: Whether there is such a column.
        lambda_max: Largest eigenvalue of the second moment E[ââᵀ], â = [1; a].
        kappa: Its condition number.
        kappa_p: Its percentile condition number.
        lambda_max_preconditioned: The same three after P, PᵀE[ââᵀ]P. P is the optimizer's, of its running statistics.
        kappa_preconditioned: Condition number.
        kappa_p_preconditioned: Percentile condition number.
        lambda_max_gradient: The same three of E[g gᵀ], g a sample's loss gradient in the layer's output, over the
            outputs whose gradient varies.
        kappa_gradient: Condition number.
        kappa_p_gradient: Percentile condition number.
        share: Of ``kappa_p``.
        epsilon: As given.
    """

    name: str
    num_observations: int
    num_features: int
    num_varying: int
    bias: bool
    lambda_max: float
    kappa: float
    kappa_p: float
    lambda_max_preconditioned: float
    kappa_preconditioned: float
    kappa_p_preconditioned: float
    lambda_max_gradient: float
    kappa_gradient: float
    kappa_p_gradient: float
    share: float
    epsilon: float

    def to_dict(self) -> dict[str, float]:
        """The numbers as plain floats, by field name."""
        return {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "name"}


def layer_conditioning(
    model: nn.Module,
    closures: Closures,
    *,
    preconditioner: BNPreconditioner | None = None,
    share: float = 0.9,
    epsilon: float = 0.0,
) -> dict[str, LayerConditioning]:
    """Measure the conditioning of every layer that a registered adapter can read.

    One forward and one backward pass per closure, and per layer dense eigenvalues: O(N d² + d³) for d features.
    Hooks are removed again; parameters, ``.grad`` and the preconditioner's statistics are left as they are.

    Args:
        model: Whose layers are watched.
        closures: As for :func:`estimate_conditioning`; they must call ``model``.
        preconditioner: For the numbers after P; layers without statistics have none. None: there are none.
        share: Of the eigenvalues, in (0, 1], for ``kappa_p``. 0.9: all but the last tenth.
        epsilon: Added to the eigenvalues, relative to the largest. 0: nothing, the batch's own condition number;
            it is at most 1 + 1/epsilon otherwise, and such a number says what epsilon is.

    Returns:
        Records by layer name, in the model's order; layers that no closure has called are left out.

    Raises:
        TypeError: if closures are of the wrong kind.
        ValueError: if ``share`` or ``epsilon`` is out of its range, there is no closure, or a loss is no finite scalar
            with gradient history.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}, it must be in (0, 1], such as 0.9")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon!r}, it must be at least 0, such as 1e-8")
    batches = as_batches(closures)
    watched = [_Watched(layer, preconditioner) for layer in find_layers(model).layers]
    inputs = trained(model.parameters())
    with ExitStack() as stack:
        if preconditioner is not None:
            stack.enter_context(preconditioner.pause_statistics())
        stack.enter_context(second_derivatives())  # not for those, but compiled modules would not call hooks
        stack.enter_context(_hooked(watched))
        for batch in batches:
            for x in watched:
                x.num_samples = batch.num_samples
            torch.autograd.grad(loss_of(batch), inputs, allow_unused=True)
    return {x.layer.name: x.record(share, epsilon) for x in watched if x.moments}


@contextmanager
def _hooked(watched: list[_Watched]) -> Any:
    handles: list[RemovableHandle] = []
    try:
        for x in watched:
            for use in x.layer.uses:
                handles.append(use.module.register_forward_hook(x.hook(use), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watched:
    """One layer, and what its calls have shown."""

    def __init__(self, layer: Layer, preconditioner: BNPreconditioner | None) -> None:
        self.layer = layer
        self.num_samples: int | None = None
        self.moments: list[SecondMoment] = []  # of the input, by group
        self.gradients: list[SecondMoment] = []
        self.factors: Factors | None = None
        self.bias = layer.bias is not None
        if preconditioner is not None:
            tracker = preconditioner._tracker
            owned = {id(p) for group in preconditioner.param_groups for p in group["params"]}
            self.bias = layer.bias is not None and id(layer.bias) in owned and layer.bias.requires_grad
            self.factors = _factors(layer, tracker)

    def hook(self, use: Use) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # a checkpoint's second forward, inside backward
                return
            kept = use.adapter.keep(module, args, kwargs, output)
            if kept is None or not is_readable(kept):
                return
            with torch.no_grad():
                read = use.adapter.read(module, tuple(x.detach() if isinstance(x, Tensor) else x for x in kept))
            samples = read[use.number] if use.number < len(read) else None
            if samples is None:
                return
            values = self._take(samples)
            # of a module with several weights, the output's gradient belongs to none of them
            if len(read) == 1 and isinstance(output, Tensor) and output.requires_grad:
                size = self.num_samples or samples.size
                channel = output.dim() - (values.dim() - 1)
                # what it returns: nothing, so that the gradient goes on unchanged
                output.register_hook(partial(self._take_gradient, channel, size))  # type: ignore[no-untyped-call]

        return observe

    def _take(self, samples: Samples) -> Tensor:
        if isinstance(samples.values, tuple):
            each = samples.values
        else:
            groups = self.layer.rows.groups
            each = samples.values.chunk(groups, 1) if samples.values.shape[1] % groups == 0 else (samples.values,)
        self.moments = self.moments or [SecondMoment(v.shape[1]) for v in each]
        for moment, v in zip(self.moments, each, strict=True):
            moment.add(v)
        return each[0]

    def _take_gradient(self, channel: int, size: int, grad: Tensor) -> None:
        """``grad`` is that of the mean loss: a sample's own is ``size`` times as large."""
        grad = grad.detach()
        rows = grad.movedim(channel, -1).reshape(-1, grad.shape[channel])
        each = rows.chunk(self.layer.rows.groups, 1)
        self.gradients = self.gradients or [SecondMoment(v.shape[1]) for v in each]
        for moment, v in zip(self.gradients, each, strict=True):
            moment.add(v * size, count=size)

    def record(self, share: float, epsilon: float) -> LayerConditioning:
        raw = [m.matrix(ones=self.bias) for m in self.moments]
        after = [_preconditioned(m, self.factors, i, self) for i, m in enumerate(self.moments)]
        gradient = [m.matrix(ones=False) for m in self.gradients]
        found: dict[str, float] = {}
        for suffix, matrices in (("", raw), ("_preconditioned", after), ("_gradient", gradient)):
            numbers = [_numbers(m, share, epsilon) for m in matrices if m is not None and len(m)]
            worst = [max(column) for column in zip(*numbers, strict=True)] or [math.nan] * 3
            found |= {f"{key}{suffix}": x for key, x in zip(("lambda_max", "kappa", "kappa_p"), worst, strict=True)}
        return LayerConditioning(
            name=self.layer.name,
            num_observations=self.moments[0].count,
            num_features=sum(m.size for m in self.moments),
            num_varying=sum(int(m.varying.sum()) for m in self.moments),
            bias=self.bias,
            share=share,
            epsilon=epsilon,
            **found,
        )


def _factors(layer: Layer, tracker: Tracker) -> Factors | None:
    mine = next((x for x in tracker.layers if x.identity == layer.identity), None)
    return None if mine is None or mine not in tracker.ready else tracker.factors(mine)


def _preconditioned(moment: SecondMoment, factors: Factors | None, group: int, layer: _Watched) -> Tensor | None:
    """``Pᵀ M P`` by the optimizer's own P, channel by channel; None if it has none for such channels."""
    if factors is None:
        return None
    taps = layer.layer.rows.taps
    mean, inv_std = ((v if v.dim() == 1 else v[group])[::taps] for v in (factors.mean, factors.inv_std))
    if len(mean) != moment.size:
        return None
    mean, inv_std, q2, spread = (x.detach().cpu().double() for x in (mean, inv_std, factors.q2, factors.spread))
    # the rows of the identity in z, as rows of weights and biases
    d = moment.size
    ones = int(layer.bias)
    weight = torch.eye(d + ones, dtype=torch.float64)[:, ones:].contiguous()
    bias = torch.eye(d + 1, dtype=torch.float64)[:, 0].contiguous() if layer.bias else None
    from_z(weight, bias, Factors(mean, inv_std, q2, spread))
    rows = weight if bias is None else torch.cat([bias[:, None], weight], 1)
    kept = torch.cat([torch.ones(ones, dtype=torch.bool), moment.varying])
    # a constant feature has no z that is worth a direction: it is held, like the raw moment's
    rows = rows[kept]
    return rows @ moment.whole(ones=layer.bias) @ rows.T


def _numbers(matrix: Tensor, share: float, epsilon: float) -> tuple[float, float, float]:
    """λ_max, κ, κ_p."""
    values = torch.linalg.eigvalsh(matrix).flip(0)
    largest = float(values[0])
    if not largest > 0:
        return largest, math.nan, math.nan
    rounding = len(values) * torch.finfo(values.dtype).eps * largest
    at = min(len(values), math.ceil(share * len(values))) - 1

    def over(smallest: float) -> float:
        below = (smallest if smallest > rounding else 0.0) + epsilon * largest
        return (1 + epsilon) * largest / below if below else math.inf

    return largest, over(float(values[-1])), over(float(values[at]))
