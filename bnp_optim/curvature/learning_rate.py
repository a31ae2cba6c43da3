"""The largest learning rate at which an optimizer is stable on a quadratic with largest eigenvalue λ_max."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.optim import SGD, Adam, AdamW, Optimizer

from bnp_optim.preconditioner import BNPreconditioner

__all__ = ["max_learning_rate"]

Kind = Literal["sgd", "adam"]


def max_learning_rate(
    lambda_max: float,
    optimizer: Optimizer | Kind = "sgd",
    *,
    momentum: float | None = None,
    nesterov: bool | None = None,
    betas: tuple[float, float] | None = None,
) -> float:
    """The learning rate above which the direction of λ_max diverges.

    Gradient descent 2/λ_max; heavy ball 2(1+β)/λ_max; Nesterov's momentum as torch has it 2(1+β)/((1+2β)λ_max); Adam
    (2+2β₁)/((1-β₁)λ_max). An upper estimate: λ_max of a Lanczos run is a lower bound, the minibatch's is not the
    data's, and the loss is no quadratic. Weight decay is not counted.

    Args:
        lambda_max: The largest eigenvalue *in the coordinates the optimizer descends in*: of H for SGD, of PᵀHP under a
            BNPreconditioner, of ``D^(-1/2) H D^(-1/2)`` for Adam (:func:`coordinates_of` makes them).
        optimizer: A torch optimizer (SGD, Adam, AdamW; wrapped or not), whose groups' options count, and of several
            groups the smallest rate; or a kind.
        momentum: β, of a kind "sgd"; 0 by default. With an optimizer, overrides its groups' own.
        nesterov: Of a kind "sgd"; False by default. With an optimizer, overrides its groups' own.
        betas: (β₁, β₂), of a kind "adam"; (0.9, 0.999) by default, which are torch's. With an optimizer, overrides its
            groups' own.

    Returns:
        The rate; infinity where λ_max ≤ 0, since nothing diverges upwards then.

    Raises:
        TypeError: if the optimizer is one for which no such rule is known.
        ValueError: if a kind is unknown or an option out of its range.
    """
    if math.isnan(lambda_max):
        return math.nan
    if lambda_max <= 0:
        return math.inf
    given = {"momentum": momentum, "nesterov": nesterov, "betas": betas}
    overrides = {key: value for key, value in given.items() if value is not None}
    return min(_factor(kind, options | overrides) for kind, options in _rules(optimizer)) / lambda_max


def _rules(optimizer: Optimizer | Kind) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(optimizer, str):
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer is {optimizer!r}, it must be 'sgd', 'adam' or a torch optimizer")
        return [(optimizer, {})]
    base = optimizer.base_optimizer if isinstance(optimizer, BNPreconditioner) else optimizer
    if isinstance(base, (Adam, AdamW)):
        return [("adam", dict(group)) for group in base.param_groups]
    if isinstance(base, SGD):
        return [("sgd", dict(group)) for group in base.param_groups]
    raise TypeError(
        f"optimizer is a {type(base).__name__}, it must be SGD, Adam or AdamW of torch.optim: the stable rate of "
        "others is not known here; pass 'sgd' with its momentum if it descends like that"
    )


def _factor(kind: str, options: dict[str, Any]) -> float:
    """The rate times λ_max."""
    if kind == "adam":
        beta = float((options.get("betas") or (0.9, 0.999))[0])
        _check("betas[0]", beta)
        return (2 + 2 * beta) / (1 - beta)
    beta = float(options.get("momentum") or 0.0)
    _check("momentum", beta)
    if options.get("nesterov"):
        return 2 * (1 + beta) / (1 + 2 * beta)
    # dampening scales every gradient that enters the momentum
    dampening = float(options.get("dampening") or 0.0) if beta else 0.0
    return 2 * (1 + beta) / (1 - dampening) if dampening < 1 else math.inf


def _check(name: str, beta: float) -> None:
    if not 0 <= beta < 1:
        raise ValueError(f"{name} is {beta!r}, it must be in [0, 1), such as 0.9")
