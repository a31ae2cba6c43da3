"""``mean_field_fisher``: trace, spectrum's moments and largest eigenvalue of a random network's Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bnp_optim.checks import check_choice, check_number
from bnp_optim.curvature import max_learning_rate
from bnp_optim.theory.activations import Activation, as_activation
from bnp_optim.theory.propagation import Average, Layer, Norm, Piece, Weights, propagate

__all__ = ["MeanFieldFisher", "fisher_of", "mean_field_fisher"]

Normalization = Literal["none", "batch", "batch_frozen"]
ActivationLike: TypeAlias = "str | Activation | nn.Module | Callable[[Tensor], Tensor]"


@dataclass(frozen=True, kw_only=True)
class MeanFieldFisher:
    """What mean-field theory predicts of ``F = (1/T) Σ_k Σ_t ∇f_k(t)∇f_k(t)ᵀ`` of a wide random network.

    Per output, F has the eigenvalues of the T × T kernel K/T, and to leading order in the width K is κ1 on the diagonal
    and κ2 beside it: one eigenvalue along the mean, T - 1 in the bulk. It holds for weights as drawn, not as trained.

    Args:
        layers: Per layer the recursions' q, q̂, q̃ and its part of the kernel.
        kernel_same: ``K(t, t)``, the paper's ακ1·M.
        kernel_different: ``K(s, t)``, ακ2·M.
        num_samples: T.
        num_outputs: C.
        num_parameters: P, those that are trained.
        width: M, the inputs of the last layer.
        bulk_edge: Where the bulk ends: each layer's part of (κ1 - κ2)/T times (1 + √(T/fan-in))², as if it were a
            Wishart matrix. *Ours*, an estimate.
        normalization: "none", "batch", "batch_frozen", or "mixed".
        centered_output: Whether each output's mean over the samples is taken out.
        unread: What of a model did not enter, in words.
    """

    layers: tuple[Layer, ...]
    kernel_same: float
    kernel_different: float
    num_samples: int
    num_outputs: int
    num_parameters: int
    width: float
    bulk_edge: float
    normalization: str
    centered_output: bool = False
    unread: tuple[str, ...] = ()

    @property
    def alpha_kappa1(self) -> float:
        """``ακ1 = Σ_l α_(l-1) q̃1^l q̂1^(l-1)``, with α_l the widths over M."""
        return self.kernel_same / self.width

    @property
    def alpha_kappa2(self) -> float:
        """``ακ2``."""
        return self.kernel_different / self.width

    @property
    def trace(self) -> float:
        """``Σ λ = C·ακ1·M``."""
        return self.num_outputs * self.kernel_same

    @property
    def sum_of_squares(self) -> float:
        """``Σ λ² = C·(ακ1² + (T-1) ακ2²) M²/T``."""
        t = self.num_samples
        return self.num_outputs * (self.kernel_same**2 + (t - 1) * self.kernel_different**2) / t

    @property
    def mean_eigenvalue(self) -> float:
        """``m_λ``, the mean over all P eigenvalues, almost all of which are zero."""
        return self.trace / self.num_parameters

    @property
    def second_moment(self) -> float:
        """``s_λ``, the mean of λ² over all P eigenvalues."""
        return self.sum_of_squares / self.num_parameters

    @property
    def outlier(self) -> float:
        """``αM((T-1)/T·κ2 + κ1/T)``, the eigenvalue along the mean over the samples, C-fold."""
        t = self.num_samples
        return ((t - 1) * self.kernel_different + self.kernel_same) / t

    @property
    def lambda_max(self) -> float:
        """The outlier, the papers' λ_max, or the bulk's edge where that is larger (κ2 ≈ 0, centered outputs)."""
        return max(self.outlier, self.bulk_edge)

    @property
    def outlier_leads(self) -> bool:
        """Whether ``lambda_max`` is the papers' formula (True) or our estimate of the bulk's edge (False)."""
        return self.outlier >= self.bulk_edge

    def max_learning_rate(self, momentum: float = 0.0) -> float:
        """``η_max = 2(1+β)/λ_max`` of gradient descent with heavy-ball momentum β on (1/2T) Σ ‖y - f‖²."""
        return max_learning_rate(self.lambda_max, momentum=momentum)

    def __str__(self) -> str:
        head = f"{len(self.layers)} layers, {self.num_parameters} parameters, normalization {self.normalization}"
        head += ", centered output" if self.centered_output else ""
        law = "(T-1)/T·κ2 + κ1/T" if self.outlier_leads else "the bulk's edge, an estimate"
        lines = [
            f"Mean-field Fisher matrix: {head}, T = {self.num_samples}, C = {self.num_outputs}, M = {self.width:g}",
            f"ακ1 {self.alpha_kappa1:.4g}  ακ2 {self.alpha_kappa2:.4g}  trace {self.trace:.4g}  Σλ² "
            f"{self.sum_of_squares:.4g}",
            f"λ_max {self.lambda_max:.4g} ({law})  η_max {self.max_learning_rate():.4g}, with momentum 0.9 "
            f"{self.max_learning_rate(0.9):.4g}",
        ]
        names = ("layer", "fan-in", "q1", "q2", "q̂1", "q̂2", "q̃1", "q̃2", "K(t,t)", "K(s,t)")
        rows = [names]
        for x in self.layers:
            numbers = (x.fan_in, x.q1, x.q2, x.q1_hat, x.q2_hat, x.q1_tilde, x.q2_tilde)
            kernel = (x.diagonal + x.centered, x.off_diagonal)
            rows.append((x.name, *(f"{v:.4g}" for v in (*numbers, *kernel))))  # type: ignore[arg-type]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, *(f"not read: {note}" for note in self.unread)])


def mean_field_fisher(
    widths: int | Sequence[int],
    activation: ActivationLike = "relu",
    *,
    num_samples: int,
    num_outputs: int = 1,
    depth: int | None = None,
    alphas: Sequence[float] | None = None,
    weight_variance: float | Sequence[float] = 2.0,
    bias_variance: float | Sequence[float] = 0.0,
    normalization: Normalization = "none",
    gamma: float = 1.0,
    centered_output: bool = False,
    kernel_taps: int | Sequence[int] = 1,
    positions: int = 1,
    head: Literal["average", "flatten"] = "average",
    input_moment: float = 1.0,
    input_overlap: float = 0.0,
) -> MeanFieldFisher:
    """Predict the Fisher matrix of a random network with L layers of weights and linear outputs.

    R. Karakida, S. Akaho, S. Amari, AISTATS 2019 (arXiv 1806.01316) for plain nets and, with ``centered_output``,
    NeurIPS 2019 (1906.02926); M. Wei, J. Stokes, D. Schwab (1903.02606) for BatchNorm; convolutions derived here
    (:mod:`bnp_optim.theory.propagation`). Leading order in the widths; computed in float64 on the CPU.

    Args:
        widths: ``M_0, …, M_(L-1)``: the inputs and the hidden widths (channels, for convolutions); or one M for all.
        activation: φ: a name such as "relu", "tanh", "erf", "linear", a module, an :class:`Activation`, or a smooth
            callable on tensors.
        num_samples: T.
        num_outputs: C.
        depth: L, with a single M.
        alphas: ``α_0, …, α_(L-1)``, with a single M: the widths are α_l·M.
        weight_variance: σw², the variance of a weight *times its fan-in*, 2 as in He's initialization; one, or one per
            layer.
        bias_variance: σb², the variance of a bias.
        normalization: "batch": BatchNorm after every layer of weights but the last, differentiated through the batch's
            statistics, as it trains; then only the last layer has a part in K(s, t). "batch_frozen": the same with
            statistics held constant. "none".
        gamma: BatchNorm's γ, not trained; its β is 0.
        centered_output: Each output's mean over the samples is taken out (``bnp_optim.nn.OutputCentering``).
        kernel_taps: Of the convolutions that all layers but the last then are; circular padding, any stride.
        positions: Of the last feature map.
        head: The last layer sees their mean ("average"), or all of them ("flatten").
        input_moment: ``q̂1⁰``, the mean square of an input.
        input_overlap: ``q̂2⁰``, the mean product of the same input of two samples: 0 for inputs N(0, I).

    Raises:
        ValueError: for widths, variances or counts that are not positive (σb² may be 0), unknown names, a lone sample
            with BatchNorm or a centered output, and combinations without meaning.
        TypeError: if an argument is no number.
    """
    fan_ins = _widths(widths, depth, alphas)
    count = len(fan_ins)
    check_choice("normalization", normalization, ("none", "batch", "batch_frozen"))
    check_choice("head", head, ("average", "flatten"))
    check_count("num_outputs", num_outputs)
    check_count("positions", positions)
    check_number("gamma", gamma, lambda g: g != 0 and math.isfinite(g), "finite and not 0")
    taps = [*_per_layer("kernel_taps", kernel_taps, max(count - 1, 0)), 1]
    for k in taps:
        check_count("kernel_taps", k)
    w, b = (
        _per_layer(*named, count) for named in (("weight_variance", weight_variance), ("bias_variance", bias_variance))
    )
    for value in w:
        check_number("weight_variance", value, lambda x: x > 0 and math.isfinite(x), _POSITIVE)
    for value in b:
        check_number("bias_variance", value, lambda x: x >= 0 and math.isfinite(x), "a variance, of at least 0")
    phi = as_activation(activation)
    pieces: list[Piece] = []
    units = [*fan_ins[1:], num_outputs]
    for i in range(count):
        last = i == count - 1
        fan_in = fan_ins[i] * taps[i]
        if last and positions > 1:
            if head == "average":
                pieces.append(Average(positions))
            else:
                fan_in *= positions
        pieces.append(Weights(fan_in, w[i], b[i], round((fan_in + 1) * units[i]), name=str(i + 1)))
        if not last:
            if normalization != "none":
                pieces.append(Norm(gamma**2, normalization == "batch_frozen", positions=positions))
            pieces.append(phi)
    return fisher_of(
        pieces,
        num_samples=num_samples,
        num_outputs=num_outputs,
        centered_output=centered_output,
        input_moment=input_moment,
        input_overlap=input_overlap,
    )


_POSITIVE = "positive and finite: the variance of a weight times its fan-in"


def fisher_of(
    pieces: Sequence[Piece],
    *,
    num_samples: int,
    num_outputs: int,
    centered_output: bool,
    input_moment: float,
    input_overlap: float,
    unread: tuple[str, ...] = (),
) -> MeanFieldFisher:
    """The prediction for any sequence of pieces that ends in one output per unit; see :func:`mean_field_fisher`."""
    check_count("num_samples", num_samples)
    norms = [piece for piece in pieces if isinstance(piece, Norm)]
    if num_samples < 2 and (norms or centered_output):
        what = "BatchNorm has no meaning on" if norms else "centering leaves nothing of"
        raise ValueError(f"num_samples is {num_samples}: {what} one sample, take at least 2")
    check_number("input_moment", input_moment, lambda q: q > 0 and math.isfinite(q), "positive: a mean square")
    check_number("input_overlap", input_overlap, lambda q: abs(q) <= input_moment, "within ±input_moment")
    with torch.device("cpu"), torch.no_grad():
        layers = propagate(pieces, input_moment, input_overlap)
    t = num_samples
    same = sum(x.diagonal + x.centered for x in layers)
    apart = [(x.centered - x.along) / max(1, t - 1) for x in layers]
    different = sum(x.off_diagonal for x in layers) - sum(apart)
    edge = sum(
        (x.diagonal + x.centered - x.off_diagonal + a) / t * (1 + math.sqrt(t / x.fan_in)) ** 2
        for x, a in zip(layers, apart, strict=True)
    )
    if centered_output:
        gap = same - different
        same, different = gap * (t - 1) / t, -gap / t
    kinds = {"batch_frozen" if n.frozen else "batch" for n in norms}
    weights = [piece for piece in pieces if isinstance(piece, Weights)]
    return MeanFieldFisher(
        layers=tuple(layers),
        kernel_same=same,
        kernel_different=different,
        num_samples=t,
        num_outputs=num_outputs,
        num_parameters=sum(x.parameters for x in weights if x.trained),
        width=weights[-1].fan_in,
        bulk_edge=edge,
        normalization=kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "none",
        centered_output=centered_output,
        unread=unread,
    )


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, it must be a whole number of at least 1")
    if value < 1:
        raise ValueError(f"{name} is {value}, it must be at least 1")


def _widths(widths: int | Sequence[int], depth: int | None, alphas: Sequence[float] | None) -> list[float]:
    """``M_0, …, M_(L-1)``."""
    if isinstance(widths, int):
        check_count("widths", widths)
        if (depth is None) == (alphas is None):
            raise ValueError(f"widths is the number {widths}: give either depth, or alphas with one factor per layer")
        if depth is not None:
            check_count("depth", depth)
        factors = [1.0] * depth if depth is not None else list(alphas or ())
        found = [float(widths * a) for a in factors]
    else:
        if depth is not None or alphas is not None:
            raise ValueError("widths is a sequence, whose length is the depth: leave depth and alphas out")
        found = [float(m) for m in widths]
    if not found or not all(m >= 1 and math.isfinite(m) for m in found):
        raise ValueError(f"widths is {widths!r}, all widths must be at least 1, and there must be one per layer")
    return found


def _per_layer(name: str, value: Any, count: int) -> list[Any]:
    """One value for each layer."""
    if isinstance(value, (int, float)):
        return [value] * count
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != count:
        raise ValueError(f"{name} is {value!r}, it must be a number or a sequence of {count}, one per layer")
    return list(value)
