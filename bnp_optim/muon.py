"""BNPMuon: Muon on the hidden matrices, AdamW on the rest, and P around both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnp_optim.checks import check_number, checked_skip
from bnp_optim.combined import CombinedOptimizer
from bnp_optim.discovery import SkipRule, clean_name, find_layers, matches
from bnp_optim.layers.registry import adapter_for
from bnp_optim.named import NamedOptimizer, Params, apart, found
from bnp_optim.preconditioner import Mode, StepScale, Variance

__all__ = ["BNPMuon"]


class BNPMuon(NamedOptimizer):
    """Muon on hidden matrices and AdamW on everything else, inside one :class:`BNPreconditioner`.

        optimizer = BNPMuon(model, lr=1e-2)

    is ``BNPreconditioner(CombinedOptimizer([Muon(matrices), AdamW(others)]), model)``: each weight keeps its bias in
    P, though another optimizer steps it. Hidden matrices are the two-dimensional weights of layers that can be
    preconditioned, but for the head's; biases, norms, embeddings (and heads tied to them), convolutions and all
    that is unknown are AdamW's. Groups come in that order: the i-th given group's matrices among Muon's, its others
    among AdamW's. A group's ``lr`` scales both rates, its ``weight_decay`` is for both, its ``adamw_lr``,
    ``adamw_betas``, ``adamw_eps`` and ``adamw_weight_decay`` are AdamW's. ``add_param_group`` adds to AdamW, or with
    ``"optimizer": 0`` to Muon.

    Args:
        params: The model itself, or parameters, names or groups.
        lr: Of the matrices. 1e-2: ten times AdamW's, the ratio that was measured (docs/construction.md).
        weight_decay: And up to ``adjust_lr_fn``: as in ``torch.optim.Muon``, with its defaults.
        adamw_lr: Of all others. None: a tenth of ``lr``.
        adamw_betas: And up to ``adamw_weight_decay``: as in ``torch.optim.AdamW``, with its defaults.
        head: What is no hidden layer, although its weight is a matrix: module classes, names or instances, as in
            ``skip``. None: the last module, in the order of registration, that has a matrix among ``params`` and is of
            a type that can be preconditioned. (): nothing.
        model: And all that follow: as for :class:`BNPSGD`.

    Raises:
        RuntimeError: if this torch has no Muon (it came with 2.9).
        ValueError: if a name in ``head`` fits no module, or where the model is ambiguous.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 1e-2,
        head: Collection[SkipRule] | None = None,
        model: nn.Module | None = None,
        stat_decay: float = 0.99,
        var_rel_eps: float = 1e-2,
        var_eps: float = 1e-4,
        mode: Mode = "auto",
        step_scale: StepScale | None = "auto",
        debias: bool = True,
        variance: Variance = "total",
        max_norm: float | None = None,
        follow_inputs: bool = False,
        stat_interval: int = 1,
        max_observations: int | None = None,
        compiled: bool = False,
        skip: Collection[SkipRule] = (),
        process_group: Any = None,
    ) -> None:
        given = dict(locals())
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"torch {torch.__version__} has no Muon, which came with 2.9: upgrade torch, or use BNPAdamW"
            )
        check_number("lr", lr, lambda x: x >= 0, "at least 0, such as 1e-2")
        tensors, model = apart(params, model)
        groups = _Groups(tensors, {})
        if model is None:
            model = found(groups, skip, head)
        self._build(given | {"params": groups.param_groups, "model": model}, partial(muon_and_adamw, model=model))


class _Groups(Optimizer):
    """Lets torch read and check what may be tensors, names or groups, and does nothing else."""


def muon_and_adamw(
    params: Sequence[dict[str, Any]],
    *,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
    adamw_lr: float | None,
    adamw_betas: tuple[float, float],
    adamw_eps: float,
    adamw_weight_decay: float,
    head: Collection[SkipRule] | None,
) -> CombinedOptimizer:
    """The base of :class:`BNPMuon`; ``params`` are groups."""
    matrices = _hidden_matrices(model, {id(p) for group in params for p in group["params"]}, head)
    rest_lr = lr / 10 if adamw_lr is None else adamw_lr
    for_muon, for_adamw = [], []
    for group in params:
        entries = group["params"]
        if "param_names" in group:
            entries = list(zip(group["param_names"], entries, strict=True))
        hidden = [id(p) in matrices for p in group["params"]]
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        theirs = {key.removeprefix("adamw_"): value for key, value in options.items() if key.startswith("adamw_")}
        mine = {key: value for key, value in options.items() if not key.startswith("adamw_")}
        if any(hidden):
            for_muon.append({"params": [e for e, h in zip(entries, hidden, strict=True) if h], **mine})
        if not all(hidden):
            shared = {key: value for key, value in mine.items() if key not in _MUON_ONLY}
            if "lr" in shared and lr:
                shared["lr"] = rest_lr * shared["lr"] / lr
            for_adamw.append({"params": [e for e, h in zip(entries, hidden, strict=True) if not h], **shared, **theirs})
    parts: list[Optimizer] = []
    if for_muon:
        parts.append(
            torch.optim.Muon(
                for_muon, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
            )
        )
    if for_adamw:
        parts.append(torch.optim.AdamW(for_adamw, rest_lr, adamw_betas, adamw_eps, adamw_weight_decay))
    return CombinedOptimizer(parts)


_MUON_ONLY = ("momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")


def _hidden_matrices(model: nn.Module, owned: Collection[int], head: Collection[SkipRule] | None) -> set[int]:
    """Ids of the parameters that are Muon's."""
    found = (layer.weight for layer in find_layers(model).layers)
    matrices = {id(w) for w in found if w is not None and w.ndim == 2 and id(w) in owned}
    named = [(clean_name(name), module) for name, module in model.named_modules()]
    if head is None:
        heads = [m for _, m in named if adapter_for(m) is not None and _has_matrix(m, owned)][-1:]
    else:
        rules = checked_skip(head, model, "head")
        heads = [m for name, m in named if any(matches(rule, name, m) for rule in rules)]
    return matrices - {id(p) for m in heads for p in m.parameters()}


def _has_matrix(module: nn.Module, owned: Collection[int]) -> bool:
    own = (p for p in module._parameters.values() if p is not None and not is_lazy(p))
    return any(id(p) in owned and p.ndim == 2 for p in own)
