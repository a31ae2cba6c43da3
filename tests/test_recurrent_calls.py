"""Which calls of a recurrent layer count, and what becomes of its statistics: dropout, copies, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

from tests.conftest import assert_same_statistics, assert_same_weights, count, same, weights, wrap

F64 = torch.float64


class Classifier(nn.Module):
    """The last output of an LSTM (or another) through a linear layer."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x)[0][-1])


def classifier(layers: int = 2, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Classifier(kind(3, 4, layers, **options))


def sequences(steps: int = 6, batch: int = 5, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(steps, batch, 3, generator=torch.Generator().manual_seed(seed)).to(dtype) + 0.5


def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "output": lambda y: y[0].sum(),
    "last step": lambda y: y[0][-1].sum(),
    "h_n": lambda y: y[1][0].sum(),
    "c_n": lambda y: y[1][1].sum(),
    "everything": lambda y: y[0].sum() + y[1][0].sum() + y[1][1].sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_call_counts_once_whatever_of_it_is_used(loss: Any, unbatched: bool, layers: int) -> None:
    rnn = nn.LSTM(3, 4, layers)
    optimizer = wrap(rnn)
    x = sequences()
    rnn(x)  # its backward never runs
    with torch.no_grad():
        rnn(x)
    optimizer.zero_grad()
    loss(rnn(x[:, 0] if unbatched else x)).backward()
    optimizer.step()
    assert {int(s.count) for s in optimizer.statistics.values()} == {6 if unbatched else 30}


def test_a_call_that_only_the_input_gets_a_gradient_of_does_not_count() -> None:
    rnn = nn.GRU(3, 4)
    optimizer = wrap(rnn)
    x = sequences().requires_grad_()
    rnn(x)[0].sum().backward(inputs=[x])
    optimizer.step()
    assert count(optimizer, "ih_l0") == count(optimizer, "hh_l0") == 0


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_an_output_changed_in_place_makes_its_call_not_count(kind: type[nn.RNNBase]) -> None:
    """In float64, as in float32 autograd itself keeps an LSTM's output, and complains."""
    rnn = kind(3, 4).to(F64)
    optimizer = wrap(rnn)
    for change, expected in ((False, 30), (True, 30), (False, 60)):
        optimizer.zero_grad()
        y = rnn(sequences(dtype=F64))[0]
        if change:
            y.mul_(2)
        y.sum().backward()
        optimizer.step()
        assert count(optimizer, "ih_l0") == count(optimizer, "hh_l0") == expected


def test_packed_padding_is_not_counted() -> None:
    rnn = nn.LSTM(3, 4, 2, bidirectional=True)
    optimizer = wrap(rnn)
    x = sequences(steps=6, batch=3)
    x[2:, 1] = 1e6  # padding
    x[5:, 2] = 1e6
    rnn(pack_padded_sequence(x, torch.tensor([6, 2, 5]), enforce_sorted=False))[0].data.sum().backward()
    optimizer.step()
    assert {int(s.count) for s in optimizer.statistics.values()} == {13}
    assert optimizer.statistics["ih_l0"].mean.abs().max() < 3
    kept = torch.cat([x[:6, 0], x[:2, 1], x[:5, 2]])
    torch.testing.assert_close(optimizer.statistics["ih_l0_reverse"].mean, kept.mean(0))


def test_a_packed_batch_of_equal_lengths_is_a_dense_one() -> None:
    models = [nn.GRU(3, 4, 2, bidirectional=True).to(F64)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [wrap(m) for m in models]
    for seed in range(3):
        x = sequences(seed=seed, dtype=F64)
        for model, optimizer, input in zip(models, optimizers, (x, pack_sequence(list(x.unbind(1)))), strict=True):
            optimizer.zero_grad()
            model(input)[1].square().sum().backward()
            optimizer.step()
    assert_same_statistics(*optimizers, rtol=1e-12)
    assert_same_weights(*models, rtol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_two_calls_are_one_batch(layers: int) -> None:
    models = [classifier(layers).to(F64) for _ in range(2)]
    whole, halves = (wrap(m) for m in models)
    for seed in range(3):
        x = sequences(batch=6, seed=seed, dtype=F64)
        step(models[0], whole, x)
        halves.zero_grad()
        for part in x.split([2, 4], dim=1):
            (models[1](part).square().sum() / 12).backward()
        halves.step()
    assert_same_statistics(whole, halves, rtol=1e-12)
    assert_same_weights(*models, rtol=1e-12)


@pytest.mark.parametrize("kinds", [(nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), (nn.RNN, nn.RNNCell)])
def test_a_cell_in_a_loop_sees_what_a_fused_layer_sees(kinds: tuple[Any, Any]) -> None:
    """Truncated backpropagation through time: many calls, one backward. Only N differs: every call is a batch."""
    rnn, cell = (kind(3, 4).to(F64) for kind in kinds)
    for own, fused in zip(cell.parameters(), rnn.parameters(), strict=True):
        own.data.copy_(fused.data)
    a, b = wrap(rnn, step_scale=None), wrap(cell, step_scale=None)
    state: Any = None
    hx: Any = None
    for part in sequences(steps=12, dtype=F64).split(4):
        a.zero_grad()
        y, state = rnn(part, state)
        y.square().mean().backward()
        a.step()
        b.zero_grad()
        outputs = []
        for row in part:
            hx = cell(row, hx)
            outputs.append(hx[0] if isinstance(hx, tuple) else hx)
        torch.stack(outputs).square().mean().backward()
        b.step()
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
    for part in ("ih", "hh"):
        fused, own = a.statistics[f"{part}_l0"], b.statistics[part]
        assert int(fused.count) == int(own.count) == 60
        torch.testing.assert_close(fused.mean, own.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(fused.variance, own.variance, rtol=0, atol=1e-12)
    assert_same_weights(rnn, cell, rtol=1e-12)


@pytest.mark.parametrize("container", [tuple, list])
def test_an_initial_state_in_a_tuple_or_a_list(container: Any) -> None:
    h, c = torch.full((1, 5, 4), 9.0), torch.zeros(1, 5, 4)
    rnn, cell = nn.LSTM(3, 4), nn.LSTMCell(3, 4)
    a, b = wrap(rnn), wrap(cell)
    rnn(sequences(), container((h, c)))[0].sum().backward()
    cell(sequences()[0], container((h[0], c[0])))[0].sum().backward()
    for optimizer, part, observations in ((a, "hh_l0", 30), (b, "hh", 5)):
        optimizer.step()
        assert count(optimizer, part) == observations
        assert (optimizer.statistics[part].mean > 9 / 6 - 1).all()  # what is between steps is below 1


def test_dropout_between_layers() -> None:
    """Masks of our own with the same distribution; the global random numbers stay as a plain run leaves them."""
    plain = nn.LSTM(3, 8, 2, dropout=0.4)
    rnn = copy.deepcopy(plain)
    optimizer = wrap(rnn)
    x = sequences(steps=40, batch=50)
    outputs = []
    for net in (plain, rnn):
        torch.manual_seed(3)
        outputs.append(net(x)[0])
        outputs[-1].sum().backward()
        outputs.append(torch.rand(3))
    assert same(outputs[:2], outputs[2:])
    with torch.no_grad():
        lower = nn.LSTM(3, 8)
        for (name, p), q in zip(lower.named_parameters(), plain.parameters(), strict=False):
            assert name.endswith("l0")
            p.copy_(q)
        a = lower(x)[0].flatten(0, 1)
    optimizer.step()
    seen = optimizer.statistics["ih_l1"]
    square = a.square().mean(0) / 0.6
    expected = square - a.mean(0).square()
    assert ((seen.mean - a.mean(0)).abs() < 5 * (expected / 2000).sqrt()).all()
    torch.testing.assert_close(seen.variance, expected, rtol=0.15, atol=1e-4)
    torch.testing.assert_close(optimizer.statistics["hh_l0"].variance.shape, (8,))


def test_masks_change_from_step_to_step_and_runs_can_be_repeated() -> None:
    means = []
    for training in (True, True, False):
        model = classifier(dropout=0.5).train(training)
        optimizer = wrap(model, stat_decay=0.0)
        for _ in range(2):
            step(model, optimizer, sequences())
            means.append(optimizer.statistics["rnn.ih_l1"].mean)
            model.load_state_dict(classifier().state_dict())
    assert not torch.equal(means[0], means[1])
    assert same(means[:2], means[2:4])
    torch.testing.assert_close(means[4], means[5])


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
