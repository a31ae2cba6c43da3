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

__all__ = ["MissingDerivativeError", "refuse_once_differentiable", "second_derivatives", "translated"]

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


def refuse_once_differentiable(result: Tensor) -> None:
    """Look for functions marked @once_differentiable behind ``result``.

    NOTE: torch raises for them in ``.backward()`` alone. ``torch.autograd.grad`` of chosen inputs leaves their second
    derivative out, silently.

    Raises:
        MissingDerivativeError: if there is one.
    """
    waiting: list[Any] = [result.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _WRAPPER:
            raise MissingDerivativeError(f"the backward of {function.__name__} is marked @once_differentiable")
        waiting.extend(following for following, _ in node.next_functions)
