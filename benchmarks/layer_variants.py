"""The nets and the alternatives that the layer-choices benchmark compares: what the package might do, but does not.

* :func:`plain_columns`: a weight without bias gets P = (1/q) diag(1/σ̃), not the rank-one P.
* :class:`PatchConv2d`: a convolution whose statistics are those of the patches that its taps see, zeros included.
* :class:`TokenEmbedding`: an embedding as the Linear that it is on one-hot inputs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import BasicBlock, cnn, norm2d
from bnp_optim import transform
from bnp_optim.layers import LayerAdapter, Rows, Samples, register_layer
from bnp_optim.layers.conv import ConvAdapter
from bnp_optim.transform import Factors

CONTEXT, VOCABULARY = 8, 2000


def columns_precondition(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``g ← P Pᵀ g`` with P = (1/q) diag(1/σ̃) where there is no bias; the package's own where there is."""
    if bias is not None:
        transform.precondition(weight, bias, f)
    else:
        weight.mul_(_over_rows(f.scale2))


def columns_to_z(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``g ← Pᵀ g``, likewise."""
    if bias is not None:
        transform.to_z(weight, bias, f)
    else:
        weight.mul_(_over_rows(f.scale))


def columns_from_z(weight: Tensor, bias: Tensor | None, f: Factors) -> None:
    """``Δz ← P Δz``, likewise: a diagonal P is its own transpose."""
    if bias is not None:
        transform.from_z(weight, bias, f)
    else:
        weight.mul_(_over_rows(f.scale))


def _over_rows(scale: Tensor) -> Tensor:
    return scale if scale.dim() == 1 else scale.unsqueeze(-2)


@contextmanager
def plain_columns() -> Iterator[None]:
    """Inside, BNPreconditioner scales the columns of weights without bias, and does not centre."""
    with (
        mock.patch("bnp_optim.preconditioner.precondition", columns_precondition),
        mock.patch("bnp_optim.two_sided.to_z", columns_to_z),
        mock.patch("bnp_optim.two_sided.from_z", columns_from_z),
    ):
        yield


class PatchConv2d(nn.Conv2d):
    """A ``Conv2d`` (one group, zero padding) that BNPreconditioner measures by patches; computes what ``Conv2d`` does.

    A class of its own, so that the registry's entry for ``Conv2d`` stays as it is.
    """


class PatchAdapter(ConvAdapter):
    """Every (channel, tap) is an input of its own: mean and variance over all output positions, padding included."""

    def rows(self, module: nn.Module) -> Rows:
        return Rows(groups=1, channels=cast(Tensor, module.weight)[0].numel())

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        conv = cast(nn.Conv2d, module)
        assert conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return Samples(F.unfold(input, conv.kernel_size, conv.dilation, conv.padding, conv.stride), input.shape[0])


def measure_by_patches(net: nn.Module) -> None:
    """Turn every ``Conv2d`` of ``net`` into a :class:`PatchConv2d`, weights and all."""
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = PatchConv2d


class TokenEmbedding(nn.Embedding):
    """An embedding of tokens that come as floats: the package looks at floating-point inputs only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.long())


class EmbeddingAdapter(LayerAdapter):
    """One-hot inputs: the mean of token j is its frequency f, the variance f (1 - f); every position is a sample."""

    def rows(self, module: nn.Module) -> Rows:
        return Rows(groups=1, channels=cast(nn.Embedding, module).num_embeddings)

    def samples(self, module: nn.Module, input: Tensor) -> Samples:
        index = input.long().reshape(-1, 1)
        values = torch.zeros(len(index), cast(nn.Embedding, module).num_embeddings).scatter_(1, index, 1.0)
        return Samples(values, len(index))

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight.t()

    def respond(self, module: nn.Module, input: Tensor, direction: Tensor) -> Tensor:
        return direction[0][input.long().flatten()][:, None, None]

    def correlate(self, module: nn.Module, input: Tensor, response: Tensor) -> Tensor:
        total = response.new_zeros(1, cast(nn.Embedding, module).num_embeddings)
        return total.index_add_(1, input.long().flatten(), response[:, 0, 0][None])


register_layer(PatchConv2d, PatchAdapter())
register_layer(TokenEmbedding, EmbeddingAdapter())


def without_biases(net: nn.Module) -> nn.Module:
    """The same net, its layers' biases taken away."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bias = None
    return net


def resnet8(*, norm: bool) -> nn.Sequential:
    """A stem and three stages of one block, 16-32-64 channels, convolutions without bias, with BatchNorm or without.

    Without it the last layer has no bias either, so that no layer has one.
    """
    kind = "bn" if norm else "none"
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm2d(16, kind), nn.ReLU())
    n_in = 16
    for stage, width in enumerate((16, 32, 64)):
        net.append(BasicBlock(n_in, width, 2 if stage else 1, kind))
        n_in = width
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    if norm:
        net[0].bias = None
        return net.append(nn.Linear(n_in, 10))
    return cast(nn.Sequential, without_biases(net.append(nn.Linear(n_in, 10))))


def token_net(vocabulary: int) -> nn.Sequential:
    """The next token from the last ones: embeddings side by side, one hidden layer."""
    return nn.Sequential(
        TokenEmbedding(vocabulary, 64), nn.Flatten(), nn.Linear(64 * CONTEXT, 128), nn.ReLU(),
        nn.Linear(128, vocabulary),
    )  # fmt: skip


NETS = {
    "cnn-no-bias": lambda: without_biases(cnn("none")),
    "resnet8-bn": lambda: resnet8(norm=True),
    "resnet8": lambda: resnet8(norm=False),
    "cnn": lambda: cnn("none"),
    "text": lambda: token_net(VOCABULARY + 1),
}


class Text(NamedTuple):
    """Token ids, 0 for the rare ones, of the files that are trained on and of every tenth, which is not."""

    train: Tensor
    validation: Tensor


def load_text(folder: Path | None = None, vocabulary: int = VOCABULARY) -> Text:
    """The sources of Python's standard library (the files right in its folder) as words, signs and line ends."""
    paths = sorted((folder or Path(os.__file__).parent).glob("*.py"))
    files = [re.findall(r"\w+|\n|[^\w\s]", path.read_text(errors="replace")) for path in paths]
    train = [t for i, tokens in enumerate(files) if i % 10 for t in tokens]
    validation = [t for tokens in files[::10] for t in tokens]
    ids = {token: i for i, (token, _) in enumerate(Counter(train).most_common(vocabulary), start=1)}
    return Text(*(torch.tensor([ids.get(t, 0) for t in tokens]) for tokens in (train, validation)))


def contexts(text: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens before each of ``positions`` (≥ CONTEXT), as floats, and the token there."""
    return text[positions[:, None] + torch.arange(-CONTEXT, 0)].float(), text[positions]
