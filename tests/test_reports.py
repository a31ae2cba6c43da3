"""What the wrapper says of itself: coverage, repr, statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from bnp_optim import BNPreconditioner
from tests.conftest import backward, inputs, mlp, train


def wrap(model: nn.Module, parameters: Any = None, **options: Any) -> BNPreconditioner:
    chosen = model.parameters() if parameters is None else parameters
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="BNPreconditioner: no layer of the")  # is not what is tested here
        return BNPreconditioner(torch.optim.SGD(chosen, lr=0.1), model, **options)


def tied(*, same_bias: bool) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    if same_bias:
        model["b"].bias = model["a"].bias
    return model


def tied_to_embedding() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embed"].weight
    return model


def pruned() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    prune.l1_unstructured(model["a"], "weight", 0.5)
    return model


def frozen(*names: str) -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    for name in names:
        getattr(model["a"], name).requires_grad_(False)
    return model


def only(**modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict(modules)


UNSEEN = "; no samples yet, passes through until then"
# model → options, and rows: name → (preconditioned, why)
ROWS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[bool, str]]]] = {
    "linear": (
        only(a=nn.Linear(3, 2)),
        {"a.weight": (True, "P" + UNSEEN), "a.bias": (True, "P, with a.weight")},
    ),
    "no bias": (only(a=nn.Linear(3, 2, bias=False)), {"a.weight": (True, "rank-one P: no bias" + UNSEEN)}),
    "conv": (
        only(a=nn.Conv2d(2, 4, 3, groups=2)),
        {"a.weight": (True, "P" + UNSEEN), "a.bias": (True, "P, with a.weight")},
    ),
    "norm": (
        only(a=nn.BatchNorm1d(3)),
        {"a.weight": (False, "no rule for BatchNorm1d"), "a.bias": (False, "no rule for BatchNorm1d")},
    ),
    "embedding": (only(a=nn.Embedding(5, 3)), {"a.weight": (False, "no rule for Embedding")}),
    "frozen": (
        lambda: frozen("weight", "bias"),
        {"a.weight": (False, "frozen"), "a.bias": (False, "frozen")},
    ),
    "frozen weight": (
        lambda: frozen("weight"),
        {"a.weight": (False, "frozen"), "a.bias": (False, "its layer's weight is not in this optimizer, or frozen")},
    ),
    "frozen bias": (
        lambda: frozen("bias"),
        {"a.weight": (True, "rank-one P: its bias is frozen" + UNSEEN), "a.bias": (False, "frozen")},
    ),
    "tied to embedding": (
        tied_to_embedding,
        {
            "embed.weight": (False, "shared with Embedding 'embed'"),
            "head.bias": (False, "shared with Embedding 'embed'"),
        },
    ),
    "tied": (
        lambda: tied(same_bias=True),
        {"a.weight": (True, "P" + UNSEEN), "a.bias": (True, "P, with a.weight")},
    ),
    "tied with two biases": (
        lambda: tied(same_bias=False),
        {"a.weight": (True, "rank-one P: its tied biases differ" + UNSEEN)},
    ),
    "weight norm": (
        lambda: nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(3, 2))}),
        {
            "a.bias": (False, "parametrized: its weight is computed from other parameters"),
            "a.parametrizations.weight.original0": (False, "behind a parametrization"),
            "a.parametrizations.weight.original1": (False, "behind a parametrization"),
        },
    ),
    "pruned": (
        pruned,
        {
            "a.weight_orig": (False, "'weight' is not a parameter of the Linear (parametrized or pruned)"),
            "a.bias": (False, "'weight' is not a parameter of the Linear (parametrized or pruned)"),
        },
    ),
    "complex": (
        only(a=nn.Linear(3, 2, dtype=torch.complex64)),
        {"a.weight": (False, "not a real floating-point weight (complex64)")},
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_coverage_says_what_happens_and_why(kind: str) -> None:
    build, rows = ROWS[kind]
    coverage = wrap(build()).coverage()
    for name, expected in rows.items():
        row = coverage[name]
        assert (row.preconditioned, row.why) == expected
    assert coverage.preconditioned == tuple(row.name for row in coverage if row.preconditioned)
    with pytest.raises(KeyError):
        _ = coverage["nothing of that name"]


def test_coverage_of_attention() -> None:
    """It never calls its out_proj: where the input cannot be had, it may not be said to be preconditioned by P."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    optimizer = wrap(model)
    x = torch.randn(2, 3, 4)
    with torch.autograd.graph.save_on_cpu():
        model(x, x, x)[0].square().mean().backward()
    optimizer.step()
    row = optimizer.coverage()["out_proj.weight"]
    assert optimizer.coverage()["in_proj_weight"].why == "P"
    assert (row.preconditioned, row.why) == (False, "its layer's input was never seen so far")


def test_coverage_of_a_lazy_layer_before_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    coverage = optimizer.coverage()
    assert not coverage["0.weight"].preconditioned
    assert coverage["0.weight"].why == "not initialized yet: preconditioned from its first forward pass on"
    assert coverage["1.weight"].preconditioned
    assert "0.weight" in str(coverage)
    model(torch.ones(2, 3))
    optimizer.rescan()
    assert optimizer.coverage()["0.weight"].preconditioned
    assert optimizer.coverage()["0.weight"].shape == (4, 3)


def test_coverage_of_several_optimizers_and_strangers() -> None:
    model = mlp()
    stranger = nn.Parameter(torch.zeros(2, 5))
    optimizer = wrap(model, [{"params": [model[0].weight]}, {"params": [model[2].weight, model[2].bias, stranger]}])
    coverage = optimizer.coverage()
    assert coverage["0.weight"].why == "rank-one P: its bias is not in this optimizer" + UNSEEN
    assert coverage["0.bias"].why == "not in this optimizer's parameter groups"
    assert coverage["2.bias"].why == "P, with 2.weight"
    row = coverage["group 1, parameter 2"]
    assert (row.shape, row.preconditioned, row.why) == ((2, 5), False, "no parameter of the model")
    assert coverage.preconditioned == ("0.weight", "2.weight", "2.bias")


@pytest.mark.parametrize("rule", ["block", "block.0", nn.Conv1d, "instance"], ids=str)
def test_coverage_of_skipped_layers(rule: Any) -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Conv1d(1, 2, 1), nn.Tanh()), "out": nn.Linear(2, 1)})
    coverage = wrap(model, skip=[model["block"][0] if rule == "instance" else rule]).coverage()
    assert coverage["block.0.weight"].why == coverage["block.0.bias"].why == "skipped by the user"
    assert coverage.preconditioned == ("out.weight", "out.bias")


def test_coverage_is_an_aligned_table() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3, bias=False))
    optimizer = wrap(model)
    train(model, optimizer, inputs(1))
    head, rule, *rows, total = str(optimizer.coverage()).split("\n")
    starts = [head.index(title) for title in ("parameter", "shape", "gradient", "how, or why not")]
    assert starts == [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    assert [[row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for row in rows] == [
        ["0.weight", "16×4", "preconditioned", "P"],
        ["0.bias", "16", "preconditioned", "P, with 0.weight"],
        ["1.weight", "16", "passed through", "no rule for LayerNorm"],
        ["1.bias", "16", "passed through", "no rule for LayerNorm"],
        ["2.weight", "3×16", "preconditioned", "rank-one P: no bias"],
    ]
    assert total == "3 of 5 parameters preconditioned"
    assert all(line == line.rstrip() for line in (head, rule, *rows))


def test_coverage_of_a_layer_whose_input_cannot_be_read() -> None:
    class Odd(nn.Linear):
        def forward(self, input: Any) -> Any:
            return super().forward(input.reshape(-1, 4))

    model = nn.Sequential(Odd(4, 3), nn.Linear(3, 2))
    optimizer = wrap(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer._tracker.layers[0].adapter, "samples", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="could not read the input of a Odd"):
            model[0](torch.ones(2, 4)).sum().backward()  # when its turn to be read comes
    backward(model, inputs(1)[0])
    optimizer.step()
    assert "no longer measured (ZeroDivisionError: division by zero)" in optimizer.coverage()["0.weight"].why
    assert optimizer.statistics["1"].count == 8


def test_repr_is_one_line_that_names_what_matters() -> None:
    model = mlp()
    assert repr(BNPreconditioner(torch.optim.AdamW(model.parameters()), model, step_scale=None)) == (
        "BNPreconditioner(AdamW, 2 layers, mode='two_sided', step_scale=None, stat_decay=0.99)"
    )
    assert repr(BNPreconditioner.paper(torch.optim.SGD(model.parameters(), lr=1), model, stat_decay=0.5)) == (
        "BNPreconditioner(SGD, 2 layers, mode='gradient', step_scale='fan_in', stat_decay=0.5)"
    )


def test_statistics_are_copies() -> None:
    model = mlp()
    optimizer = wrap(model)
    (x,) = inputs(1)
    train(model, optimizer, [x])
    found = optimizer.statistics
    torch.testing.assert_close(found["0"].mean, x.mean(0))
    torch.testing.assert_close(found["0"].variance, x.var(0, correction=0))
    for value in (found["0"].mean, found["0"].variance, found["0"].count):
        value.add_(7)
    again = optimizer.statistics["0"]
    torch.testing.assert_close(again.mean, x.mean(0))
    torch.testing.assert_close(again.variance, x.var(0, correction=0))
    assert again.count == 8 and again.count.dtype == torch.int64
    train(model, optimizer, [x])
    assert again.count == 8  # nor do they change under the reader's hands
