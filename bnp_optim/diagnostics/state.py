"""What extra forward passes may change, remembered and put back to the last bit."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ModuleState", "RandomState"]

Restore = Callable[[], Any]

# torch's own books (hooks, children, …), which a forward pass does not rewrite
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}


class RandomState:
    """The state of every random number generator that training draws from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
        numpy = sys.modules.get("numpy")  # not imported: nobody has drawn from it
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Put the generators back to where they were."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


class ModuleState:
    """Everything in a module and its children that a training step may change, but the values of the parameters.

    That is: buffers (values, and which tensor it is), ``training``, ``requires_grad``, ``.grad``, and attributes:
    plain values, tensors, and lists, dicts, sets and deques of such (of their tensors, which ones these are). So
    metrics' states and lists that a module appends to are covered; objects of other classes are not.

    While this exists parameters have no ``.grad``, so that nothing can be accumulated into the training's own.

    Args:
        root: The module.
    """

    def __init__(self, root: nn.Module) -> None:
        self._memo: dict[int, Restore] = {}
        self._modules = [(m, self._attributes(m), self._buffers(m)) for m in root.modules()]
        self._parameters = [(p, p.requires_grad, p.grad) for p in root.parameters()]
        for p, _, _ in self._parameters:
            p.grad = None

    def restore(self) -> None:
        """Put everything back; gradients stay away until :meth:`close`."""
        for module, attributes, buffers in self._modules:
            known = module.__dict__
            for name in [n for n in known if n not in attributes and n not in _INTERNAL]:
                del known[name]
            known.update({name: restore() for name, restore in attributes.items()})
            module._buffers.update({name: restore() for name, restore in buffers.items()})
        for p, requires_grad, _ in self._parameters:
            p.grad = None
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)

    def close(self) -> None:
        """Restore, and put the gradients back."""
        self.restore()
        for p, _, grad in self._parameters:
            p.grad = grad

    def _attributes(self, module: nn.Module) -> dict[str, Restore]:
        return {n: self._remember(v, own=True) for n, v in module.__dict__.items() if n not in _INTERNAL}

    def _buffers(self, module: nn.Module) -> dict[str, Restore]:
        return {name: self._remember(buffer, own=True) for name, buffer in module._buffers.items()}

    def _remember(self, value: Any, *, own: bool = False) -> Restore:
        """How to get ``value`` back as it is now; each object once, however many places hold it."""
        if isinstance(value, Tensor) and (not own or isinstance(value, nn.Parameter)):
            return lambda: value
        if id(value) not in self._memo:
            self._memo[id(value)] = lambda: value  # a container that holds itself ends here
            self._memo[id(value)] = self._content(value)
        return self._memo[id(value)]

    def _content(self, value: Any) -> Restore:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, dict):
            entries = [(key, self._remember(x)) for key, x in value.items()]

            def refill() -> Any:
                value.clear()
                value.update({key: restore() for key, restore in entries})
                return value

            return refill
        if isinstance(value, list | deque):
            items = [self._remember(x) for x in value]

            def rebuild() -> Any:
                value.clear()
                value.extend([restore() for restore in items])
                return value

            return rebuild
        if isinstance(value, set):
            members = set(value)

            def reset() -> Any:
                value.clear()
                value.update(members)
                return value

            return reset
        return lambda: value


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _tensor(value: Tensor) -> Restore:
    if torch.nn.parameter.is_lazy(value):
        return lambda: value
    saved = value.detach().clone()

    def write() -> Tensor:
        # NOTE: through .data, which leaves the version counter alone: a graph that has saved this tensor must still
        # accept it, since its values are what they were
        with torch.no_grad():
            value.data.copy_(saved)
        return value

    return write
