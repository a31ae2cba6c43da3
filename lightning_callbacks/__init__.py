"""Lightning callbacks that watch training, its curvature above all, without changing it; and GammaDecay, which does.

They need the extra ``bnp-optim[lightning]``, and work with the trainers of ``pytorch_lightning`` and of
``lightning.pytorch``. The package imports without Lightning; its callbacks do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_callbacks.activations import ActivationMonitor
    from lightning_callbacks.divergence import StepDivergenceProbe
    from lightning_callbacks.gamma_decay import GammaDecay
    from lightning_callbacks.hessian import HessianConditionMonitor
    from lightning_callbacks.layers import LayerConditionMonitor
    from lightning_callbacks.learning_rate import MaxLearningRateMonitor

__all__ = [
    "ActivationMonitor",
    "GammaDecay",
    "HessianConditionMonitor",
    "LayerConditionMonitor",
    "MaxLearningRateMonitor",
    "StepDivergenceProbe",
]

_HOMES = {
    "ActivationMonitor": "activations",
    "GammaDecay": "gamma_decay",
    "HessianConditionMonitor": "hessian",
    "LayerConditionMonitor": "layers",
    "MaxLearningRateMonitor": "learning_rate",
    "StepDivergenceProbe": "divergence",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
