"""Wrapped recurrent layers in the hands of others: coverage, checkpoints, copies, autocast, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import assert_same_statistics, assert_same_weights, count, same, weights, wrap
from tests.recurrent import classifier, sequences, step


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_coverage_names_every_parameter() -> None:
    rnn = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    optimizer = wrap(rnn)
    rnn(sequences())[0].sum().backward()
    optimizer.step()
    rows = list(optimizer.coverage())
    assert [row.name for row in rows] == [name for name, _ in rnn.named_parameters()]
    for row in rows:
        if "_hr_" in row.name:
            assert not row.preconditioned and row.why == f"no rule for the {row.name} of LSTM"
        else:
            weight = row.name.replace("bias", "weight")
            assert row.preconditioned and row.why == ("P" if row.name == weight else f"P, with {weight}")
    unbiased = wrap(nn.GRUCell(3, 4, bias=False)).coverage()
    assert all(row.why.startswith("rank-one P: no bias") for row in unbiased)


def test_a_checkpoint_goes_on_where_it_was() -> None:
    model, other = classifier(), classifier()
    optimizer = wrap(model, mode="two_sided", step_scale="spectral")
    for seed in range(3):
        step(model, optimizer, sequences(seed=seed))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = wrap(other, mode="two_sided", step_scale="spectral")
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for seed in (8, 9):
        step(model, optimizer, sequences(seed=seed))
        step(other, resumed, sequences(seed=seed))
    assert same(weights(model), weights(other))
    assert same(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_inert(copied: Any) -> None:
    model = classifier()
    optimizer = wrap(model)
    step(model, optimizer, sequences())
    twin = copied(model)
    twin(sequences()).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert count(optimizer, "rnn.hh_l1") == 30
    assert not twin.rnn._forward_hooks
    step(twin, wrap(twin), sequences())


@pytest.mark.parametrize("layers", [1, 2])
def test_autocast_and_activation_checkpoints(layers: int) -> None:
    exact, half, again = (classifier(layers) for _ in range(3))
    optimizers = [wrap(m) for m in (exact, half, again)]
    for seed in range(2):
        x = sequences(seed=seed)
        step(exact, optimizers[0], x)
        with torch.autocast("cpu", torch.bfloat16):
            loss = half(x).float().square().mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        step(lambda x: checkpoint(again, x, use_reentrant=False), optimizers[2], x)  # type: ignore[arg-type]
    assert_same_statistics(optimizers[0], optimizers[1], rtol=2e-2)
    assert_same_statistics(optimizers[0], optimizers[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("layers", [1, 2])
def test_compiled(layers: int) -> None:
    torch._dynamo.reset()
    eager, model = classifier(layers), classifier(layers)
    a, b = wrap(eager), wrap(model)
    compiled: Any = torch.compile(model, backend="eager")
    for seed in range(4):
        step(eager, a, sequences(seed=seed))
        step(compiled, b, sequences(seed=seed))
    assert_same_statistics(a, b)
    assert_same_weights(eager, model)
    torch._dynamo.reset()


class Unrolled(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        hx: Any = None
        for row in x:
            hx = self.cell(row, hx)
        return hx[0] if isinstance(hx, tuple) else hx


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_compiled_cells(kind: type[nn.RNNCellBase]) -> None:
    torch._dynamo.reset()
    eager = Unrolled(kind(3, 4))
    model = copy.deepcopy(eager)
    a, b = wrap(eager), wrap(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(3):
        step(eager, a, sequences(seed=seed))
        step(compiled, b, sequences(seed=seed))
    assert count(b, "cell.hh") == 90
    assert_same_statistics(a, b)
    assert_same_weights(eager, model)
    torch._dynamo.reset()


def test_subclasses_and_parametrized_weights() -> None:
    class OutputAlone(nn.GRU):
        def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input)[0]

    alone = OutputAlone(3, 4)
    optimizer = wrap(alone)
    alone(sequences()).sum().backward()
    with pytest.warns(UserWarning, match="no forward pass of any preconditioned layer was seen"):
        optimizer.step()

    class Own(nn.GRU):
        pass

    own = Own(3, 4)
    optimizer = wrap(own)
    own(sequences()[:, :0])[0].sum().backward()  # no sequence at all
    own(sequences())[0].sum().backward()
    optimizer.step()
    assert count(optimizer, "hh_l0") == 30

    rnn = torch.nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4, 2), "weight_hh_l0")
    optimizer = wrap(rnn)
    rnn(sequences())[0].sum().backward()
    optimizer.step()
    assert count(optimizer, "ih_l1") == 30
    assert "weight_hh_l0" not in "".join(optimizer.coverage().preconditioned)
