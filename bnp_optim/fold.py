"""Start from normalized inputs: a one-off change of the initial weights, before training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bnp_optim.checks import check_number
from bnp_optim.layers import LayerAdapter, Samples, adapter_for
from bnp_optim.transform import Factors, from_z
from bnp_optim.units import keep_units

__all__ = ["fold_normalization", "is_foldable"]


def fold_normalization(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    *,
    layers: Collection[str] | None = None,
    var_rel_eps: float = 0.0,
    var_eps: float = 1e-4,
) -> list[str]:
    """Express ``model``'s initial weights in normalized coordinates: w ← P w, with q = 1 and the statistics of a batch.

    Preconditioning conditions the path, not the start: where raw inputs are in the hundreds, so are the first
    pre-activations, and bounded steps need thousands of samples to undo that; where a deep net without normalization
    layers has PyTorch's initial weights, a ninth of the signal's variance passes each layer and its ReLU, and little
    reaches the last one. This undoes both at once. A layer
    with a bias afterwards computes ``b + W (a - μ)/σ̃`` where it computed ``b + W a``: what batch normalization of its
    input, inserted before it and folded into it, would make it compute (ours, after the change of variables of Lange,
    Helfrich, Ye, JMLR 2022). A layer without a bias gets the rank-one P of ``docs/method.md``. Zero padding stays
    zero. Layers change one after the other in the order of the forward pass, so each sees inputs that its
    predecessors have normalized already.

    The optimizer that is built next knows the variances that were found here, and compares small features with large
    ones in these units (docs/method.md): training then does not depend on the units of the inputs.

    It changes the function that the model computes, so it is for the start of training, before the optimizer is
    built. On a stream: collect the first samples (20 are a start), predict with the model as it is, call this, and then
    learn from them.

    Args:
        model: Called once, in evaluation mode and without gradients.
        inputs: A batch, or the tuple of the model's positional arguments. Two samples at least; a few hundred where
            there are as many.
        layers: Names of the modules to change (``model.named_modules()``). None: all with one weight that
            BNPreconditioner knows (linear layers, convolutions).
        var_rel_eps: ε1 ≥ 0 of σ̃² = σ² + ε1·max(σ²) + ε2. 0, unlike the preconditioner's: at a start there is no step
            that a small feature could blow up, and raw features differ by orders of magnitude.
        var_eps: ε2 > 0. 1e-4: the preconditioner's.

    Returns:
        The names of the layers that changed.

    Raises:
        ValueError: if an option is out of its range, a name in ``layers`` is no such layer, or a layer's input is a
            single observation or not finite. The weights are then as they were.
    """
    check_number("var_rel_eps", var_rel_eps, lambda x: 0 <= x < float("inf"), "at least 0, such as 0 or 1e-2")
    check_number("var_eps", var_eps, lambda x: 0 < x < float("inf"), "above 0, such as 1e-4")
    known = {name: module for name, module in model.named_modules() if is_foldable(module)}
    unknown = set(layers or ()) - set(known)
    if unknown:
        raise ValueError(
            f"layers has {sorted(unknown)}, which {type(model).__name__} has not, or which cannot be folded: choose "
            f"from {sorted(known)}"
        )
    before: list[tuple[Tensor, Tensor]] = []
    done: dict[int, str] = {}
    units: dict[nn.Module, Tensor] = {}
    training = {module: module.training for module in model.modules()}

    def fold(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            weight = module._parameters[_adapter(module).weight_name]
            if id(weight) not in done:  # tied weights, or a module that is called twice, change once
                units[module] = _fold(name, module, args, kwargs, var_rel_eps, var_eps, before)
                done[id(weight)] = name

        return hook

    handles = [
        module.register_forward_pre_hook(fold(name), with_kwargs=True)
        for name, module in known.items()
        if layers is None or name in layers
    ]
    try:
        model.eval()
        with torch.no_grad():
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    for module, variance in units.items():
        keep_units(module, variance)
    return list(done.values())


def _adapter(module: nn.Module) -> LayerAdapter:
    match = adapter_for(module)
    assert match is not None and isinstance(match.adapter, LayerAdapter)
    return match.adapter


def is_foldable(module: nn.Module) -> bool:
    """Whether the module has one weight, a parameter of its own, with one statistic per input channel."""
    match = adapter_for(module)
    if match is None or not match.exact or not isinstance(match.adapter, LayerAdapter) or is_parametrized(module):
        return False
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # each tap has statistics of its own
        return False
    weight = module._parameters.get(match.adapter.weight_name)
    return weight is not None and weight.is_floating_point()


def _fold(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    var_rel_eps: float,
    var_eps: float,
    before: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Change the weight; returns σ̃² of its input channels."""
    adapter = _adapter(module)
    kept = adapter.keep(module, args, kwargs, None)
    (samples,) = adapter.read(module, kept) if kept is not None else (None,)
    (part,) = adapter.parts(module)
    if samples is None:
        raise ValueError(f"the input of layer {name!r} cannot be read: name the other layers in layers")
    variance, mean = _moments(name, samples)
    if var_rel_eps:
        variance = variance + var_rel_eps * variance.max()
    variance = variance + var_eps
    inv_std = variance.rsqrt()

    weight, bias = part.find(module, part.weight), part.find(module, part.bias)
    assert weight is not None
    before += [(p, p.detach().clone()) for p in (weight, bias) if p is not None]
    rows = part.rows
    one = torch.ones((), dtype=torch.float64, device=weight.device)
    mean, inv_std = (v.view(rows.groups, -1).repeat_interleave(rows.taps, dim=1) for v in (mean, inv_std))
    matrix = adapter.matrix(rows, weight.detach()).double().reshape(rows.groups, -1, rows.fan_in).clone()
    shift = None if bias is None else bias.detach().double().reshape(rows.groups, -1).clone()
    from_z(matrix, shift, Factors(mean, inv_std, q2=one, spread=one))
    target = adapter.matrix(rows, weight.detach())
    target.copy_(matrix.view_as(target))
    if bias is not None and shift is not None:
        bias.copy_(shift.view_as(bias))
    return variance.to(weight.dtype)


def _moments(name: str, samples: Samples) -> tuple[Tensor, Tensor]:
    """Variance and mean per input channel, groups one after the other, in float64."""
    parts = samples.values if isinstance(samples.values, tuple) else (samples.values,)
    flat = [x.detach().double().flatten(2).transpose(0, 1).flatten(1) for x in (_deep(p) for p in parts)]
    if any(x.shape[1] < 2 for x in flat):
        raise ValueError(f"layer {name!r} saw one observation: inputs must have two samples at least")
    found = [torch.var_mean(x, 1, correction=0) for x in flat]
    variance, mean = torch.cat([v for v, _ in found]), torch.cat([m for _, m in found])
    if not bool((variance + mean).isfinite().all()):
        raise ValueError(f"the input of layer {name!r} is not finite: check inputs")
    return variance, mean


def _deep(values: Tensor) -> Tensor:
    return values.unsqueeze(2) if values.dim() == 2 else values
