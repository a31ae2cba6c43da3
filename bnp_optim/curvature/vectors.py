"""One flat vector for a list of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["flatten", "trained", "unflatten", "vector_dtype"]


def trained(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that require grad, each once.

    Raises:
        TypeError: if one of them is no tensor, is complex, or if ``params`` is a single tensor.
        ValueError: if none is left.
    """
    if isinstance(params, Tensor):
        raise TypeError("params is a tensor, it must be an iterable of parameters: write [parameter]")
    given = list(params)
    for i, p in enumerate(given):
        if not isinstance(p, Tensor) or p.is_complex():
            what = "a complex tensor" if isinstance(p, Tensor) else repr(p)
            raise TypeError(f"params[{i}] is {what}, it must be a real parameter, as in model.parameters()")
    kept = list({id(p): p for p in given if p.requires_grad}.values())
    if not kept:
        raise ValueError(
            f"params holds {len(given)} parameters, none of which requires grad: pass those that train, such as "
            "model.parameters()"
        )
    return kept


def vector_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """What vectors are computed in: the parameters' widest dtype, float32 at least."""
    dtype = torch.float32
    for p in params:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def flatten(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The tensors as one vector on the device and in the dtype of ``like``."""
    return torch.cat([t.detach().reshape(-1).to(like.device, like.dtype) for t in tensors])


def unflatten(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The vector as tensors with the shapes and devices of ``params``, in its own dtype; views where possible."""
    parts = torch.split(vector, [p.numel() for p in params])
    return [part.view(p.shape).to(p.device) for part, p in zip(parts, params, strict=True)]
