"""Activations and gradients by depth: the signs of a net whose initialization, or training, goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bnp_optim.curvature.batches import Batch, Closures, as_batches
from bnp_optim.curvature.vectors import trained
from bnp_optim.diagnostics.choice import LayerRule, chosen_modules
from bnp_optim.diagnostics.guard import untouched
from bnp_optim.diagnostics.values import kurtosis, loss_and_gradient, new_axes, num_samples_of

__all__ = ["ActivationHealth", "LayerHealth", "activation_health"]

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One module's outputs, and the gradient of its weights. Numbers that do not exist there are NaN.

    Args:
        name: Of the module.
        num_samples: Rows of its outputs' batch dimension, over all calls.
        num_channels: Features of its outputs; of a convolution, channels.
        mean: The average over channels of |channel mean|, the mean over samples and positions.
        std: The average over channels of the channel's standard deviation.
        mean_to_std: ``mean / std``.
        cosine: The mean cosine between the outputs of two different samples of a batch.
        gradient_kurtosis: Plain kurtosis m₄/m₂² (3 for a Gaussian) of the entries of its weights' gradient: its own
            parameters of two or more dimensions, or (of a normalization layer) its ``weight``.
    """

    name: str
    num_samples: int
    num_channels: int
    mean: float
    std: float
    mean_to_std: float
    cosine: float
    gradient_kurtosis: float

    def to_dict(self) -> dict[str, float]:
        """The numbers as plain floats, by field name."""
        return {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "name"}


@dataclass(frozen=True, kw_only=True)
class ActivationHealth:
    """What :func:`activation_health` has measured.

    Args:
        layers: In the order of their first calls, which is their depth.
        loss: The mean loss.
        logit_cosine: The mean cosine between the model's outputs for two different samples of a batch, from closures
            that return (outputs, loss as a function of outputs); otherwise that of the last layer.
        gradient_kurtosis: Plain kurtosis of all entries of the gradient together. It mixes scales: layers and biases
            with gradients of different size raise it, too.
        median_kurtosis: The median over layers of theirs, which does not.
        num_samples: Behind the numbers; None if the closures do not say.
    """

    layers: tuple[LayerHealth, ...]
    loss: float
    logit_cosine: float
    gradient_kurtosis: float
    median_kurtosis: float
    num_samples: int | None

    def to_dict(self) -> dict[str, float]:
        """The net's numbers as plain floats by field name; layers' as ``"<layer>/<field>"``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        values["num_samples"] = math.nan if self.num_samples is None else float(self.num_samples)
        return values | {f"{x.name}/{key}": v for x in self.layers for key, v in x.to_dict().items()}

    def plot(self, ax: Any = None) -> Any:
        """Draw mean, std, their ratio, cosine and kurtosis by depth.

        Args:
            ax: A matplotlib axes. None: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        ax = new_axes() if ax is None else ax
        depth = range(1, len(self.layers) + 1)
        drawn = {
            "mean": "|channel mean|",
            "std": "standard deviation",
            "mean_to_std": "|mean| / std",
            "cosine": "cosine between samples",
            "gradient_kurtosis": "gradient kurtosis",
        }
        for key, label in drawn.items():
            ax.plot(depth, [getattr(x, key) for x in self.layers], marker=".", label=label)
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-3))  # rounding is no news
        ax.set_xlabel("layer, in the order of calls")
        return ax


def activation_health(
    model: nn.Module,
    closures: Closures,
    *,
    layers: Iterable[LayerRule] | None = None,
    params: Iterable[Tensor] | None = None,
) -> ActivationHealth:
    """Measure means, spread and direction of activations by depth, and how heavy-tailed gradients are.

    Without normalization the channel mean outgrows the standard deviation with depth, the outputs for different
    inputs point the same way, and gradients have heavy tails (J. Bjorck et al., Understanding Batch Normalization,
    NeurIPS 2018, sections 3 and 4).

    One forward and one backward pass per closure. Parameters, buffers, modes, ``.grad``, random numbers and the
    statistics of a BNPreconditioner around the model are left as they are.

    Args:
        model: Whose modules are watched.
        closures: As for :func:`bnp_optim.curvature.estimate_conditioning`: they call ``model`` and return the loss,
            or (outputs, loss as a function of outputs). In the mode that the model is in.
        layers: Modules whose outputs are watched: names as in ``named_modules``, classes or instances. None: the
            layers that BNP knows. (With batch normalization ``(nn.BatchNorm1d,)`` sees what it makes of these.)
            Channels are dimension 1 of outputs with two, four or five dimensions and of convolutions, poolings and
            normalizations, and the last one of others. Of outputs in tuples the first tensor counts.
        params: Whose gradient. None: all of the model's that require grad.

    Returns:
        The net's numbers, and a record per watched module that was called.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the model has none of ``layers``, none of them was called, there is no closure, a loss is no
            finite scalar with gradient history, or batch normalization in training mode gets one sample.
    """
    batches = as_batches(closures)
    watched = [_Watched(name, module) for name, module in chosen_modules(model, layers).items()]
    inputs = trained(model.parameters() if params is None else params)
    order: list[_Watched] = []  # by their first calls
    outputs = _Outputs()
    with ExitStack() as stack:
        restore = stack.enter_context(untouched(model))
        for x in watched:
            stack.callback(x.module.register_forward_hook(x.hook(order)).remove)
        looked_at = [Batch(_seeing(batch, outputs), batch.num_samples) for batch in batches]
        loss, gradient = loss_and_gradient(looked_at, inputs, restore)
    if not order:
        raise ValueError(f"closures called none of the {len(watched)} layers: they must call model itself")
    by_parameter = {id(p): g for p, g in zip(inputs, gradient, strict=True)}
    records = tuple(x.record(by_parameter) for x in order)
    known = sorted(x.gradient_kurtosis for x in records if not math.isnan(x.gradient_kurtosis))
    return ActivationHealth(
        layers=records,
        loss=loss,
        logit_cosine=outputs.cosine if outputs.pairs else records[-1].cosine,
        gradient_kurtosis=kurtosis(gradient),
        median_kurtosis=(known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else math.nan,
        num_samples=num_samples_of(batches),
    )


class _Outputs:
    """The mean cosine between rows, over pairs within each batch."""

    def __init__(self) -> None:
        self._sum = 0.0
        self.pairs = 0

    def add(self, values: Tensor) -> None:
        rows = values.reshape(len(values), -1)
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        unit = (rows / size)[size.flatten() > 0]
        n = len(unit)
        # the sum over all pairs, less each with itself
        self._sum += float(unit.sum(0).square().sum()) - n
        self.pairs += n * (n - 1)

    @property
    def cosine(self) -> float:
        return self._sum / self.pairs if self.pairs else math.nan


def _seeing(batch: Batch, outputs: _Outputs) -> Callable[[], Any]:
    """The batch's closure, whose outputs are looked at."""

    def closure() -> Any:
        value = batch.closure()
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor) and value[0].dim():
            with torch.no_grad():
                outputs.add(_wide(value[0]))
        return value

    return closure


class _Watched(_Outputs):
    """One module, and what its calls have shown: by channel the moments, merged as (count, mean, M2)."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.module = module
        self.samples = 0
        self._count = 0
        self._mean = self._m2 = torch.zeros(0, dtype=torch.float64)

    def hook(self, order: list[_Watched]) -> Any:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # a checkpoint's second forward, inside backward
                return
            x = _first_tensor(output)
            if x is None or not x.is_floating_point() or not x.numel():
                return
            if self not in order:
                order.append(self)
            with torch.no_grad():
                self._take(_wide(x))

        return observe

    def _take(self, x: Tensor) -> None:
        m = self.module
        if isinstance(m, (nn.RNNBase, nn.MultiheadAttention)) and not m.batch_first and x.dim() == 3:
            x = x.movedim(1, 0)
        if x.dim() < 2:
            x = x.reshape(1, -1)  # one sample without a batch
        self.samples += len(x)
        self.add(x)
        channel = 1 if x.dim() != 3 or isinstance(m, _CHANNELS_FIRST) else 2
        rows = x.movedim(channel, -1).reshape(-1, x.shape[channel])
        variance, mean = (t.to("cpu", torch.float64) for t in torch.var_mean(rows, 0, correction=0))
        n = len(rows)
        if not self._count:
            self._mean, self._m2 = torch.zeros_like(mean), torch.zeros_like(mean)
        if len(mean) != len(self._mean):
            raise ValueError(f"{self.name!r} gave {len(mean)} channels after {len(self._mean)}: leave it out of layers")
        delta, total = mean - self._mean, self._count + n
        self._m2 = self._m2 + n * variance + delta.square() * (self._count * n / total)
        self._mean = self._mean + delta * (n / total)
        self._count = total

    def record(self, gradient: dict[int, Tensor]) -> LayerHealth:
        mean = float(self._mean.abs().mean())
        std = float((self._m2 / self._count).sqrt().mean())
        own = self.module._parameters
        weights = [p for p in own.values() if p is not None and p.dim() >= 2]
        if not weights:
            weights = [p for name, p in own.items() if name == "weight" and p is not None]
        return LayerHealth(
            name=self.name,
            num_samples=self.samples,
            num_channels=len(self._mean),
            mean=mean,
            std=std,
            mean_to_std=mean / std if std else math.nan,
            cosine=self.cosine,
            gradient_kurtosis=kurtosis([gradient[id(p)] for p in weights if id(p) in gradient]),
        )


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((t for x in values if (t := _first_tensor(x)) is not None), None)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
