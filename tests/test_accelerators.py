"""What accelerators run: the path on which the host reads nothing, tried without one, and on CUDA where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnp_optim import BNPreconditioner
from bnp_optim.ledger import DeviceLedger, HostLedger
from tests.conftest import (
    assert_same_statistics,
    assert_same_weights,
    backward,
    count,
    inputs,
    mlp,
    same,
    train,
    weights,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mode": "two_sided"},
    {"step_scale": "spectral"},
    {"step_scale": "fan_in", "debias": False, "variance": "batch"},
]


def on_device(optimizer: BNPreconditioner) -> BNPreconditioner:
    """Let the wrapper of a CPU model work as on an accelerator."""
    tracker = optimizer._tracker
    tracker._on_host = False
    tracker.reset()
    assert isinstance(tracker._shelves[0][0].bank.ledger, DeviceLedger)
    return optimizer


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 2, bias=False), nn.Flatten(), nn.Linear(16, 3)
    )


def images(steps: int, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, 2, 5, 5, generator=generator) + 1 for _ in range(steps)]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_ledgers_lead_to_the_same_numbers(options: dict[str, Any], batch: int) -> None:
    a, b = net(), net()
    host = BNPreconditioner(torch.optim.SGD(a.parameters(), lr=0.02), a, **options)
    device = on_device(BNPreconditioner(torch.optim.SGD(b.parameters(), lr=0.02), b, **options))
    assert isinstance(host._tracker._shelves[0][0].bank.ledger, HostLedger)
    for i, x in enumerate(images(8, batch)):
        for model, optimizer in ((a, host), (b, device)):
            optimizer.zero_grad()
            backward(model, x if i != 4 else x[: max(1, batch // 2)])
            optimizer.step()
    assert_same_statistics(host, device, 1e-5)
    assert_same_weights(a, b, 1e-5)


def test_a_poisoned_batch_changes_nothing_without_the_host_knowing() -> None:
    poisoned, clean = net(), net()
    a, b = (
        on_device(BNPreconditioner(torch.optim.SGD(m.parameters(), lr=0.02), m, step_scale="spectral"))
        for m in (poisoned, clean)
    )
    for i, x in enumerate(images(5, 4)):
        if i in (0, 3):  # as the first batch, and as a later one
            kept = weights(poisoned)
            a.zero_grad()
            backward(poisoned, x * float("nan"))
            a.step()
            poisoned.load_state_dict(kept)
            continue
        for model, optimizer in ((poisoned, a), (clean, b)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert int(a.statistics["0"].count) == 3 * 4 * 25
    assert_same_statistics(a, b, 0)
    assert same(dict(poisoned.state_dict()), dict(clean.state_dict()))
    directions = [[p.intake.direction for p in x._tracker._places.values()] for x in (a, b)]
    assert same(*directions)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("step_scale", ["trace", "common", "spectral", "fan_in", None])
def test_the_host_reads_nothing(base: Any, step_scale: Any) -> None:
    """Tensors on the meta device have no values: whoever reads one fails."""
    with torch.device("meta"):
        model = net()
        data = [torch.empty(batch, 2, 5, 5) for batch in (4, 4, 1, 2)]
    optimizer = BNPreconditioner(base(model.parameters(), lr=0.1, foreach=False), model, step_scale=step_scale)
    assert isinstance(optimizer._tracker._shelves[0][0].bank.ledger, DeviceLedger)
    train(model, optimizer, data)
    assert optimizer.coverage().preconditioned == ("0.weight", "0.bias", "2.weight", "4.weight", "4.bias")
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.statistics["0"].mean.tolist()


class NoDouble(TorchDispatchMode):
    """As on MPS, which has no float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            assert not (isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64), func
        return result


MODELS: dict[str, Any] = {
    "convolutions": (net, (4, 2, 5, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3, stride=2), nn.ReLU()), (4, 3, 5)),
    "recurrent": (lambda: nn.LSTM(3, 4, batch_first=True), (4, 5, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (4, 5, 8)),
    "bilinear": (lambda: Pair(), (4, 3)),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(3, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.both(x, x)
        return y


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("step_scale", ["trace", "common", "spectral"])
@pytest.mark.parametrize("model", MODELS)
def test_no_float64_on_the_device(model: str, step_scale: Any, base: Any) -> None:
    build, shape = MODELS[model]
    with torch.device("meta"):
        module, x = build(), torch.empty(shape)
    with NoDouble():
        optimizer = BNPreconditioner(base(module.parameters(), lr=0.1, foreach=False), module, step_scale=step_scale)
        for _ in range(2):
            optimizer.zero_grad()
            output = module(x)
            (output[0] if isinstance(output, tuple) else output).square().mean().backward()
            optimizer.step()
        optimizer.state_dict()
    assert isinstance(optimizer._tracker._shelves[0][0].bank.ledger, DeviceLedger)
    assert optimizer.coverage().preconditioned
    with NoDouble(), pytest.raises(AssertionError, match="aten"):
        torch.ones(2, device="meta").double()  # it would have been seen


@needs_cuda
def test_a_captured_graph_trains_like_eager() -> None:
    eager, captured = mlp().cuda(), mlp().cuda()
    a, b = (
        BNPreconditioner(torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1, device="cuda")), m)
        for m in (eager, captured)
    )
    data = [x.cuda() for x in inputs(8)]
    static = data[0].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in data[:3]:
            static.copy_(x)
            b.zero_grad()
            backward(captured, static)
            b.step()
    torch.cuda.current_stream().wait_stream(stream)
    b.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(captured, static)
        b.step()
    for x in data[3:]:
        static.copy_(x)
        graph.replay()
    train(eager, a, data)
    assert_same_statistics(a, b, 1e-5)
    assert_same_weights(eager, captured, 1e-5)


@needs_cuda
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_no_synchronization_on_cuda(base: Any) -> None:
    model = mlp().cuda()
    optimizer = BNPreconditioner(base(model.parameters(), lr=0.1, foreach=True), model)
    data = [x.cuda() for x in inputs(4)]
    train(model, optimizer, data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, optimizer, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count(optimizer) == 2 * 4 * 8
