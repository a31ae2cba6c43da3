"""``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells: input-to-hidden and hidden-to-hidden weights.

Both are linear, the gates' pre-activations being ``W_ih [1; x] + W_hh [1; h]`` (GRU's new gate multiplies the second
term afterwards, which changes nothing), so each has a P of its own, from the inputs or from the hidden states that it
multiplied: the initial one, and every output but that of a sequence's last step. LSTM's projection ``weight_hr``
multiplies what never leaves the kernel, and passes through.

``N`` is the number of sequences, not of steps: a sequence's steps share a loss and are far from independent. Measured
with an LSTM(28, 64) on MNIST's rows, one pass, two seeds, accuracy at the best of a grid of rates, sequences / steps:
BNP-SGD .906 (at .03) / .840 (.01) at batch size 32 and .694 (.1) / .604 (.01) at 1, BNP-AdamW .928 / .922 and
.761 / .678. A cell cannot know which of its calls go on with the same sequences, so there each call's rows count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bnp_optim.layers.base import ModuleAdapter, Part, Rows, Samples
from bnp_optim.layers.registry import register_layer


class _Call(NamedTuple):
    """What is kept of a forward call of a fused layer.

    Args:
        input: (T, B, F), (B, T, F), (T, F), or the data of a packed sequence, (real steps, F).
        output: In the same layout.
        batch_sizes: Of a packed sequence.
        order: How a packed sequence's samples were sorted, as ``h_0`` is not.
        hidden: ``h_0`` (layers × directions, B, H), (layers × directions, H), or None: zeros.
        cell: ``c_0`` of an LSTM, likewise.
    """

    input: Tensor
    output: Tensor
    batch_sizes: Tensor | None
    order: Tensor | None
    hidden: Tensor | None
    cell: Tensor | None


class RecurrentAdapter(ModuleAdapter):
    """Fused layers, of any depth, in one direction or both; a packed sequence counts its real steps.

    What the layers below the last made never left the fused kernel, so these are run again, one by one; a module of
    one layer needs none of that.
    """

    uses_weights = True

    def parts(self, module: nn.Module) -> Sequence[Part]:
        rnn = cast(nn.RNNBase, module)
        hidden, directions = _hidden_size(rnn), _directions(rnn)
        found = []
        for i, (w_ih, w_hh, *rest) in enumerate(rnn._all_weights):
            b_ih, b_hh = rest[:2] if rnn.bias else (None, None)
            inputs = rnn.input_size if i < directions else directions * hidden
            found += [Part(Rows(1, inputs), w_ih, b_ih), Part(Rows(1, hidden), w_hh, b_hh)]
        return found

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        input, hx = _arguments(args, kwargs)
        hidden, cell = (hx, None) if hx is None or isinstance(hx, Tensor) else hx
        outputs = output[0] if isinstance(output, tuple) else None  # a subclass may return something else
        batch_sizes = order = None
        if isinstance(input, PackedSequence) and isinstance(outputs, PackedSequence):
            outputs = outputs.data
            input, batch_sizes, order, _ = input
        if not (isinstance(input, Tensor) and isinstance(outputs, Tensor)) or input.numel() == 0:
            return None
        if input.shape[:-1] != outputs.shape[:-1]:
            return None
        return _Call(input, outputs, batch_sizes, order, hidden, cell)

    @torch.no_grad()
    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        rnn = cast(nn.RNNBase, module)
        call = _batched(rnn, _Call(*kept))
        directions, size, sequences = _directions(rnn), _hidden_size(rnn), _sequences(rnn, call)
        zeros = call.output.new_zeros(sequences, size)
        generator: torch.Generator | None = None
        samples = []
        inputs = call.input
        for layer in range(rnn.num_layers):
            top = layer == rnn.num_layers - 1
            outputs = call.output if top else _run(rnn, layer, inputs, call)
            seen = inputs.flatten(0, -2)
            for direction in range(directions):
                own = outputs[..., direction * size : (direction + 1) * size]
                first = zeros if call.hidden is None else call.hidden[layer * directions + direction]
                samples += [Samples(seen, sequences), Samples(_multiplied(rnn, call, own, first, direction), sequences)]
            if not top and rnn.training and rnn.dropout > 0:
                generator = generator or _generator(rnn, outputs.device)
                outputs = outputs * _mask(outputs, rnn.dropout, generator)
            inputs = outputs
        return samples


class CellAdapter(ModuleAdapter):
    """Cells: the input and the hidden state, as they come; of a batch every row is a sample."""

    def parts(self, module: nn.Module) -> Sequence[Part]:
        cell = cast(nn.RNNCellBase, module)
        b_ih, b_hh = ("bias_ih", "bias_hh") if cell.bias else (None, None)
        return (
            Part(Rows(1, cell.input_size), "weight_ih", b_ih),
            Part(Rows(1, cell.hidden_size), "weight_hh", b_hh),
        )

    def matrix(self, rows: Rows, weight: Tensor) -> Tensor:
        return weight

    def keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Any, ...] | None:
        input, hx = _arguments(args, kwargs)
        if not isinstance(input, Tensor):
            return None
        return input, hx if hx is None or isinstance(hx, Tensor) else hx[0]

    def read(self, module: nn.Module, kept: tuple[Any, ...]) -> Sequence[Samples | None]:
        input, hidden = kept
        seen = input.reshape(-1, input.shape[-1])
        size = cast(nn.RNNCellBase, module).hidden_size
        states = seen.new_zeros(seen.shape[0], size) if hidden is None else hidden.reshape(-1, size)
        return Samples(seen, seen.shape[0]), Samples(states, seen.shape[0])


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    input = args[0] if args else kwargs.get("input")
    return input, args[1] if len(args) > 1 else kwargs.get("hx")


def _directions(rnn: nn.RNNBase) -> int:
    return 2 if rnn.bidirectional else 1


def _hidden_size(rnn: nn.RNNBase) -> int:
    """Of what an output holds for one direction."""
    return rnn.proj_size or rnn.hidden_size


def _batched(rnn: nn.RNNBase, call: _Call) -> _Call:
    """The same with a batch dimension, and the initial states in the order of the samples."""
    states = [call.hidden, call.cell]
    input, output = call.input, call.output
    if call.batch_sizes is None and input.dim() == 2:
        batch = 0 if rnn.batch_first else 1
        input, output = input.unsqueeze(batch), output.unsqueeze(batch)
        states = [None if x is None else x.unsqueeze(1) for x in states]
    if call.order is not None:
        order = call.order
        states = [None if x is None else x.index_select(1, order) for x in states]
    return _Call(input, output, call.batch_sizes, None, *states)


def _sequences(rnn: nn.RNNBase, call: _Call) -> int:
    if call.batch_sizes is not None:
        return int(call.batch_sizes[0])
    return call.input.shape[0 if rnn.batch_first else 1]


def _multiplied(rnn: nn.RNNBase, call: _Call, outputs: Tensor, first: Tensor, reverse: int) -> Tensor:
    """The hidden states that one direction multiplied, (real steps, H): ``first``, and outputs but the last ones."""
    if call.batch_sizes is None:
        time = 1 if rnn.batch_first else 0
        rest = outputs.narrow(time, reverse, outputs.shape[time] - 1)
        return torch.cat([first.unsqueeze(time), rest], time).flatten(0, 1)
    # the rows of a packed sequence are all samples at step 0, those still going on at step 1, and so on
    sizes, start = call.batch_sizes, first.shape[0]
    if reverse:
        return torch.cat([first, outputs[start:]])
    # a row of step t > 0 multiplied the one of its sample at t - 1, batch_sizes[t - 1] rows before it
    before = torch.arange(start, outputs.shape[0]) - torch.repeat_interleave(sizes[:-1], sizes[1:])
    return torch.cat([first, outputs[before.to(outputs.device, non_blocking=True)]])


def _run(rnn: nn.RNNBase, layer: int, inputs: Tensor, call: _Call) -> Tensor:
    """The outputs of one layer, in all of its directions."""
    directions = _directions(rnn)
    own = slice(layer * directions, (layer + 1) * directions)
    weights = [getattr(rnn, name) for names in rnn._all_weights[own] for name in names]
    sizes = [_hidden_size(rnn), rnn.hidden_size] if rnn.mode == "LSTM" else [_hidden_size(rnn)]
    states = [
        weights[0].new_zeros(directions, _sequences(rnn, call), size) if x is None else x[own].to(weights[0].dtype)
        for x, size in zip((call.hidden, call.cell), sizes, strict=False)
    ]
    hx: Any = states if rnn.mode == "LSTM" else states[0]
    fused = cast("Callable[..., tuple[Tensor, ...]]", getattr(torch, rnn.mode.lower()))
    form = (weights, rnn.bias, 1, 0.0, False, rnn.bidirectional)  # one layer, no dropout, not training
    with _quietly(inputs.device):
        inputs = inputs.to(weights[0].dtype)
        if call.batch_sizes is not None:
            return fused(inputs, call.batch_sizes, hx, *form)[0]
        return fused(inputs, hx, *form, rnn.batch_first)[0]


@contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """Without autocast, and without cuDNN's advice to flatten weights, which are a part of the module's."""
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        yield


def _generator(rnn: nn.RNNBase, device: torch.device) -> torch.Generator:
    """For masks other than the kernel's, which cannot be had, but with the same distribution.

    The seed changes from step to step, as the weight's version does, and neither does it use the global random
    numbers nor does it need a memory.
    """
    return torch.Generator(device).manual_seed(getattr(rnn, rnn._all_weights[0][0])._version)


def _mask(outputs: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    if dropout == 1:
        return torch.zeros_like(outputs)
    kept = torch.empty_like(outputs).bernoulli_(1 - dropout, generator=generator)
    return kept.div_(1 - dropout)


_recurrent, _cell = RecurrentAdapter(), CellAdapter()
for _fused in (nn.RNN, nn.LSTM, nn.GRU):
    register_layer(_fused, _recurrent)
for _single in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    register_layer(_single, _cell)
