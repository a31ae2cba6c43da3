"""Batch Normalization Preconditioning of one layer: a slow, dense float64 reference.

Every output row of the layer is written as ŵ = [b; w] with input row â = [1; a], and ŵ = P z with

    P = (1/q) U D,   U = [[1, -μᵀ], [0, I]],   D = diag(1, 1/σ̃_1, …, 1/σ̃_m).

A layer whose bias takes no part has the metric μμᵀ + diag σ̃² instead, whose inverse square root is, with
v = μ/σ̃ and r = √(1 + ‖v‖²),

    P = (1/q) diag(1/σ̃) (I − v vᵀ / (r (r + 1))).

Nothing here is fast or shares code with the package: matrices are dense, batches are kept whole until the
end of the step, and patches are cut out one output position at a time.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RowMap = Callable[[Array, Array], Array]  # (P, one row) -> the mapped row

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@dataclass(frozen=True)
class ReferenceLayer:
    """The shape of one layer; `bias` says whether the bias takes part in P."""

    kind: str  # "linear" | "conv" | "transposed"
    weight_shape: tuple[int, ...]  # linear (out, in); conv (out, in/groups, …); transposed (in, out/groups, …)
    bias: bool
    groups: int = 1
    stride: tuple[int, ...] = ()  # empty: 1 for each spatial dimension
    padding: tuple[int, ...] = ()  # empty: 0
    dilation: tuple[int, ...] = ()  # empty: 1
    padding_mode: str = "zeros"  # "zeros" | "reflect" | "replicate" | "circular"
    output_padding: tuple[int, ...] = ()  # transposed; empty: 0

    def __post_init__(self) -> None:
        assert self.kind in ("linear", "conv", "transposed")
        assert self.padding_mode in PAD_MODES
        if self.kind == "linear":
            assert len(self.weight_shape) == 2 and self.groups == 1
            assert not (self.stride or self.padding or self.dilation)
        else:
            assert 1 <= len(self.kernel) <= 3
            assert self.rows % self.groups == 0
            for option in (self.stride, self.padding, self.dilation):
                assert len(option) in (0, len(self.kernel))

    @property
    def rows(self) -> int:
        """Output units (rows of W)."""
        return self.weight_shape[1] * self.groups if self.kind == "transposed" else self.weight_shape[0]

    @property
    def group_channels(self) -> int:
        """Input channels that one group sees."""
        return self.weight_shape[0] // self.groups if self.kind == "transposed" else self.weight_shape[1]

    @property
    def channels(self) -> int:
        """Input channels of the whole layer."""
        return self.group_channels * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per spatial dimension; empty for a linear layer."""
        return self.weight_shape[2:]

    @property
    def taps(self) -> int:
        """K, the kernel taps of one channel; 1 for a linear layer."""
        return math.prod(self.kernel)

    @property
    def fan_in(self) -> int:
        """m (and n of the q² formulas): weights in one row, without the bias."""
        return self.group_channels * self.taps

    @property
    def statistics(self) -> int:
        """How many means are kept: one per channel; transposed convolutions have one per channel and tap."""
        return self.channels * self.taps if self.kind == "transposed" else self.channels

    def group_of_row(self, row: int) -> int:
        """The group to which an output unit belongs."""
        return row // (self.rows // self.groups)

    def row(self, w: Array, row: int) -> Array:
        """The weights of one output unit, as a view of `w`: (in, ...) or (in/groups, *kernel)."""
        if self.kind != "transposed":
            return w[row]
        group, unit = divmod(row, self.rows // self.groups)
        return w[group * self.group_channels : (group + 1) * self.group_channels, unit]

    def patches(self, x: Array, group: int) -> Array:
        """Rows a of one group, without the leading 1: (observations, m) or (samples × output positions, m).

        `x` is (N, in) for a linear layer and (N, C, *spatial) for a convolution.  The entries of a row are in
        the order of weight[row].reshape(-1): channel of the group first, then the taps in C order.
        """
        if self.kind == "linear":
            return x
        dims = len(self.kernel)
        stride = self.stride or (1,) * dims
        padding = self.padding or (0,) * dims
        dilation = self.dilation or (1,) * dims

        first = group * self.group_channels
        x = x[:, first : first + self.group_channels]
        if self.kind == "transposed":
            return self._transposed_patches(x, stride, padding, dilation)
        pad_width = [(0, 0), (0, 0)] + [(p, p) for p in padding]
        x = np.pad(x, pad_width, mode=PAD_MODES[self.padding_mode])  # type: ignore[call-overload]

        reach = [d * (k - 1) + 1 for d, k in zip(dilation, self.kernel, strict=True)]
        out = [(size - r) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
        rows = []
        for sample in x:
            for position in itertools.product(*(range(size) for size in out)):
                window = tuple(
                    slice(p * s, p * s + r, d) for p, s, r, d in zip(position, stride, reach, dilation, strict=True)
                )
                rows.append(sample[(slice(None), *window)].reshape(-1))
        return np.array(rows, dtype=np.float64).reshape(-1, self.fan_in)

    def _transposed_patches(
        self, x: Array, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> Array:
        """Tap k sees input i at output position i·stride − padding + k·dilation, and zeros elsewhere."""
        extra = self.output_padding or (0,) * len(self.kernel)
        sizes = x.shape[2:]
        out = [
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(sizes, stride, padding, dilation, self.kernel, extra, strict=True)
        ]
        seen = np.zeros((x.shape[0], *out, self.group_channels, *self.kernel))
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            for i in itertools.product(*(range(n) for n in sizes)):
                o = tuple(a * s - p + k * d for a, s, p, k, d in zip(i, stride, padding, tap, dilation, strict=True))
                if all(0 <= a < n for a, n in zip(o, out, strict=True)):
                    seen[(slice(None), *o, slice(None), *tap)] = x[(slice(None), slice(None), *i)]
        return seen.reshape(-1, self.fan_in)

    def occupancy(self, sizes: tuple[int, ...]) -> Array:
        """Per tap, the share of output positions at which it sees an input, (taps,)."""
        ones = np.ones((1, self.channels, *sizes))
        return np.array(self.patches(ones, 0).reshape(-1, self.group_channels, self.taps)[:, 0].mean(axis=0))


class ReferenceBNP:
    """Statistics μ, σ², σ̃ and q² of one layer, and the three maps P Pᵀ g, Pᵀ g and P Δz.

    Before the first commit μ = 0, σ² = 1, q² = 1, whether or not `debias` is set: with it r_1 = 0, so the
    first step replaces these values completely.
    """

    def __init__(
        self,
        layer: ReferenceLayer,
        *,
        stat_decay: float = 0.99,
        var_rel_eps: float = 1e-2,
        var_eps: float = 1e-4,
        step_scale: str | None = "trace",
        debias: bool = True,
        variance: str = "total",
        direction: ArrayLike | None = None,
    ) -> None:
        assert step_scale in (None, "fan_in", "trace", "common", "spectral")
        assert variance in ("total", "batch")
        assert 0 <= stat_decay < 1
        self.layer = layer
        self.stat_decay = stat_decay
        self.var_rel_eps = var_rel_eps
        self.var_eps = var_eps
        self.step_scale = step_scale
        self.debias = debias
        self.variance_kind = variance

        self.steps = 0
        self.mean: Array = np.zeros(layer.statistics)
        self.variance: Array = np.ones(layer.statistics)
        self.sigma: Array = self._damped_sigma()
        self.q2 = 1.0

        # u of the power step, in weight coordinates, one row per group
        self.direction: Array | None = None
        if step_scale == "spectral":
            assert direction is not None
            self.direction = np.array(direction, dtype=np.float64)
            assert self.direction.shape == (layer.groups, layer.fan_in + layer.bias)
        self._clear_pending()

    # ---- statistics ---------------------------------------------------------------------------------

    def observe(self, x: ArrayLike, samples: int | None = None) -> None:
        """Add one micro-batch of the layer's raw input to the samples of the pending step.

        `samples` is what it adds to N, if not the size of the first dimension (1 without a batch).
        """
        layer = self.layer
        a = np.array(x, dtype=np.float64)
        if layer.kind == "linear":
            first = 1 if a.ndim == 1 else a.shape[0]
            assert a.shape[-1] == layer.channels
            a = a.reshape(-1, layer.channels)
            observations = a
        else:
            if a.ndim == 1 + len(layer.kernel):
                a = a[np.newaxis]
            assert a.ndim == 2 + len(layer.kernel) and a.shape[1] == layer.channels
            first = a.shape[0]
            # statistics see every position of the input itself, not of the padded input
            observations = np.moveaxis(a, 1, -1).reshape(-1, layer.channels)
        self._observations.append(observations)
        self._samples += first if samples is None else samples
        if layer.kind == "transposed":
            self._occupancy = layer.occupancy(a.shape[2:])

        if self.direction is not None:
            for group in range(layer.groups):
                a_hat = layer.patches(a, group)
                if layer.bias:
                    a_hat = np.concatenate([np.ones((a_hat.shape[0], 1)), a_hat], axis=1)
                y = a_hat @ self.direction[group]
                self._z[group] += a_hat.T @ y
                self._yy[group] += y @ y
            self._patch_rows += a_hat.shape[0]  # the same for every group

    def commit(self) -> None:
        """End the step: pending samples become μ, σ², σ̃ and q²; without any, everything stays."""
        observations = np.concatenate([np.zeros((0, self.layer.channels)), *self._observations])
        if observations.shape[0] > 0:
            self.steps += 1
            self._update_statistics(observations)
            self.sigma = self._damped_sigma()
            self.q2 = self._step_scale(observations)
        self._clear_pending()

    def _clear_pending(self) -> None:
        self._observations: list[Array] = []
        self._samples = 0
        self._patch_rows = 0
        self._z: Array = np.zeros((self.layer.groups, self.layer.fan_in + self.layer.bias))
        self._yy: Array = np.zeros(self.layer.groups)

    def _update_statistics(self, observations: Array) -> None:
        """μ ← μ + (1−r)δ; σ² ← rσ² + (1−r)(σ_A² + rδ²) ("total") or rσ² + (1−r)σ_A² ("batch")."""
        mean_a = self._expectation(observations)
        var_a = self._expectation(observations, mean_a)
        rho, t = self.stat_decay, self.steps
        r = rho * (1 - rho ** (t - 1)) / (1 - rho**t) if self.debias else rho
        delta = mean_a - self.mean
        self.mean = self.mean + (1 - r) * delta
        if self.variance_kind == "total":
            self.variance = r * self.variance + (1 - r) * (var_a + r * delta**2)
        else:
            self.variance = r * self.variance + (1 - r) * var_a

    def _expectation(self, observations: Array, center: Array | None = None) -> Array:
        """E a, or E (a − center)², per statistic; a tap of a transposed convolution sees `a` or else a zero."""
        if self.layer.kind != "transposed":
            return np.array((observations if center is None else (observations - center) ** 2).mean(axis=0))
        seen = np.repeat(observations, self.layer.taps, axis=1)
        o = np.tile(self._occupancy, self.layer.channels)
        if center is None:
            return np.array(o * seen.mean(axis=0))
        return np.array(o * ((seen - center) ** 2).mean(axis=0) + (1 - o) * center**2)

    def _damped_sigma(self) -> Array:
        """σ̃ from σ̃² = σ² + ε1·max_j σ_j² + ε2, the maximum over all channels of the layer."""
        sigma: Array = np.sqrt(self.variance + self.var_rel_eps * self.variance.max() + self.var_eps)
        return sigma

    def _step_scale(self, observations: Array) -> float:
        """q² of this step; μ and σ̃ are the just committed ones, N the number of samples."""
        layer = self.layer
        if self.step_scale is None:
            return 1.0
        if self.step_scale == "fan_in":
            return max(layer.fan_in / self._samples, 1.0)
        if self.step_scale in ("trace", "common"):  # of one layer the mean is its own
            second_moment = self._expectation(observations, self.mean)
            weights = layer.fan_in * layer.groups / layer.statistics  # of a row, that share a statistic
            trace = 1.0 + weights / layer.groups * float((second_moment / self.sigma**2).sum())
            return max(trace / self._samples, 1.0)
        return self._power_step()

    def _power_step(self) -> float:
        """λ̂_g = ‖Pᵀz_g‖²/(rows·‖y_g‖²), P the new one at q = 1; then v = Pᵀz/‖Pᵀz‖ and u = P v."""
        assert self.direction is not None
        largest = 0.0
        for group in range(self.layer.groups):
            if self._yy[group] == 0:
                continue  # λ̂_g = 0, and there is no new direction
            p = self._unscaled_P(group)
            pz = p.T @ self._z[group]
            largest = max(largest, float(pz @ pz / (self._patch_rows * self._yy[group])))
            norm = float(np.linalg.norm(pz))
            if norm > 0:
                self.direction[group] = p @ (pz / norm)
        return max(largest, 1.0)

    # ---- the matrix and the maps --------------------------------------------------------------------

    def _unscaled_P(self, group: int) -> Array:
        """P at q = 1 for one output row of `group`."""
        layer = self.layer
        each = layer.statistics // layer.groups
        of_group = slice(group * each, (group + 1) * each)
        # all taps of a channel share its statistics, and a channel's taps are adjacent in a row
        m = layer.fan_in
        mu = np.repeat(self.mean[of_group], m // each)
        sigma = np.repeat(self.sigma[of_group], m // each)
        if not layer.bias:
            v = mu / sigma
            r = math.sqrt(1.0 + float(v @ v))
            return np.diag(1.0 / sigma) @ (np.eye(m) - np.outer(v, v) / (r * (r + 1.0)))
        u = np.eye(1 + m)
        u[0, 1:] = -mu
        d = np.diag(np.concatenate([[1.0], 1.0 / sigma]))
        return u @ d

    def dense_P(self, group: int) -> Array:
        """P for one output row of `group`: (1+m, 1+m), bias first, or the rank-one (m, m) without bias."""
        return self._unscaled_P(group) / math.sqrt(self.q2)

    def gradient_form(self, G_w: ArrayLike, G_b: ArrayLike | None) -> tuple[Array, Array | None]:
        """P Pᵀ g, one output row at a time."""
        return self._map_rows(G_w, G_b, lambda p, g: p @ (p.T @ g))

    def to_z(self, G_w: ArrayLike, G_b: ArrayLike | None) -> tuple[Array, Array | None]:
        """Pᵀ g, one output row at a time."""
        return self._map_rows(G_w, G_b, lambda p, g: p.T @ g)

    def from_z(self, D_w: ArrayLike, D_b: ArrayLike | None) -> tuple[Array, Array | None]:
        """P Δz, one output row at a time."""
        return self._map_rows(D_w, D_b, lambda p, dz: p @ dz)

    def _map_rows(self, w: ArrayLike, b: ArrayLike | None, apply: RowMap) -> tuple[Array, Array | None]:
        layer = self.layer
        w = np.array(w, dtype=np.float64)
        assert w.shape == layer.weight_shape
        assert (b is not None) == layer.bias
        out_w = np.zeros(layer.weight_shape)
        out_b = None
        if b is not None:
            b = np.array(b, dtype=np.float64)
            assert b.shape == (layer.rows,)
            out_b = np.zeros(layer.rows)
        for row, p in self._row_matrices():
            hat = layer.row(w, row).reshape(-1)
            if b is not None:
                hat = np.concatenate([b[row : row + 1], hat])
            result = apply(p, hat)
            if out_b is not None:
                out_b[row] = result[0]
                result = result[1:]
            out = layer.row(out_w, row)
            out[...] = result.reshape(out.shape)
        return out_w, out_b

    def _row_matrices(self) -> Iterator[tuple[int, Array]]:
        """(output row, its P); P is built once per group because it depends on the group alone."""
        matrices = [self.dense_P(group) for group in range(self.layer.groups)]
        for row in range(self.layer.rows):
            yield row, matrices[self.layer.group_of_row(row)]
