"""Options that trade exactness or compile time for speed, and what speed must not cost: memory, and other numbers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim import BNPreconditioner
from tests.conftest import assert_same_statistics, assert_same_weights, backward, count, inputs, mlp, train, wrap


def conv() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 36, 3))


class TestMaxObservations:
    """Sub-sampling of large activations."""

    def test_a_limit_that_nothing_exceeds_changes_no_bit(self) -> None:
        a, b = mlp(), mlp()
        exact, limited = wrap(a), wrap(b, max_observations=8)
        train(a, exact, inputs(4))
        train(b, limited, inputs(4))
        assert_same_statistics(exact, limited, 0)
        assert_same_weights(a, b, 0)

    def test_positions_are_thinned_out_row_by_row(self) -> None:
        """Of 5 × 8 × 8 observations every second row of 8: other rows at the second step; N stays 5."""
        model = conv()
        optimizer = wrap(model, max_observations=5 * 4 * 8, stat_decay=0.0)
        for start in (0, 1):
            x = torch.randn(5, 1, 8, 8) + 1
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            kept = x[:, :, start::2]
            statistics = optimizer.statistics["0"]
            torch.testing.assert_close(statistics.mean, kept.mean((0, 2, 3)), rtol=1e-6, atol=0)
            # μ is all of this step's batch (ρ = 0), so there is no distance to it
            torch.testing.assert_close(statistics.variance, kept.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
        assert count(optimizer) == 2 * 5 * 4 * 8
        bank = optimizer._tracker._shelves[0][0].bank
        assert bank.ledger.samples.tolist() == [5, 5]

    def test_it_comes_close_to_the_exact_statistics(self) -> None:
        """Smooth images: a quarter of the rows, rotating, is within 2 % of a standard deviation after 100 steps."""
        exact_model, thin_model = conv(), conv()
        exact, thin = wrap(exact_model), wrap(thin_model, max_observations=4 * 2 * 8)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            coarse = torch.randn(4, 1, 3, 3, generator=generator)
            x = nn.functional.interpolate(coarse, size=8, mode="bilinear", align_corners=True) + 1
            for model, optimizer in ((exact_model, exact), (thin_model, thin)):
                optimizer.zero_grad()
                backward(model, x)
                optimizer.step()
        a, b = exact.statistics["0"], thin.statistics["0"]
        assert abs(float((a.mean - b.mean) / a.variance.sqrt())) < 0.02
        assert abs(float(b.variance / a.variance) - 1) < 0.05

    @pytest.mark.parametrize("value", [0, -1, 1.5, float("inf"), "many"])
    def test_a_wrong_limit_is_refused(self, value: Any) -> None:
        model = mlp()
        with pytest.raises((ValueError, TypeError), match="max_observations"):
            wrap(model, max_observations=value)
        assert not model[0]._forward_hooks


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
class TestCompiled:
    """The transforms of all layers as one compiled graph."""

    @pytest.fixture(autouse=True)
    def _backend(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Inductor needs a compiler at run time; what is tested here is the graph."""
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **kwargs: original(f, backend="aot_eager", **kwargs))
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("mode", ["gradient", "two_sided"])
    def test_it_has_the_numbers_of_the_plain_step(self, mode: Any) -> None:
        def net() -> nn.Sequential:
            torch.manual_seed(2)
            return nn.Sequential(
                nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 3)
            )

        a, b = net(), net()
        plain, compiled = wrap(a, mode=mode), wrap(b, mode=mode, compiled=True)
        for x in torch.randn(6, 5, 2, 6, 6) + 1:
            for model, optimizer in ((a, plain), (b, compiled)):
                optimizer.zero_grad()
                backward(model, x)
                optimizer.step()
        assert_same_statistics(plain, compiled, 1e-5)
        assert_same_weights(a, b, 1e-5)

    def test_one_graph_serves_all_steps_and_batch_sizes(self) -> None:
        model = mlp()
        optimizer = wrap(model, compiled=True)
        train(model, optimizer, inputs(2))
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(model, optimizer, [*inputs(3), *inputs(2, batch=1), *inputs(2, batch=5)])
        assert count(optimizer) == 16 + 24 + 2 + 10

    def test_half_precision_layers_are_left_to_the_plain_step(self) -> None:
        model = mlp().to(torch.bfloat16)
        optimizer = wrap(model, compiled=True)
        train(model, optimizer, [x.bfloat16() for x in inputs(2)])
        assert count(optimizer) == 16


def test_no_gradient_outlives_its_step() -> None:
    """Whoever held last step's gradients through the next backward would need a second set of them."""
    model = mlp()
    optimizer = wrap(model)
    x, y = inputs(2)
    backward(model, x)
    optimizer.step()
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    inside = weakref.ref(y)
    optimizer.zero_grad()
    gc.collect()
    assert [g() for g in gradients] == [None] * 4
    backward(model, y)
    optimizer.step()
    optimizer.zero_grad()
    del y
    gc.collect()
    assert inside() is None  # nor does an input


def test_an_input_is_let_go_of_when_its_graph_is() -> None:
    """A forward without a backward keeps nothing alive."""
    model = mlp()
    optimizer = wrap(model)
    x = inputs(1, batch=64)[0]
    hidden: list[Any] = []
    handle = model[1].register_forward_hook(lambda m, a, o: hidden.append(weakref.ref(o)))
    out = model(x)
    handle.remove()
    del out
    gc.collect()
    assert hidden[0]() is None
    assert optimizer._tracker._places[optimizer._tracker.layers[0]].intake.batches == []


def test_a_batch_that_is_changed_in_place_after_backward() -> None:
    """A user's buffer is copied, at batch size 1 too: the next sample may already be in it at step()."""
    a, b = mlp(), mlp()
    first, second = wrap(a), wrap(b)
    buffer = torch.empty(1, 4)
    for x in inputs(4, batch=1):
        first.zero_grad()
        backward(a, x)
        first.step()
        buffer.copy_(x)
        second.zero_grad()
        backward(b, buffer)
        buffer.fill_(1e6)
        second.step()
    assert_same_statistics(first, second, 0)
    assert_same_weights(a, b, 0)


@pytest.mark.parametrize("where", ["autocast", "saved tensor hooks"])
def test_inputs_that_autograd_does_not_keep_are_read_at_once(where: str) -> None:
    """Then the input may be gone, or be something else, when backward comes by."""
    a, b = mlp(), mlp()
    reference, optimizer = wrap(a), wrap(b)
    x = inputs(1)[0]
    context = (
        torch.autocast("cpu", dtype=torch.bfloat16)
        if where == "autocast"
        else torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    )
    with context:
        a(x).float().square().mean().backward()
        out = b(changing := x.clone())
        changing.fill_(1e6)  # no complaint from autograd: it has a copy
        out.float().square().mean().backward()
    reference.step()
    optimizer.step()
    assert_same_statistics(reference, optimizer, 0)


def test_many_layers_of_all_widths_share_few_banks() -> None:
    torch.manual_seed(0)
    small = nn.Sequential(*[nn.Linear(a, b) for a, b in [(3, 64), (64, 7), (7, 500), (500, 2)]])
    assert len(BNPreconditioner(torch.optim.SGD(small.parameters(), lr=0.1), small)._tracker._shelves) == 1
    wide = nn.Sequential(nn.Linear(20_000, 4), nn.Linear(4, 30), nn.Linear(30, 2))
    shelves = BNPreconditioner(torch.optim.SGD(wide.parameters(), lr=0.1), wide)._tracker._shelves
    assert [[p.layer.name for p in shelf] for shelf in shelves] == [["0"], ["1", "2"]]  # no padding to 20,000
