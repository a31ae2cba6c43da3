"""torch.compile: hooks are traced into the graph, or their absence is said once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_statistics, assert_same_weights, backward, count, inputs, mlp, same, train, wrap

# dynamo itself looks at .grad of everything it meets while tracing
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("wrap_first", [True, False], ids=["wrapped before compile", "compiled before wrap"])
def test_a_compiled_model_has_the_statistics_of_eager(backend: str, wrap_first: bool) -> None:
    eager, model = mlp(), mlp()
    a = wrap(eager)
    if wrap_first:
        b = wrap(model)
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        b = wrap(compiled)
    train(eager, a, inputs(6))
    train(compiled, b, inputs(6))
    assert count(b) == 48
    assert_same_statistics(a, b)
    assert_same_weights(eager, model)


def pair() -> tuple[Any, Any, Any, Any, Any]:
    """The same net twice: eager with its wrapper, and with its wrapper and compiled."""
    eager, model = mlp(), mlp()
    return eager, wrap(eager), model, wrap(model), torch.compile(model, backend="eager", fullgraph=True)


def test_one_graph_serves_all_steps() -> None:
    model = mlp()
    optimizer = wrap(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    train(compiled, optimizer, inputs(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, inputs(5))
    assert count(optimizer) == 56


def test_micro_batches_of_a_compiled_model() -> None:
    eager, a, _, b, compiled = pair()
    for x in inputs(4):
        for net, optimizer in ((eager, a), (compiled, b)):
            optimizer.zero_grad()
            for part in x.split(4):
                backward(net, part)
            optimizer.step()
    assert count(b) == 32
    assert_same_statistics(a, b)


def test_eager_and_compiled_forwards_of_one_step_are_pooled() -> None:
    eager, a, model, b, compiled = pair()
    for x in inputs(4):
        a.zero_grad()
        backward(eager, x)
        a.step()
        b.zero_grad()
        first, second = x.split([5, 3])
        (compiled(first).square().sum() / 24).backward()
        (model(second).square().sum() / 24).backward()
        b.step()
    assert count(b) == 32
    assert_same_statistics(a, b)
    assert_same_weights(eager, model)


def test_no_grad_forwards_of_a_compiled_model_do_not_count() -> None:
    model = mlp()
    optimizer = wrap(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(inputs(1)[0])
    train(compiled, optimizer, inputs(2))
    assert count(optimizer) == 16


def test_hooks_that_cannot_fire_are_said_once() -> None:
    model = mlp()
    compiled: Any = torch.compile(model, backend="eager")
    backward(compiled, inputs(1)[0])  # traced without hooks
    model.zero_grad()
    optimizer = wrap(model)
    plain = mlp()
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="wrap it before") as caught:
        train(compiled, optimizer, inputs(3))
    train(plain, base, inputs(3))
    assert len(caught) == 1
    assert same(dict(model.state_dict()), dict(plain.state_dict()))  # degraded to the plain base


def test_module_compile_in_place() -> None:
    eager, model = mlp(), mlp()
    a, b = wrap(eager), wrap(model)
    model.compile(backend="eager", fullgraph=True)
    train(eager, a, inputs(4))
    train(model, b, inputs(4))
    assert_same_statistics(a, b)
    assert isinstance(model, nn.Module)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="torch 2.6 makes a graph for each batch size"
)
def test_two_graphs_at_most_for_any_batch_size() -> None:
    eager, a, _, b, compiled = pair()
    torch._dynamo.utils.counters.clear()
    data = [x for n in (8, 5, 3, 7, 11, 6) for x in inputs(1, batch=n, seed=n)]
    train(eager, a, data)
    train(compiled, b, data)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert count(b) == 40
    assert_same_statistics(a, b)
