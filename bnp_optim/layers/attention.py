"""``nn.MultiheadAttention``: the projections of query, key and value, packed or apart, and ``out_proj``.

Statistics see every position, padded ones too; ``N`` counts sequences. ``out_proj`` is never called as a module, so its
input is taken from where autograd keeps it for the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnp_optim.layers.base import ModuleAdapter, Part, Rows, Samples
from bnp_optim.layers.registry import register_layer

_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
# torch 2.6 does not tell whether hooks pack what autograd saves, and unpacking then may recompute a checkpoint
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
# What lies between a product and the module's output, and between a weight and its product
_RESHAPED = frozenset({"ViewBackward0", "UnsafeViewBackward0", "TransposeBackward0", "SqueezeBackward1"})
_RECAST = frozenset({"TBackward0", "ToCopyBackward0"})
_FACTOR = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}


class MultiheadAttentionAdapter(ModuleAdapter):
    """``in_proj_weight`` is one layer of three groups; with ``kdim`` or ``vdim`` there are three layers."""

    def parts(self, module: nn.Module) -> Sequence[Part]:
        attention = cast(nn.MultiheadAttention, module)
        width = attention.embed_dim
        out = Part(Rows(groups=1, channels=width), owner="out_proj")
        if attention._qkv_same_embed_dim:
            return Part(Rows(groups=3, channels=width), "in_proj_weight", "in_proj_bias"), out
        channels = (width, attention.kdim, attention.vdim)
        # one bias serves all three, so it is no bias of any
        return *(Part(Rows(1, c), name, None) for name, c in zip(_APART, channels, strict=True)), out

    def reason(self, module: nn.Module, name: str) -> str | None:
        if name == "in_proj_bias" and module._parameters.get(_APART[0]) is not None:
            return "one bias of three weights, which have inputs of their own"
        if name in ("bias_k", "bias_v"):
            return "multiplies no input: it is a key or value itself"
        return None

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        """N, ``out_proj``'s input or None, then query, key and value; a number for one that was there before."""
        query, key, value = (
            args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("query", "key", "value"))
        )
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
            return None
        n = 1 if query.dim() == 2 else query.shape[0 if cast(nn.MultiheadAttention, module).batch_first else 1]
        own = module._parameters
        if not any(p is not None and p.requires_grad for p in map(own.get, ("in_proj_weight", *_APART))):
            return n, _out_input(module, output)  # autograd keeps none of the three, so they may change
        again = 0 if value is query else 1 if value is key else value
        return n, _out_input(module, output), query, 0 if key is query else key, again

    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        packed = cast(nn.MultiheadAttention, module)._qkv_same_embed_dim
        n, out, *given = kept
        flat: list[Tensor] = []
        for x in given:
            flat.append(flat[x] if isinstance(x, int) else x.reshape(-1, x.shape[-1]))
        projections: list[Samples | None]
        if not flat:
            projections = [None] * (1 if packed else 3)
        elif packed:
            projections = [Samples(tuple(flat), n)]
        else:
            projections = [Samples(x, n) for x in flat]
        return [*projections, None if out is None else Samples(out, n)]

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        # as a Linear's, which out_proj is too
        return weight if rows.groups == 1 else super().matrix(rows, weight)


def _out_input(module: nn.Module, output: Any) -> Tensor | None:
    """What ``out_proj`` was applied to, if autograd keeps it as it is.

    The module computes ``linear(heads, out_proj.weight, out_proj.bias)`` and reshapes the result: so the node of that
    product is a few nodes behind the output. It is the right one only if its other factor is that very weight.
    """
    if torch.compiler.is_compiling() or _saved_tensor_hooks is None or torch._C._are_functorch_transforms_active():
        return None
    if _saved_tensor_hooks(True) is not None:
        return None
    holder = module._modules.get("out_proj")
    weight = None if holder is None else holder._parameters.get("weight")
    attended = output[0] if isinstance(output, tuple) else None
    if weight is None or not weight.requires_grad or not isinstance(attended, Tensor):
        return None
    product = _behind(attended.grad_fn, _RESHAPED)
    factor = None if product is None else _FACTOR.get(product.name())
    if factor is None or getattr(_behind(product.next_functions[-1][0], _RECAST), "variable", None) is not weight:
        return None
    return cast(Tensor, getattr(product, factor)).detach()


def _behind(node: Any, names: frozenset[str]) -> Any:
    """The first node from ``node`` on, from output to input, that is of another kind than ``names``."""
    while node is not None and node.name() in names:
        node = node.next_functions[0][0]
    return node


register_layer(nn.MultiheadAttention, MultiheadAttentionAdapter())
