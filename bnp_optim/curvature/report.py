"""The result of ``estimate_conditioning``: numbers, what they may be taken for, a table and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from bnp_optim.curvature.quadrature import SpectralDensity

__all__ = ["ConditioningReport"]

_NAMES = {"hessian": "H", "gauss_newton": "G"}


@dataclass(frozen=True, kw_only=True)
class ConditioningReport:
    """The conditioning of a curvature matrix A: of H or G, or of SᵀHS in the coordinates ``w = S z``.

    Numbers that were not estimated (without probes), or have no meaning, are NaN.

    Args:
        lambda_max: Largest Ritz value: a lower bound of λ_max, exact to ``ritz_residual``.
        lambda_min: Smallest Ritz value: an upper bound of λ_min; λ_min itself only if ``lambda_min_converged``.
        ritz_residual: An eigenvalue is at most so far from ``lambda_max``.
        lambda_max_converged: Whether the estimated error of ``lambda_max`` is within the tolerance of |λ|max.
        lambda_min_residual: An eigenvalue is at most so far from ``lambda_min``.
        lambda_min_converged: Whether that residual is within the tolerance of |lambda_min|.
        kappa_mean: ``λ_max · n / Σ|λ|``, the headline: how far the steepest direction is from the average one.
        kappa_mean_error: Its standard error over the probes (the λ's own convergence is not in it).
        kappa_q90: |λ|max over the 0.9 quantile of |λ|. A tenth of the directions are steeper than that quantile.
        kappa_q90_error: Its standard error (jackknife over the probes).
        kappa_q75: The same for the 0.75 quantile, and rougher.
        kappa_q75_error: Its standard error.
        kappa_lower_bound: |λ|max over the smallest *converged* |Ritz value|; the condition number is at least so
            large, and how much larger cannot be known from products.
        negative_ratio: ``|λ_min|/λ_max`` where λ_min < 0, else 0: how far from convex.
        max_learning_rate: 2/λ_max, an upper estimate of gradient descent's stable rate in these coordinates;
            :func:`max_learning_rate` has it for momentum and Adam.
        num_samples: Samples that the matrix is the mean over; None if the closures came without. A minibatch's λ_max
            is biased upward.
        num_products: Matrix-vector products made.
        seconds: Wall clock.
        matrix: "hessian" or "gauss_newton".
        preconditioned: Whether it is taken in other coordinates than the parameters.
        coordinates: Which; "" for the parameters themselves.
        method: "double backward", or "finite differences: …" with the reason.
        num_parameters: ``n``.
        num_steps: Lanczos steps per probe, at most n.
        num_probes: Random vectors; 0 if only extreme eigenvalues were estimated.
        notes: What else a reader should know.
        density: The distribution, for :meth:`plot`; None without probes.
    """

    lambda_max: float
    lambda_min: float
    ritz_residual: float
    lambda_max_converged: bool
    lambda_min_residual: float
    lambda_min_converged: bool
    kappa_mean: float
    kappa_mean_error: float
    kappa_q90: float
    kappa_q90_error: float
    kappa_q75: float
    kappa_q75_error: float
    kappa_lower_bound: float
    negative_ratio: float
    max_learning_rate: float
    num_samples: int | None
    num_products: int
    seconds: float
    matrix: str
    preconditioned: bool
    coordinates: str
    method: str
    num_parameters: int
    num_steps: int
    num_probes: int
    notes: tuple[str, ...] = ()
    density: SpectralDensity | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, float]:
        """The numbers as plain floats by field name, for loggers; flags are 0 and 1, what is unknown is NaN."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["num_samples"] = math.nan if self.num_samples is None else self.num_samples
        return {name: float(x) for name, x in values.items() if isinstance(x, (bool, int, float))}

    def __str__(self) -> str:
        rows = [(name, _number(getattr(self, name)), error, remark) for name, error, remark in self._table()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [self._title()]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[3]]).rstrip())
        return "\n".join([*lines, *self._remarks()])

    def _title(self) -> str:
        name = _NAMES.get(self.matrix, self.matrix)
        what = f"Sᵀ{name}S" if self.preconditioned else name
        samples = "an unknown number of" if self.num_samples is None else str(self.num_samples)
        return f"{what} ({self.matrix}), {self.num_parameters} parameters, mean over {samples} samples"

    def _table(self) -> list[tuple[str, str, str]]:
        at_least = "" if self.lambda_max_converged else "not converged: a lower bound"
        at_most = "" if self.lambda_min_converged else "not converged: an upper bound"
        rows = [
            ("lambda_max", _error(self.ritz_residual), at_least),
            ("lambda_min", _error(self.lambda_min_residual), at_most),
            ("max_learning_rate", "", "2/lambda_max, at most"),
            ("negative_ratio", "", "|lambda_min|/lambda_max where negative"),
        ]
        if self.num_probes:
            rows += [
                ("kappa_mean", _error(self.kappa_mean_error), "lambda_max over the mean |lambda|"),
                ("kappa_q90", _error(self.kappa_q90_error), "|lambda|_max over the 0.9 quantile of |lambda|"),
                ("kappa_q75", _error(self.kappa_q75_error), "over the 0.75 quantile"),
            ]
        return [*rows, ("kappa_lower_bound", "", "over the smallest converged |lambda|: at least")]

    def _remarks(self) -> list[str]:
        work = f"{self.num_products} products by {self.method}, {self.seconds:.2g} s"
        return [work, *([self.coordinates] if self.coordinates else []), *self.notes]

    def plot(self, ax: Any = None) -> Any:
        """Draw the spectral density: the share of eigenvalues by magnitude and sign, and λ_max.

        Args:
            ax: A matplotlib axes. None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is missing.
            ValueError: if the report has no density, since it was estimated without probes.
        """
        if self.density is None:
            raise ValueError("the report has no spectral density: estimate with num_probes of at least 1")
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
            _, ax = pyplot.subplots()
        values, shares = self.density.curve()
        (line,) = ax.plot(values.tolist(), shares.tolist(), label=self._title())
        ax.axvline(self.lambda_max, color=line.get_color(), linestyle=":", linewidth=1)
        largest = max(abs(self.lambda_max), abs(self.lambda_min), 1e-300)
        ax.set_xscale("symlog", linthresh=1e-3 * largest)
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(1e-5, 0.1 / self.num_parameters))
        ax.set_xlabel("eigenvalue λ")
        ax.set_ylabel("share of eigenvalues per unit of asinh(λ/10⁻³λₘₐₓ)")
        return ax


def _number(x: float) -> str:
    return f"{x:.4g}"


def _error(x: float) -> str:
    return "" if math.isnan(x) else f"± {x:.1g}"
