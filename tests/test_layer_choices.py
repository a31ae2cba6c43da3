"""The layer-choices benchmark: its alternatives compute what they say, and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import layer_choices, layer_report, layer_variants
from benchmarks.layer_choices import Run
from benchmarks.layer_variants import EmbeddingAdapter, PatchAdapter, PatchConv2d, Text, TokenEmbedding
from bnp_optim import BNPreconditioner, transform
from bnp_optim.transform import Factors


def _factors() -> Factors:
    one = torch.ones((), dtype=torch.float64)
    mean, std = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    return Factors(mean, 1 / std, 4 * one, one)


def test_plain_columns_are_a_diagonal() -> None:
    f = _factors()
    weight = torch.tensor([[1.0, 1.0, 1.0], [2.0, -4.0, 8.0]], dtype=torch.float64)
    squared, forth, back = weight.clone(), weight.clone(), weight.clone()
    layer_variants.columns_precondition(squared, None, f)
    layer_variants.columns_to_z(forth, None, f)
    layer_variants.columns_from_z(back, None, f)
    # q = 2 and σ̃ = (1/2, 2, 4): 1/(qσ̃) = (1, 1/4, 1/8)
    assert forth.tolist() == back.tolist() == [[1, 0.25, 0.125], [2, -1, 1]]
    assert squared.tolist() == [[1, 0.0625, 0.015625], [2, -0.25, 0.125]]


def test_plain_columns_leave_layers_with_bias_alone() -> None:
    f = _factors()
    ours = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    theirs = ours[0].clone(), ours[1].clone()
    layer_variants.columns_precondition(*ours, f)
    transform.precondition(*theirs, f)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_plain_columns_reach_the_wrapper(base: type[torch.optim.Optimizer]) -> None:
    """The package's names are patched: a wrapped step is the one along diag(1/σ̃)."""
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    start = layer.weight.detach().clone()
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.5, 4.0]], dtype=torch.float64)
    optimizer = BNPreconditioner(base(layer.parameters(), lr=0.1), layer, step_scale=None)  # type: ignore[call-arg]
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.clone()
    with layer_variants.plain_columns():
        optimizer.step()
    variance = torch.tensor([1.0, 0.0625, 4.0], dtype=torch.float64)
    scale = (variance + 0.01 * 4 + 1e-4).rsqrt()
    step = gradient * scale**2 if base is torch.optim.SGD else gradient.sign() * scale
    torch.testing.assert_close(start - layer.weight.detach(), 0.1 * step, rtol=1e-6, atol=0)


def _occupancy(kernel: int, padding: int, size: int) -> Tensor:
    """The share of a line's output positions at which each tap is inside, stride 1."""
    positions = torch.arange(size + 2 * padding - kernel + 1)
    inside = torch.arange(kernel)[:, None] + positions - padding
    return ((inside >= 0) & (inside < size)).double().mean(1)


def test_patch_statistics_are_the_channels_by_occupancy() -> None:
    """Where channels look the same everywhere: occ·μ, and occ·(σ² + μ²) - occ²μ²."""
    conv = PatchConv2d(2, 3, 3, padding=1)
    level = torch.randn(6, 2, dtype=torch.float64) + 3
    values, size, _ = PatchAdapter().samples(conv, level[:, :, None, None].expand(6, 2, 4, 4))
    line = _occupancy(3, 1, 4)
    assert line.tolist() == [0.75, 1, 0.75]
    occupancy = (line[:, None] * line).flatten()
    mean, variance = level.mean(0)[:, None], level.var(0, correction=0)[:, None]
    expected = occupancy * (variance + mean**2) - (occupancy * mean) ** 2
    assert (size, values.shape) == (6, (6, 18, 16))
    torch.testing.assert_close(values.mean((0, 2)).view(2, 9), occupancy * mean)
    torch.testing.assert_close(values.var((0, 2), correction=0).view(2, 9), expected)


def test_patch_statistics_reach_the_wrapper() -> None:
    """Its inputs are in the weight's order, strides included, and the forward pass is as it was."""
    net = nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=2, padding=(1, 0)))
    x = torch.randn(5, 2, 6, 5)
    before = net(x)
    layer_variants.measure_by_patches(net)
    optimizer = BNPreconditioner(torch.optim.SGD(net.parameters(), lr=0.1), net)
    after = net(x)
    assert torch.equal(before, after)
    after.square().mean().backward()
    optimizer.step()
    padded = F.pad(x, (0, 0, 1, 1))
    patches = torch.stack([padded[:, :, i : i + 3, j : j + 2] for i in (0, 2, 4) for j in (0, 2)])
    found = optimizer.statistics["0"]
    torch.testing.assert_close(found.mean, patches.mean((0, 1)).flatten())
    torch.testing.assert_close(found.variance, patches.var((0, 1), correction=0).flatten())


def test_embedding_statistics_are_frequencies() -> None:
    net = nn.Sequential(TokenEmbedding(4, 2))
    tokens = torch.tensor([[0.0, 1.0, 1.0, 3.0], [1.0, 0.0, 1.0, 1.0]])
    frequency = torch.tensor([0.25, 0.625, 0.0, 0.125])
    optimizer = BNPreconditioner(torch.optim.SGD(net.parameters(), lr=0.1), net)
    out = net(tokens)
    assert torch.equal(out, F.embedding(tokens.long(), net[0].weight))
    out.square().mean().backward()
    optimizer.step()
    found = optimizer.statistics["0"]
    torch.testing.assert_close(found.mean, frequency)
    torch.testing.assert_close(found.variance, frequency * (1 - frequency))
    assert found.count == 8


def test_embedding_is_the_linear_of_one_hot_inputs() -> None:
    """The spectral step scale's two products are adjoint, and agree with the dense ones."""
    module, adapter = TokenEmbedding(5, 2), EmbeddingAdapter()
    tokens = torch.tensor([[0.0, 4.0, 4.0]])
    dense = F.one_hot(tokens.long(), 5).float()[0]
    u, y = torch.randn(1, 5), torch.randn(3, 1, 1)
    torch.testing.assert_close(adapter.respond(module, tokens, u)[:, 0, 0], dense @ u[0])
    torch.testing.assert_close(adapter.correlate(module, tokens, y)[0], dense.t() @ y[:, 0, 0])
    assert adapter.matrix(adapter.rows(module), module.weight).shape == (2, 5)


def test_text_is_tokens_with_every_tenth_file_held_out(tmp_path: Path) -> None:
    for i in range(11):
        (tmp_path / f"{i:02}.py").write_text("held = out" if i % 10 == 0 else "a = b\n" * 3 + "rare")
    text = layer_variants.load_text(tmp_path, vocabulary=4)
    assert text.train.unique().tolist() == [0, 1, 2, 3, 4] and len(text.train) == 9 * 13
    assert text.validation.tolist() == [0, 2, 0] * 2
    x, y = layer_variants.contexts(torch.arange(20), torch.tensor([8, 11]))
    assert (x.tolist(), y.tolist()) == ([list(range(8)), list(range(3, 11))], [8, 11])


def test_nets_have_the_biases_they_should() -> None:
    def biases(name: str) -> int:
        layers = [m for m in layer_choices.NETS[name]().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return sum(m.bias is not None for m in layers)

    assert [biases(name) for name in ("cnn-no-bias", "resnet8-bn", "resnet8", "cnn")] == [0, 1, 0, 6]


def test_rates_are_chosen_on_other_seeds() -> None:
    scores = {0: {0.1: 0.9, 0.3: 0.1}, 1: {0.1: 0.2, 0.3: 0.5}, 2: {0.1: 0.3, 0.3: 0.4}}
    assert layer_report.best_rate(scores, lower=False) == 0.1
    assert layer_report.best_rate(scores, lower=True) == 0.3
    assert layer_report.at_best_rate(scores, lower=False) == {0: 0.1, 1: 0.2, 2: 0.3}


def test_differences_are_paired_and_need_whole_grids() -> None:
    results = [
        {"net": "cnn", "batch_size": 4, "base": "SGD", "variant": v, "seed": s, "learning_rate": r, "score": x}
        for v, s, r, x in (
            ("patch", 0, 0.1, 0.5), ("patch", 0, 0.3, 0.1), ("patch", 1, 0.1, 0.7), ("patch", 1, 0.3, 0.3),
            ("bnp", 0, 0.1, 0.2), ("bnp", 0, 0.3, 0.4), ("bnp", 1, 0.1, 0.2), ("bnp", 1, 0.3, 0.4),
            ("bnp", 2, 0.3, 0.9),
        )
    ]  # fmt: skip
    found = layer_report.compare(results, "cnn", 4, "SGD", ("patch", "bnp"))
    assert found is not None
    assert (found["seeds"], found["rates"]) == (2, (0.1, 0.3))
    assert found["best_difference"] == (pytest.approx(0.2), pytest.approx(0.1))  # .5 - .4 and .7 - .4
    assert found["grid_difference"] == (pytest.approx(0.1), pytest.approx(0.1))  # .3 - .3 and .5 - .3


def test_runs_are_kept_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(torch.randint(2001, (300,)), torch.randint(2001, (100,)))
    monkeypatch.setattr(layer_choices, "load_text", lambda: text)
    runs = [Run("text", base, v, 0.1, 4, 8, 0, "x") for base, v in (("SGD", "frequency"), ("AdamW", "faster"))]
    nothing = layer_choices.run_all(runs, tmp_path, tmp_path, until=0.0)
    first = layer_choices.run_all(runs, tmp_path, tmp_path, until=float("inf"))
    kept = layer_choices.run_all(runs, tmp_path, tmp_path, until=0.0)
    assert nothing == [] and kept == first and len(first) == 2
    assert all(7 < r["score"] <= 7.61 and r["seconds"] >= 0 for r in first)


def test_divergence_scores_chance() -> None:
    images = torch.randn(40, 3, 32, 32), torch.arange(40) % 10, torch.randn(10, 3, 32, 32), torch.arange(10)
    found = layer_choices.train(Run("cnn", "SGD", "base", 1e12, 4, 40, 0, "x"), images)
    assert found["diverged"] and found["score"] == 0.1


def test_plan_is_complete_and_without_twins() -> None:
    runs = layer_choices.plan(list(layer_choices.NETS), 3)
    assert len({run.file_name for run in runs}) == len(runs)
    assert {r.seed for r in runs if (r.net, r.variant) == ("resnet8", "bnp")} == {0, 1}
    assert len([r for r in runs if (r.net, r.variant, r.seed) == ("cnn", "patch", 2)]) == 20


def test_report_of_two_seeds(tmp_path: Path) -> None:
    runs = [run for run in layer_choices.plan(["cnn", "text"], 2) if run.variant in ("bnp", "patch", "frequency")]
    results = [
        {**run.__dict__, "score": 3.0 - run.learning_rate / 10, "diverged": False, "seconds": 1.0} for run in runs
    ]
    document = {"configuration": {"runs_planned": 7}, "environment": layer_choices.environment(), "runs": results}
    text = layer_report.write({**document, "cpu_seconds": 2.0}, tmp_path)
    assert "| BNP-SGD, patch statistics | 64 | 2 | **3.000 ± 0.000** | 2.999 ± 0.000 |" in text
    assert "patch statistics – channel statistics | 3.000 – 3.000 (0.003, 0.003) | +0.000 ± 0.000 |" in text
    layer_report.plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
