"""Recurrent layers against NumPy: unrolled by hand, which gives the inputs of every weight, and preconditioned."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bnp_optim import BNPreconditioner
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer
from tests.reference.numpy_rnn import Cell, unroll

# torch says so itself, to everybody
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

STEPS, SEQUENCES, TIME, FEATURES, UNITS = 3, 3, 4, 3, 4
LENGTHS = (2, 4, 1)  # of a packed batch, unsorted
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """A fused layer and how it is called."""

    kind: str  # "RNN_TANH" | "RNN_RELU" | "LSTM" | "GRU" | "LSTM_PROJ"
    depth: str  # "1" | "2" | "2bi" | "3" | "3bi"
    layout: str  # "dense" | "batch_first" | "packed" | "packed_hx" | "unbatched" | "hx"
    bias: bool = True

    @property
    def layers(self) -> int:
        return int(self.depth[0])

    @property
    def bidirectional(self) -> bool:
        return self.depth.endswith("bi")

    @property
    def size(self) -> int:
        return 2 if self.kind == "LSTM_PROJ" else UNITS

    def build(self) -> nn.RNNBase:
        shape: Any = (FEATURES, UNITS, self.layers, self.bias, self.layout == "batch_first", 0.0, self.bidirectional)
        if self.kind.startswith("RNN"):
            names = ("bias", "batch_first", "dropout", "bidirectional")
            return nn.RNN(*shape[:3], nonlinearity=self.kind[4:].lower(), **dict(zip(names, shape[3:], strict=True)))
        if self.kind == "GRU":
            return nn.GRU(*shape)
        return nn.LSTM(*shape, proj_size=2 if self.kind == "LSTM_PROJ" else 0)

    def inputs(self, generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sequences (steps, features), h_0 and c_0, exact in float32."""
        lengths = LENGTHS if self.layout.startswith("packed") else (TIME,) * SEQUENCES
        lengths = (TIME,) if self.layout == "unbatched" else lengths
        scale = torch.tensor([0.5, 1.0, 2.0])
        sequences = [torch.randn(n, FEATURES, generator=generator) * scale + 0.7 for n in lengths]
        starts = self.layers * (1 + self.bidirectional), len(lengths)
        given = self.layout.endswith("hx") or self.layout == "unbatched"
        h0, c0 = (torch.randn(*starts, n, generator=generator) * given for n in (self.size, UNITS))
        return [s.double() for s in sequences], h0.double(), c0.double()

    def call(self, layer: nn.RNNBase, sequences: list[Tensor], h0: Tensor, c0: Tensor) -> list[Tensor]:
        """The outputs, (steps, units) by sequence."""
        dtype = layer.weight_ih_l0.dtype
        hx: Any = (h0.to(dtype), c0.to(dtype)) if self.kind.startswith("LSTM") else h0.to(dtype)
        x = torch.nn.utils.rnn.pad_sequence(sequences).to(dtype)
        if self.layout == "unbatched":
            hx = tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
            return [layer(x[:, 0], hx=hx)[0]]
        if self.layout.startswith("packed"):
            packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
            y: PackedSequence = layer(packed, hx)[0] if self.layout == "packed_hx" else layer(packed)[0]
            padded, lengths = pad_packed_sequence(y)
            return [padded[:n, b] for b, n in enumerate(lengths)]
        if self.layout == "batch_first":
            return list(layer(input=x.transpose(0, 1))[0])
        return list((layer(x, hx) if self.layout == "hx" else layer(x))[0].unbind(1))


def references(layer: nn.Module, wrapper: BNPreconditioner, **options: Any) -> dict[str, ReferenceBNP]:
    """By the name of the weight."""
    found = {}
    for tracked in wrapper._tracker.layers:
        part = tracked.uses[0].part
        bias = tracked.bias is not None
        if options.get("step_scale") == "spectral":
            direction = wrapper._tracker.snapshot(tracked)["direction"].double().numpy()
            options["direction"] = direction if bias else direction[:, 1:]
        found[part.weight] = ReferenceBNP(ReferenceLayer("linear", tuple(tracked.shape), bias), **options)
    return found


def check_step(layer: nn.Module, double: nn.Module, wrapper: Any, oracle: dict[str, ReferenceBNP], mode: str) -> None:
    """One step with all gradients there and all samples observed; what the base is fed, and with it its update."""
    exact = {name: p.grad.numpy() for name, p in double.named_parameters()}
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()  # so that the update is read off without the rounding of w + Δw
    wrapper.step()
    for weight, reference in oracle.items():
        reference.commit()
        bias = weight.replace("weight", "bias")
        g_w, g_b = exact[weight], exact.get(bias)
        fed = reference.to_z(g_w, g_b) if mode == "two_sided" else reference.gradient_form(g_w, g_b)
        moved = reference.from_z(*fed) if mode == "two_sided" else fed
        scale = max(np.abs(g).max() for g in (g_w, g_b, *fed, *moved) if g is not None)
        for name, mapped, step in zip((weight, bias), fed, moved, strict=True):
            if mapped is None:
                continue
            parameter = layer.get_parameter(name)
            tolerance = TOLERANCE[parameter.dtype] * scale
            np.testing.assert_allclose(gradients[name].double().numpy(), mapped, rtol=0, atol=tolerance, err_msg=name)
            update = parameter.detach().double().numpy()
            np.testing.assert_allclose(update, -step, rtol=0, atol=tolerance, err_msg=f"update of {name}")
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.mul_(1e-2).add_(before[name])  # at rate 1 the gradients were read off well, but it would be too much


def check(case: Case, mode: str, dtype: torch.dtype, **options: Any) -> None:
    layer = case.build().to(dtype)
    double = copy.deepcopy(layer).double()
    wrapper = BNPreconditioner(torch.optim.SGD(layer.parameters(), lr=1.0), layer, mode=mode, **options)
    oracle = references(layer, wrapper, **options)
    assert len(oracle) == 2 * case.layers * (1 + case.bidirectional)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        with torch.no_grad():
            for mine, exact in zip(layer.parameters(), double.parameters(), strict=True):
                exact.copy_(mine)
        sequences, h0, c0 = case.inputs(generator)
        weights = [torch.rand(len(s), case.size * (1 + case.bidirectional), generator=generator) for s in sequences]
        for net in (layer, double):
            net.zero_grad()
            outputs = case.call(net, sequences, h0, c0)
            total = sum((y * (w + 0.5).to(y.dtype)).sum() for y, w in zip(outputs, weights, strict=True))
            total.backward()  # type: ignore[union-attr]
        unrolled, seen = unroll(
            case.kind.removesuffix("_PROJ"),
            {name: p.detach().numpy() for name, p in double.named_parameters()},
            [s.numpy() for s in sequences],
            h0.numpy(),
            c0.numpy(),
            layers=case.layers,
            bidirectional=case.bidirectional,
        )
        for y, by_hand in zip(outputs, unrolled, strict=True):
            np.testing.assert_allclose(y.detach().numpy(), by_hand, rtol=0, atol=1e-12)
        assert seen.keys() == oracle.keys()
        for name, rows in seen.items():
            assert len(rows) == sum(map(len, sequences))
            oracle[name].observe(rows, samples=len(sequences))
        check_step(layer, double, wrapper, oracle, mode)


KINDS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU", "LSTM_PROJ")
DEPTHS = ("1", "2", "2bi")
LAYOUTS = ("dense", "batch_first", "packed", "packed_hx", "unbatched", "hx")
GRID = [Case(*x, bias=i % 3 > 0) for i, x in enumerate(itertools.product(KINDS, DEPTHS, LAYOUTS))]
UNBIASED = [Case(kind, depth, "packed_hx", bias=False) for kind in KINDS for depth in DEPTHS]
DEEP = [Case("LSTM", "3bi", "packed_hx"), Case("LSTM_PROJ", "3", "hx"), Case("GRU", "3bi", "unbatched")]


def name_of(case: Case) -> str:
    return f"{case.kind}-{case.depth}-{case.layout}" + ("" if case.bias else "-no_bias")


@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
@pytest.mark.parametrize("case", list(dict.fromkeys(GRID + UNBIASED + DEEP)), ids=name_of)
def test_against_the_reference(case: Case, mode: str) -> None:
    check(case, mode, torch.float64)


@pytest.mark.parametrize("case", [c for c in GRID if c.depth == "2bi"], ids=name_of)
def test_against_the_reference_in_float32(case: Case) -> None:
    check(case, "gradient", torch.float32)


@pytest.mark.parametrize("step_scale", ["spectral", "fan_in", None])
@pytest.mark.parametrize("case", [c for c in GRID if c.kind in ("LSTM", "GRU") and c.depth == "2bi"], ids=name_of)
def test_step_scales_against_the_reference(case: Case, step_scale: str | None) -> None:
    check(case, "gradient", torch.float64, step_scale=step_scale)


CELLS: dict[str, Any] = {
    "RNN_TANH": nn.RNNCell,
    "RNN_RELU": lambda *a: nn.RNNCell(*a, nonlinearity="relu"),
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
}


@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
@pytest.mark.parametrize("layout", ["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cells_against_the_reference(dtype: torch.dtype, kind: str, bias: bool, layout: str, mode: str) -> None:
    """Unrolled over some steps, the first without a hidden state."""
    layer = CELLS[kind](FEATURES, UNITS, bias).to(dtype)
    double = copy.deepcopy(layer).double()
    wrapper = BNPreconditioner(torch.optim.SGD(layer.parameters(), lr=1.0), layer, mode=mode)
    oracle = references(layer, wrapper)
    generator = torch.Generator().manual_seed(5)
    rows = 1 if layout == "unbatched" else SEQUENCES
    for _ in range(STEPS):
        with torch.no_grad():
            for mine, exact in zip(layer.parameters(), double.parameters(), strict=True):
                exact.copy_(mine)
        x = torch.randn(TIME, rows, FEATURES, generator=generator) + 0.7
        for net in (layer, double):
            net.zero_grad()
            hx: Any = None
            for row in x.to(net.weight_ih.dtype):
                hx = net(row[0] if layout == "unbatched" else row, hx)
            (hx[0] if isinstance(hx, tuple) else hx).sum().backward()
        by_hand = Cell(kind, {name: p.detach().numpy() for name, p in double.named_parameters()})
        for b in range(rows):
            h = c = np.zeros(UNITS)
            for row in x[:, b].double().numpy():
                h, c = by_hand.step(row, h, c)
        for name, seen in by_hand.seen.items():
            oracle[name].observe(np.array(seen))
        check_step(layer, double, wrapper, oracle, mode)
