"""GammaDecayPenalty: Σ ζγ² of a net, to add to the loss or to the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnp_optim.checks import check_number
from bnp_optim.discovery import Layer, clean_name
from bnp_optim.nn.activations import Activation, activation_of, following_activations
from bnp_optim.nn.gamma_decay import GammaMeter, check_batch_size, gamma_decay_coefficient, gaussian_coefficient
from bnp_optim.nn.population import PopulationNorm
from bnp_optim.preconditioner import BNPreconditioner
from bnp_optim.statistics import LayerStatistics

__all__ = ["GammaDecayPenalty"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Unit(NamedTuple):
    """A layer whose units are decayed."""

    name: str
    layer: nn.Module
    activation: Callable[[Tensor], Tensor]
    meter: GammaMeter


class GammaDecayPenalty:
    """Σ over units of ζγ², which gives a net without batch noise the regularization of batch normalization.

    Two kinds of nets:

    - **with PopulationNorm layers**: γ is their ``weight``, one per channel.
    - **free of normalization, under a BNPreconditioner** (``optimizer``): γ is implicit. The normalized form of a
      unit h = wᵀa + b is γx̂ + β with β = b + wᵀμ and γ the standard deviation of h, which in the statistics that BNP
      holds, a mean μ and a variance σ² per input, is γ² = Σ_j w_j² σ_j² (inputs taken as uncorrelated, as BNP does;
      over a convolution's taps too). So the penalty's gradient is 2ζ diag(σ²)w, and none on b. In BNP's coordinates
      w = z/(qσ̃) this is weight decay: P Pᵀ makes of it 2ζw/q² (up to the floors of σ̃), and a change of b that
      leaves β where it is, which is what decay of γ does to the normalized net. Decayed are the linear layers and
      convolutions that an activation follows, as a normalization would stand there; the last layer is not.

    ζ is :func:`gamma_decay_coefficient`'s, measured by a :class:`GammaMeter` on each layer, and σ² are constants in
    the gradient. A channel's ζ that is negative, as an activation with falling parts may have it, counts as zero. In a
    graph of ``torch.compile``, where nothing is measured, ζ is that of Gaussian pre-activations. Before BNP's first
    step there is no σ², and nothing of its layers is added.

    Attributes:
        optimizer: The BNPreconditioner whose σ² are used; None with PopulationNorm layers.

    Use one of the two::

        loss = criterion(model(x), y) + penalty()
        penalty.add_gradients()  # between loss.backward() (and the unscaling of AMP) and optimizer.step()

    Args:
        model: Any module. If it has PopulationNorm layers, all of these are decayed and nothing else.
        batch_size: M of the batch normalization to imitate, at least 2; usually what you train with. For convolutions
            that is the paper's letter, but their statistics average over positions too, so ζ comes out too large by
            factors that docs/gamma_decay.md has: give more, or a smaller ``strength``.
        optimizer: The BNPreconditioner of a normalization-free model.
        activation: What follows the layers where ``model`` does not show it: an activation module next to them in an
            ``nn.Sequential`` is found. A mapping of layer names to activations (names such as "relu", modules,
            functions), which goes before what is found; or, with PopulationNorm layers, one for all the others.
        strength: Multiplies ζ. 1: the paper's formula.
        interval: Of the meters, in forward calls.

    Raises:
        TypeError, ValueError: if an argument is out of its range, names no such layer, or leaves it open what follows
            a PopulationNorm; if there is nothing to decay.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: float,
        *,
        optimizer: BNPreconditioner | None = None,
        activation: Activation | Mapping[str, Activation] | None = None,
        strength: float = 1.0,
        interval: int = 10,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if optimizer is not None and not isinstance(optimizer, BNPreconditioner):
            raise TypeError(f"optimizer must be a BNPreconditioner, which holds σ², got {type(optimizer).__name__}")
        check_batch_size(batch_size)
        check_number("strength", strength, lambda s: 0 <= s < float("inf"), "at least 0, such as 1")
        self.batch_size = batch_size
        self.strength = strength
        names = {clean_name(name): module for name, module in model.named_modules()}
        norms = {name: m for name, m in names.items() if isinstance(m, PopulationNorm) and m.affine}
        self.optimizer = None if norms else optimizer
        candidates = norms or _weighted(names, optimizer)
        if not candidates:
            raise ValueError(
                "model has neither PopulationNorm layers with γ (convert_batchnorm(model) makes them of BatchNorm) "
                "nor, with optimizer=BNPreconditioner(...), linear layers or convolutions: there is nothing to decay"
            )
        chosen = _activations(model, candidates, activation, required=bool(norms))
        if not chosen:
            raise ValueError(
                "activation is not given, and no activation module follows a layer in an nn.Sequential: pass "
                f"activation={{name: 'relu', ...}} with names among {', '.join(map(repr, candidates))}"
            )
        self._units = [_Unit(n, candidates[n], f, GammaMeter(f, interval=interval)) for n, f in chosen.items()]
        self._handles = [unit.meter.attach(unit.layer) for unit in self._units]
        self._warned = False

    @property
    def meters(self) -> dict[str, GammaMeter]:
        """By layer name."""
        return {unit.name: unit.meter for unit in self._units}

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """ζ of each channel by layer name, ``strength`` not counted; layers without a measurement are left out."""
        found = {unit.name: unit.meter.coefficient(self.batch_size) for unit in self._units}
        return {name: zeta for name, zeta in found.items() if zeta is not None}

    def __call__(self) -> Tensor:
        """strength·Σ ζγ², differentiable in γ or w."""
        return self._sum(None)

    def add_gradients(self, parameters: Collection[Tensor] | None = None) -> Tensor:
        """Add the penalty's gradient to the ``.grad`` of γ or w where there is one; returns the penalty, detached.

        Args:
            parameters: Only to these. None: to all.
        """
        with torch.enable_grad():
            allowed = None if parameters is None else {id(p) for p in parameters}
            total = self._sum(allowed)
            targets = [p for p in self._parameters(allowed) if p.grad is not None] if total.requires_grad else []
            gradients = torch.autograd.grad(total, targets, allow_unused=True) if targets else ()
        for p, g in zip(targets, gradients, strict=True):
            if g is not None and p.grad is not None:
                p.grad.add_(g)
        return total.detach()

    def remove(self) -> None:
        """Detach the meters; what they have measured goes on being used."""
        for handle in self._handles:
            handle.remove()

    def _parameters(self, allowed: Collection[int] | None) -> list[nn.Parameter]:
        weights = [unit.layer._parameters.get("weight") for unit in self._units]
        return [p for p in weights if p is not None and p.requires_grad and (allowed is None or id(p) in allowed)]

    def _sum(self, allowed: Collection[int] | None) -> Tensor:
        statistics = {} if self.optimizer is None else _statistics(self.optimizer)
        mine = {id(p) for p in self._parameters(allowed)}
        terms = []
        for unit in self._units:
            weight = unit.layer._parameters.get("weight")
            if weight is None or id(weight) not in mine:
                continue
            if self.optimizer is None:
                squares = weight.float().square() if weight.dtype.itemsize < 4 else weight.square()
            elif unit.layer in statistics:
                squares = _implicit_gamma2(unit.layer, weight, statistics[unit.layer].variance)
            else:
                continue
            terms.append((self._zeta(unit, squares, statistics).to(squares) * squares).sum())
        if terms:
            return self.strength * torch.stack([t.to(terms[0]) for t in terms]).sum()
        return torch.zeros(())

    def _zeta(self, unit: _Unit, squares: Tensor, statistics: Mapping[nn.Module, LayerStatistics]) -> Tensor:
        measured = unit.meter.coefficient(self.batch_size)
        if measured is not None:
            return measured.clamp_min(0)
        if self.optimizer is None:
            found = gamma_decay_coefficient(unit.layer, self.batch_size, activation=unit.activation)
        else:
            shift = _implicit_beta(unit.layer, statistics[unit.layer].mean).to(squares)
            found = gaussian_coefficient(unit.activation, squares.detach().sqrt(), shift, self.batch_size)
        if not self._warned and (self.optimizer is not None or int(getattr(unit.layer, "num_batches_tracked", 0))):
            self._warned = True
            warnings.warn(
                f"GammaDecayPenalty: {unit.name!r} ran, but nothing of it was measured (in a compiled graph nothing "
                "can be): ζ is that of Gaussian pre-activations.",
                stacklevel=4,
            )
        return found.clamp_min(0)

    def __repr__(self) -> str:
        kind = "γ of PopulationNorm" if self.optimizer is None else "implicit γ under BNP"
        return (
            f"GammaDecayPenalty({len(self._units)} layers, {kind}, batch_size={self.batch_size:g}, "
            f"strength={self.strength:g})"
        )


def _weighted(names: Mapping[str, nn.Module], optimizer: BNPreconditioner | None) -> dict[str, nn.Module]:
    """The linear layers and convolutions that BNP measures, by their names in the model."""
    measured = set() if optimizer is None else set(_own_layers(optimizer))
    return {name: module for name, module in names.items() if module in measured}


def _own_layers(optimizer: BNPreconditioner) -> dict[nn.Module, Layer]:
    """The modules that alone apply a preconditioned weight."""
    return {
        layer.uses[0].module: layer
        for layer in optimizer._tracker.layers
        if len(layer.uses) == 1 and isinstance(layer.uses[0].module, (nn.Linear, *_CONVOLUTIONS))
    }


def _statistics(optimizer: BNPreconditioner) -> dict[nn.Module, LayerStatistics]:
    """Of the layers that have seen a batch."""
    found, ready = optimizer.statistics, optimizer._tracker.ready
    return {module: found[layer.name] for module, layer in _own_layers(optimizer).items() if layer in ready}


def _activations(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    activation: Activation | Mapping[str, Activation] | None,
    *,
    required: bool,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The activation behind each candidate that has one: told by name, found, or the one for all the others."""
    told = activation if isinstance(activation, Mapping) else {}
    unknown = [name for name in told if name not in candidates]
    if unknown:
        raise ValueError(
            f"activation names {unknown[0]!r}, which is no layer to decay: choose among "
            f"{', '.join(map(repr, candidates))}"
        )
    rest = None if isinstance(activation, Mapping) or activation is None else activation_of("activation", activation)
    if rest is not None and not required:
        raise ValueError(
            f"activation is {activation!r} for all layers, but without PopulationNorm layers it must be said which "
            "layers it follows (the last one has none): pass a mapping {name: activation}"
        )
    following = following_activations(model)
    chosen: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, layer in candidates.items():
        if name in told:
            chosen[name] = activation_of(f"activation[{name!r}]", told[name])
        elif layer in following:
            chosen[name] = activation_of("activation", following[layer])
        elif rest is not None:
            chosen[name] = rest
    missing = [name for name in candidates if name not in chosen]
    if required and missing:
        raise ValueError(
            f"activation is not given for {', '.join(map(repr, missing))}, and no activation module follows in an "
            "nn.Sequential: pass activation='relu', or a mapping {name: activation}"
        )
    return chosen


def _by_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (groups, units of a group, input channels of a group, taps)."""
    groups = layer.groups if isinstance(layer, _CONVOLUTIONS) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _implicit_gamma2(layer: nn.Module, weight: Tensor, variance: Tensor) -> Tensor:
    """γ² = Σ_j w_j² σ_j² of each unit, (C,), in the precision of the statistics."""
    matrix = _by_input(layer, weight.to(variance))
    return (matrix.square() * variance.view(matrix.shape[0], 1, -1, 1)).sum((2, 3)).flatten()


def _implicit_beta(layer: nn.Module, mean: Tensor) -> Tensor:
    """β = b + wᵀμ of each unit, (C,), detached."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    matrix = _by_input(layer, weight.detach().to(mean))
    beta = (matrix * mean.view(matrix.shape[0], 1, -1, 1)).sum((2, 3)).flatten()
    return beta if bias is None else beta + bias.detach().to(mean)
