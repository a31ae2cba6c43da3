"""Whether a second derivative is there, and the conditions under which torch has most of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["MissingDerivativeError", "inspect_graph", "second_derivatives", "translated"]

# What @once_differentiable puts in place of a backward
_WRAPPER = next((c for c in once_differentiable.__code__.co_consts if isinstance(c, CodeType)), None)


class MissingDerivativeError(Exception):
    """Automatic differentiation has no second derivative here."""


@contextmanager
def translated() -> Iterator[None]:
    """Tell a missing derivative from other errors: the forward pass is over, so only memory is left to fail."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise MissingDerivativeError(str(error).strip().split("\n")[0]) from error


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Gradients enabled, and kernels that have a double backward where torch lets us choose.

    Fused attention and compiled modules have none; the plain ones compute the same.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def inspect_graph(result: Tensor) -> None:
    """Look behind ``result`` for what ``torch.autograd.grad`` of chosen inputs passes over in silence.

    NOTE: torch raises for functions marked @once_differentiable, and for reentrant checkpoints, in ``.backward()``
    alone; otherwise their part of the derivative is just missing.

    Raises:
        MissingDerivativeError: if there is a function marked @once_differentiable.
        ValueError: if there is a reentrant checkpoint, whose gradients cannot be had at all.
    """
    waiting: list[Any] = [result.grad_fn]
    seen: set[Any] = set()
    once = None
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is CheckpointFunction:
            raise ValueError(
                "loss goes through torch.utils.checkpoint with use_reentrant=True, whose gradients can only be "
                "accumulated: use checkpoint(..., use_reentrant=False)"
            )
        if function is not None and getattr(function.backward, "__code__", None) is _WRAPPER:
            once = function.__name__
        waiting.extend(following for following, _ in node.next_functions)
    if once is not None:
        raise MissingDerivativeError(f"the backward of {once} is marked @once_differentiable")
