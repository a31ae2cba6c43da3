"""What is exchanged, without processes: several ranks' buffers in one, merged against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner, exchange
from bnp_optim.distributed import Ranks
from bnp_optim.exchange import Exchange
from tests.conftest import wrap
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer


class Ring:
    """Stands for a process group: its ranks take turns, and the last to come hands all buffers out."""

    def __init__(self, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranks = ranks
        self.sent: list[Tensor] = []
        monkeypatch.setattr(exchange, "_all_gather", self.gather)

    def size(self) -> int:
        return self.ranks

    def gather(self, out: Tensor, mine: Tensor, group: Any) -> None:
        self.sent.append(mine.clone())
        if len(self.sent) == self.ranks:
            out.copy_(torch.stack(self.sent))
            self.sent.clear()

    def step(self, model: nn.Module, optimizer: BNPreconditioner, parts: list[Tensor | None]) -> None:
        """The step of the last rank, once the others have sent their samples."""
        tracker = optimizer._tracker
        batches: Any = []
        optimizer.zero_grad()
        for x in parts:
            model.zero_grad(set_to_none=False)
            if x is not None:
                model(x).square().mean().backward()
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            tracker.live(optimizer._owned())
            batches.append(([[place.take() for place in shelf] for shelf in tracker._shelves], None))
            batches[-1] = (batches[-1][0], [[place.projection for place in shelf] for shelf in tracker._shelves])

        def share(shelves: Any, _: Any, *, on_host: bool, error: Any) -> Any:
            flat = Exchange(shelves, self, on_host=on_host)
            for moments, projections in batches:
                for shelf, row in zip(shelves, projections, strict=True):
                    for place, projection in zip(shelf, row, strict=True):
                        place.projection = projection
                last = len(self.sent) == self.ranks - 1
                if last:
                    return flat(moments)[1]
                flat(moments)
            return None

        tracker.live(optimizer._owned())
        with torch.no_grad():
            tracker.commit(share)
        tracker.release()


def parts(ranks: int, step: int, *, center: float, spread: float, dtype: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    sizes = [(3 * step + 5 * r) % 6 for r in range(ranks)]  # some have none
    return [
        (torch.randn(n, 4, generator=generator, dtype=torch.float64) * spread + center).to(dtype) if n else None
        for n in sizes
    ]


@pytest.mark.parametrize("blind", [False, True], ids=["counts on the host", "counts on the device"])
@pytest.mark.parametrize("scale", ["trace", "spectral", "fan_in"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_merged_statistics_are_those_of_numpy(
    ranks: int, scale: str, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = wrap(model, step_scale=scale)
    if blind:
        optimizer._tracker._on_host = False
        optimizer._tracker.reset()
    direction = optimizer._tracker._shelves[0][0].intake.direction
    start = None if direction is None else direction.numpy().copy()
    reference = ReferenceBNP(ReferenceLayer("linear", (3, 4), True), step_scale=scale, direction=start)
    ring = Ring(ranks, monkeypatch)
    for step in range(6):
        batch = parts(ranks, step, center=3.0, spread=0.7, dtype=torch.float64)
        ring.step(model, optimizer, batch)
        reference.observe(torch.cat([x for x in batch if x is not None]).numpy())
        reference.commit()
    found = optimizer._tracker.snapshot(optimizer._tracker.layers[0])
    np.testing.assert_allclose(found["mean"], reference.mean, rtol=1e-12)
    np.testing.assert_allclose(found["variance"], reference.variance, rtol=1e-12)
    np.testing.assert_allclose(found["q2"], reference.q2, rtol=1e-12)


@pytest.mark.parametrize("center", [1e4, -1e4])
def test_means_far_from_zero_cost_no_digits_of_the_variance(center: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model)
    batch = parts(8, 1, center=center, spread=1.0, dtype=torch.float32)
    Ring(8, monkeypatch).step(model, optimizer, batch)
    samples = torch.cat([x for x in batch if x is not None]).double().numpy()
    np.testing.assert_allclose(optimizer.statistics["0"].variance, samples.var(0), rtol=2e-3)  # the mean's last digit
    np.testing.assert_allclose(optimizer.statistics["0"].mean, samples.mean(0), rtol=1e-7)


def test_what_is_constant_on_all_ranks_has_no_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model)
    Ring(3, monkeypatch).step(model, optimizer, [torch.full((n, 4), 0.1) for n in (1, 5, 2)])
    assert optimizer.statistics["0"].variance.tolist() == [0.0] * 4
    assert optimizer.statistics["0"].mean.tolist() == [torch.tensor(0.1).item()] * 4
    assert int(optimizer.statistics["0"].count) == 8


@pytest.mark.parametrize("blind", [False, True])
def test_counts_are_exact(blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, 2^24 + 1 is 2^24."""
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model)
    tracker = optimizer._tracker
    if blind:
        tracker._on_host = False
        tracker.reset()
    take = type(tracker._shelves[0][0]).take
    huge = 2**24 + 1
    monkeypatch.setattr(
        type(tracker._shelves[0][0]),
        "take",
        lambda self: None if (m := take(self)) is None else m._replace(observations=huge, samples=huge),
    )
    Ring(2, monkeypatch).step(model, optimizer, [torch.ones(2, 4), torch.zeros(2, 4)])
    assert int(optimizer.statistics["0"].count) == 2 * huge
    assert optimizer.statistics["0"].mean.tolist() == [0.5] * 4
    assert optimizer.statistics["0"].variance.tolist() == [0.25] * 4


def test_layers_of_both_precisions_share_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 3).double(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(x).double()).float())  # type: ignore[no-any-return]

    model = Mixed()
    optimizer = wrap(model)
    data = [torch.randn(n, 4) for n in (2, 3)]
    Ring(2, monkeypatch).step(model, optimizer, list(data))
    inside = model.one(torch.cat(data)).double()
    expected = inside.detach().numpy()
    found = optimizer.statistics["two"]
    assert found.mean.dtype == torch.float64
    # the inputs come in float32, one part or the other
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.variance, expected.var(0), rtol=1e-6)
    last = model.three(model.two(inside).float())
    assert optimizer.statistics["three"].mean.dtype == torch.float32
    assert last.shape == (5, 2)
    np.testing.assert_allclose(
        optimizer.statistics["three"].mean, model.two(inside).detach().numpy().mean(0), rtol=1e-5
    )


def test_a_process_that_trains_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no exchange is due")

    monkeypatch.setattr(Ranks, "share", never)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrap(model)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.synchronization is None
