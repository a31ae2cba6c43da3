"""Extra passes through a model after which it is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parameter import is_lazy

from bnp_optim.capture import ForwardTap
from bnp_optim.curvature.derivatives import second_derivatives
from bnp_optim.diagnostics.state import ModuleState, RandomState
from bnp_optim.discovery import clean_name
from bnp_optim.nn.gamma_decay import GammaMeter

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside, ``model`` may be run; afterwards all but the values of its parameters is what it was.

    Kept and put back: random numbers (torch, Python, numpy), and what :class:`ModuleState` names: buffers, modes,
    ``requires_grad``, ``.grad``, plain attributes. Every BNPreconditioner and GammaMeter on the model measures nothing.

    Yields:
        To call before each evaluation, which then starts from the same state (one dropout mask, one set of buffers).

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it has parameters that its first forward will make.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, it must be an nn.Module")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"model has no values for {clean_name(name)!r} yet: run it on a batch first")
    with ExitStack() as stack:
        rng, state = RandomState(), ModuleState(model)
        stack.callback(rng.restore)
        stack.callback(state.close)
        stack.enter_context(_paused_taps(model))
        stack.enter_context(second_derivatives())  # not for those, but compiled modules would not call hooks
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
                hook = module.register_forward_pre_hook(_refuse_one_sample(clean_name(name)))
                stack.callback(hook.remove)

        def restore() -> None:
            state.restore()
            rng.restore()
            # NOTE: inside the caller's autocast, copies of parameters in half precision outlive a change of .data
            torch.clear_autocast_cache()

        stack.callback(torch.clear_autocast_cache)
        yield restore


@contextmanager
def _paused_taps(model: nn.Module) -> Iterator[None]:
    """No BNPreconditioner or GammaMeter measures the model: there may be several, and none need be at hand."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    gates = list({id(hook._gate): hook._gate for hook in hooks if isinstance(hook, ForwardTap)}.values())
    with ExitStack() as stack:
        for meter in hooks:
            if isinstance(meter, GammaMeter):
                stack.enter_context(meter.pause())
        for gate in gates:
            gate.paused += 1
        try:
            yield
        finally:
            for gate in gates:
                gate.paused -= 1


def _refuse_one_sample(name: str) -> Callable[[nn.Module, Any], None]:
    def check(module: nn.Module, args: Any) -> None:
        x = args[0] if args else None
        own_statistics = module.training or module.running_mean is None
        if own_statistics and isinstance(x, Tensor) and x.dim() > 1 and x.numel() == x.shape[1]:
            raise ValueError(
                f"closures gave one sample to {type(module).__name__} {name!r} in training mode, whose variance is "
                "zero: give batches of two or more, or call model.eval()"
            )

    return check
