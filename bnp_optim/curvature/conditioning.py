"""``estimate_conditioning``: what of a curvature matrix's conditioning can honestly be measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from bnp_optim.checks import check_choice
from bnp_optim.curvature.batches import Closures
from bnp_optim.curvature.coordinates import PreconditionedOperator, Preconditioner
from bnp_optim.curvature.lanczos import LanczosResult, lanczos, rademacher
from bnp_optim.curvature.learning_rate import max_learning_rate
from bnp_optim.curvature.operators import CurvatureOperator, GaussNewtonOperator, HessianOperator
from bnp_optim.curvature.quadrature import SpectralDensity, spectral_density
from bnp_optim.curvature.report import ConditioningReport

__all__ = ["estimate_conditioning"]

# Between rounding (bfloat16 parameters: 0.1 %) and chance (a dropout of 0.1: 5 to 26 %)
_ASYMMETRY = 0.02

Matrix = Literal["hessian", "gauss_newton"]
_OPERATORS: dict[str, type[CurvatureOperator]] = {"hessian": HessianOperator, "gauss_newton": GaussNewtonOperator}


def estimate_conditioning(
    closures: Closures,
    params: Iterable[Tensor],
    *,
    preconditioner: Preconditioner = None,
    matrix: Matrix = "hessian",
    num_steps: int = 50,
    num_probes: int = 5,
    seed: int = 0,
    tolerance: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> ConditioningReport:
    """Estimate extreme eigenvalues and condition numbers of the loss's curvature.

        batches = closures_from_loader(model, nn.functional.cross_entropy, loader, max_batches=4)
        print(estimate_conditioning(batches, model.parameters(), preconditioner=optimizer))

    It costs at most ``num_probes × num_steps`` products (``num_steps`` without probes), each some 3 gradients per
    batch, and memory for some ``2 num_steps`` vectors. Parameters, ``.grad`` and the global random numbers are left
    as they are, and a BNPreconditioner given as ``preconditioner`` does not measure meanwhile. (Estimate the plain H of
    a wrapped model inside its ``pause_statistics()``.) What the forward pass itself changes (batch normalization's
    buffers, dropout's random numbers) is the caller's.

    Args:
        closures: One or several closures, pairs (closure, num_samples) or :class:`Batch`: what the matrix is averaged
            over. λ_max of a minibatch is biased upward; the report carries the number of samples.
        params: The parameters; frozen ones are left out.
        preconditioner: A BNPreconditioner for PᵀHP; or coordinates, several in the order ``w = S₁ S₂ … z``. None: H.
        matrix: "hessian", or "gauss_newton" (for cross-entropy and squared error the Fisher matrix), whose closures
            return the pair (outputs, loss as a function of outputs).
        num_steps: Lanczos steps per probe, at most n. 50: see :func:`spectral_density`; 20 suffice for λ_max alone.
        num_probes: Random vectors. 5: see :func:`spectral_density`. 0: no spectral density, so no kappa_mean and no
            quantiles; one run, which stops when λ_max has converged.
        seed: Of the random vectors.
        tolerance: Relative error at which an eigenvalue counts as converged. 1e-3: finer is lost in the minibatch's
            noise.
        progress: Called after each product with (done, at most).

    Raises:
        TypeError: if closures, params or preconditioner are of the wrong kind.
        ValueError: if an argument is out of its range, there is no closure or no parameter that requires grad, or a
            loss is no finite scalar with gradient history.
    """
    check_choice("matrix", matrix, tuple(_OPERATORS))
    _check_count("num_steps", num_steps, 1)
    _check_count("num_probes", num_probes, 0)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}, it must be in (0, 1), such as 1e-3")
    start = time.perf_counter()
    curvature = _OPERATORS[matrix](closures, params)
    operator = PreconditionedOperator(curvature, preconditioner)
    density: SpectralDensity | None = None
    runs: tuple[LanczosResult, ...]
    if num_probes:
        density = spectral_density(operator, num_probes=num_probes, num_steps=num_steps, seed=seed, progress=progress)
        runs = (density.explorer, *density.probes)
    else:
        generator = torch.Generator().manual_seed(seed)
        v = rademacher(operator.size, generator, operator.dtype, operator.device)
        runs = (lanczos(operator, v, num_steps=num_steps, tolerance=tolerance, progress=progress),)
    top = max(runs, key=lambda run: float(run.ritz_values[-1]))
    bottom = min(runs, key=lambda run: float(run.ritz_values[0]))
    lambda_max, lambda_min = float(top.ritz_values[-1]), float(bottom.ritz_values[0])
    largest = max(abs(lambda_max), abs(lambda_min))
    notes = []
    if num_steps > operator.size:
        notes.append(f"num_steps was {num_steps}, and is clipped to the number of parameters, {operator.size}")
    asymmetry = runs[0].asymmetry  # of the whole matrix: where little is left, rounding is much of it
    if asymmetry > _ASYMMETRY:
        notes.append(
            f"products disagree by {asymmetry:.0%}, so these numbers mean little: does the forward pass draw random "
            "numbers (dropout), or change what it reads?"
        )
    return ConditioningReport(
        matrix=matrix,
        preconditioned=bool(operator.coordinates),
        coordinates=", ".join(c.description for c in operator.coordinates),
        method=curvature.method,
        num_parameters=operator.size,
        num_samples=curvature.num_samples,
        num_products=curvature.num_products,
        num_steps=min(num_steps, operator.size),
        num_probes=num_probes,
        lambda_max=lambda_max,
        lambda_min=lambda_min,
        ritz_residual=float(top.residuals[-1]),
        lambda_max_converged=top.has_converged(tolerance),
        lambda_min_residual=float(bottom.residuals[0]),
        lambda_min_converged=float(bottom.residuals[0]) <= tolerance * abs(lambda_min),
        kappa_lower_bound=_lower_bound(runs, largest, tolerance, torch.finfo(operator.dtype).eps),
        negative_ratio=_ratio(max(-lambda_min, 0.0), lambda_max),
        max_learning_rate=max_learning_rate(lambda_max),
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
        density=density,
        **_averages(density, lambda_max, largest),
    )


def _averages(density: SpectralDensity | None, lambda_max: float, largest: float) -> dict[str, float]:
    """The condition numbers that need the distribution, with their standard errors."""
    if density is None:
        return {f"kappa_{which}{end}": math.nan for which in ("mean", "q90", "q75") for end in ("", "_error")}
    found = {}
    for which, of, (value, error) in (
        ("mean", lambda_max, density.mean(torch.abs)),
        ("q90", largest, density.quantile(0.9)),
        ("q75", largest, density.quantile(0.75)),
    ):
        kappa = _ratio(of, value)
        found[f"kappa_{which}"] = kappa
        found[f"kappa_{which}_error"] = kappa * _ratio(error, value)
    return found


def _lower_bound(runs: Iterable[LanczosResult], largest: float, tolerance: float, eps: float) -> float:
    """|λ|max over the smallest |Ritz value| that is an eigenvalue to ``tolerance``, and is no rounding."""
    values = torch.cat([run.ritz_values for run in runs]).abs()
    residuals = torch.cat([run.residuals for run in runs])
    converged = values[(residuals <= tolerance * values) & (values > 100 * eps * largest)]
    return _ratio(largest, float(converged.min())) if len(converged) else math.nan


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.nan if a == 0 or math.isnan(a) else math.inf)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, it must be a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {value!r}, it must be at least {least}")
