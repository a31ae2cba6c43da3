"""Which calls of a recurrent layer count, and what of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from bnp_optim.capture import _saved_tensor_hooks
from bnp_optim.layers import recurrent
from tests.conftest import assert_same_statistics, assert_same_weights, count, same, wrap
from tests.recurrent import classifier, sequences, step

F64 = torch.float64


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


@pytest.mark.skipif(_saved_tensor_hooks is None, reason="torch 2.6: what a call multiplied is read at once")
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


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 has inputs read in every forward pass")
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_only_layers_below_the_last_are_run_again_and_once(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    run = recurrent._run
    monkeypatch.setattr(recurrent, "_run", lambda rnn, layer, *a: (again.append(layer), run(rnn, layer, *a))[1])
    model = classifier(layers)
    optimizer = wrap(model)
    step(model, optimizer, sequences())
    with torch.no_grad():
        model(sequences())
    model(sequences())
    assert again == list(range(layers - 1))


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
