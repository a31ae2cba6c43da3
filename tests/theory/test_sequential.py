"""What is read off a model, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bnp_optim.nn import OutputCentering
from bnp_optim.theory import mean_field_fisher, mean_field_fisher_from_model
from tests.theory.nets import gaussian_, inputs, mlp


def test_a_large_random_net_reads_as_its_law() -> None:
    net = mlp([500, 400, 300, 5], nn.Tanh, 3.0, 0.64, seed=0)
    read = mean_field_fisher_from_model(net, num_samples=80)
    told = mean_field_fisher(
        [500, 400, 300], "tanh", weight_variance=3, bias_variance=0.64, num_samples=80, num_outputs=5
    )
    assert read.lambda_max == pytest.approx(told.lambda_max, rel=0.03)
    assert read.trace == pytest.approx(told.trace, rel=0.03)
    assert (read.num_parameters, read.num_outputs) == (sum(p.numel() for p in net.parameters()), 5)
    assert [x.name for x in read.layers] == ["0", "2", "4"]
    assert read.unread == ()


def test_exactly_what_was_read() -> None:
    net = mlp([6, 5, 4, 2], nn.ReLU, 2.0, 0.1, seed=0, gamma=1.5)
    read = mean_field_fisher_from_model(net, num_samples=8)
    linear = [m for m in net if isinstance(m, nn.Linear)]
    told = mean_field_fisher(
        [6, 5, 4],
        weight_variance=[m.in_features * float(m.weight.detach().double().square().mean()) for m in linear],
        bias_variance=[float(m.bias.detach().double().square().mean()) for m in linear],
        num_samples=8,
        num_outputs=2,
        normalization="batch",
        gamma=1.5,
    )
    assert read.lambda_max == pytest.approx(told.lambda_max, rel=1e-4)  # BatchNorm's eps is read, too
    assert read.normalization == "batch"
    assert mean_field_fisher_from_model(net.eval(), num_samples=8).normalization == "batch_frozen"
    assert mean_field_fisher_from_model(net.append(OutputCentering(2)), num_samples=8).centered_output
    assert not mean_field_fisher_from_model(net.eval(), num_samples=8).centered_output


def test_inputs_count_with_their_moments() -> None:
    net = mlp([50, 40, 2], nn.Tanh, 2.0, 0.1, seed=0)
    x = 0.5 * inputs(30, 50) + 1
    read = mean_field_fisher_from_model(net, x)
    assert read.num_samples == 30
    first = read.layers[0]
    assert first.q1_hat == pytest.approx(float(x.square().mean()), rel=1e-6)
    gram = x.double() @ x.double().T / 50
    assert first.q2_hat == pytest.approx(float((gram.sum() - gram.diagonal().sum()) / (30 * 29)), rel=1e-9)


def test_frozen_layers_and_nesting_and_what_does_nothing() -> None:
    net = mlp([50, 40, 30, 2], nn.ReLU, 2.0, 0.1, seed=0)
    plain = mean_field_fisher_from_model(net, num_samples=20)
    nested = nn.Sequential(nn.Flatten(), nn.Sequential(*net[:2]), nn.Identity(), nn.Dropout(0.3).eval(), *net[2:])
    assert mean_field_fisher_from_model(nested, num_samples=20).lambda_max == plain.lambda_max
    net[0].requires_grad_(False)
    part = mean_field_fisher_from_model(net, num_samples=20)
    assert part.kernel_same == pytest.approx(plain.kernel_same - plain.layers[0].diagonal)
    assert len(part.layers) == 2


def test_what_could_not_be_read_is_listed() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.constant_(norm.bias, 0.5)
    assert norm.running_var is not None
    norm.running_var.fill_(9.0)
    linear = nn.Linear(8, 4)
    nn.init.uniform_(linear.weight, 0.5, 1.0)
    net = nn.Sequential(
        conv, norm.eval(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), linear, nn.Softmax(dim=1)
    )
    shared = torch.randn(10, 3, 1, 1).expand(10, 3, 6, 6)
    notes = mean_field_fisher_from_model(net, shared).unread
    expected = (
        "0: zeros padding of maps (6, 6), read as circular",
        "1: γ varies between units",
        "1: β is not zero",
        "5: Dropout(0.5) is active",
        "6: the weights' mean",
        "7: Softmax; F is that of the outputs before it",
        "x: positions of a sample are correlated by 1",
        "1: its running variance is 9,",
    )
    assert len(notes) == len(expected)
    for note, start in zip(notes, expected, strict=True):
        assert note.startswith(start)
    assert "not read: 1: β is not zero" in str(mean_field_fisher_from_model(net, shared))
    sigmoid = mean_field_fisher_from_model(nn.Sequential(nn.Linear(5, 2), nn.Sigmoid()), num_samples=3)
    assert sigmoid.unread == ("Sigmoid after the last layer; F is that of the linear outputs",)


@pytest.mark.parametrize(
    ("stride", "pool", "positions"),
    [(1, None, 64), (2, None, 16), (1, nn.AvgPool2d(2), 16), ((2, 1), nn.AvgPool2d((1, 2)), 16)],
)
def test_positions_are_followed(stride: Any, pool: nn.Module | None, positions: int) -> None:
    layers = [nn.Conv2d(3, 8, 3, stride=stride, padding=1, padding_mode="circular"), nn.ReLU()]
    layers += [pool] if pool is not None else []
    flat = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * positions, 2))
    x = inputs(4, 3, 8, 8)
    assert mean_field_fisher_from_model(flat, x).layers[-1].fan_in == 8 * positions
    averaged = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    gaussian_(averaged, 2.0, 0.0, seed=0)
    found = mean_field_fisher_from_model(averaged, x)
    all_positions = 64 if pool is not None and stride == 1 else 32 if pool is not None else positions
    last = found.layers[-1]
    q1_hat, q2_hat = found.layers[0].q1 / 2, last.q2_hat
    assert last.q1_hat == pytest.approx(q1_hat / all_positions + (1 - 1 / all_positions) * q2_hat, rel=1e-9)


def test_a_head_of_convolutions() -> None:
    """1 × 1 convolution and average is average and Linear."""
    trunk = [nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    conv, linear = nn.Conv2d(8, 2, 1), nn.Linear(8, 2)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    x = inputs(4, 3, 8, 8)
    a = mean_field_fisher_from_model(nn.Sequential(*trunk, conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()), x)
    b = mean_field_fisher_from_model(nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), x)
    assert (a.kernel_same, a.kernel_different) == pytest.approx((b.kernel_same, b.kernel_different), rel=1e-9)


IMAGES = torch.zeros(4, 3, 8, 8).normal_(generator=torch.Generator().manual_seed(0))
REFUSALS: list[tuple[list[nn.Module], Any, type[Exception], str]] = [
    (
        [nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 2)],
        None,
        TypeError,
        "has 1, a LayerNorm, which mean-field theory",
    ),
    ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)], IMAGES, TypeError, "a MaxPool2d"),
    ([nn.Linear(5, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2)], None, ValueError, "does not follow a layer of"),
    ([nn.Linear(5, 5), nn.BatchNorm1d(5)], None, ValueError, "model ends in BatchNorm"),
    ([nn.ReLU()], None, ValueError, "no layer of weights"),
    ([nn.Conv2d(3, 4, 3)], None, ValueError, r"0 is a convolution.*pass x"),
    ([nn.Conv2d(3, 4, 3)], IMAGES, ValueError, r"output still has positions \(6, 6\)"),
    ([nn.Conv2d(3, 4, 3), nn.Linear(6, 2)], IMAGES, ValueError, r"Linear on features of shape \(6, 6\): flatten"),
    ([nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 1)], IMAGES, ValueError, "windows that overlap"),
    ([nn.AvgPool1d(2)], None, ValueError, "averages positions, of which there are none here"),
    ([OutputCentering(5), nn.Linear(5, 2)], None, ValueError, "after OutputCentering, which must come last"),
]


@pytest.mark.parametrize(("layers", "x", "error", "message"), REFUSALS)
def test_refusals(layers: list[nn.Module], x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_field_fisher_from_model(nn.Sequential(*layers), x, num_samples=8)


def test_refused_arguments() -> None:
    net = nn.Sequential(nn.Linear(5, 2))
    with pytest.raises(TypeError, match=r"model is a Linear, it must be an nn\.Sequential"):
        mean_field_fisher_from_model(net[0], num_samples=3)
    with pytest.raises(ValueError, match="num_samples is None and so is x"):
        mean_field_fisher_from_model(net)
    with pytest.raises(ValueError, match=r"num_samples is 0, it must be at least 1"):
        mean_field_fisher_from_model(net, num_samples=0)
    with pytest.raises(ValueError, match="num_samples is 1: BatchNorm"):
        mean_field_fisher_from_model(mlp([5, 5, 2], nn.ReLU, 2, 0, 0, gamma=1.0), num_samples=1)
    nn.init.zeros_(net[0].weight)
    with pytest.raises(ValueError, match=r"0\.weight has mean square 0\.0: the theory is of random weights"):
        mean_field_fisher_from_model(net, num_samples=3)
