"""What the paper says of deep nets without batch normalization, and with it; means over many initializations.

The relative loss after a step of size 1 differs by orders of magnitude from seed to seed: the median over 8 of them
was between 19 and 1e7 (eight times eight seeds), so without batch normalization it is taken over 32.
"""

from __future__ import annotations

import functools
import math
import statistics

import pytest
import torch
from torch import nn

from bnp_optim.diagnostics import ActivationHealth, StepDivergence, activation_health, step_divergence
from tests.diagnostics.nets import closure, deep_net, noise

SEEDS = {False: range(32), True: range(8)}


@functools.cache
def measured(norm: bool) -> list[tuple[ActivationHealth, StepDivergence]]:
    """Of each seed; with batch normalization its outputs are watched, too."""
    found = []
    torch.set_num_threads(1)
    for seed in SEEDS[norm]:
        torch.manual_seed(seed)
        model = deep_net(norm)
        batch = closure(model, *noise())
        health = activation_health(model, batch, layers=(nn.Linear, nn.BatchNorm1d) if norm else None)
        found.append((health, step_divergence(model, batch, step_sizes=[1e-6, 1.0, 100.0])))
    return found


def healths(norm: bool) -> list[ActivationHealth]:
    return [health for health, _ in measured(norm)]


def relative_losses(norm: bool, at: int) -> list[float]:
    return [step.relative_losses["gradient"][at] for _, step in measured(norm)]


def test_a_step_of_size_one() -> None:
    assert statistics.median(relative_losses(False, 1)) > 20
    assert statistics.median(relative_losses(True, 1)) < 1.1
    assert max(relative_losses(True, 1)) < 1.3
    # a tiny one goes downhill everywhere
    assert max(relative_losses(False, 0) + relative_losses(True, 0)) < 1


def test_divergence() -> None:
    """Without normalization every net is beyond 10³ at a step of 100, a third of them at 1; with it none is."""
    plain = [step.divergence["gradient"] for _, step in measured(False)]
    assert set(plain) == {1.0, 100.0}
    assert sum(x == 1 for x in plain) >= len(plain) / 3
    assert {step.divergence["gradient"] for _, step in measured(True)} == {math.inf}


def test_the_channel_mean_outgrows_the_standard_deviation() -> None:
    for health in healths(False):
        ratios = [x.mean_to_std for x in health.layers]
        assert len(ratios) == 31
        assert ratios[0] < 0.1  # the error of a mean of 128 samples
        assert ratios[-1] > 1.2
    assert statistics.median(x.layers[-1].mean_to_std for x in healths(False)) == pytest.approx(2.6, abs=0.5)
    for health in healths(True):
        normed = health.layers[1::2]
        assert [x.name for x in normed] == [str(i) for i in range(1, 90, 3)]
        assert max(x.mean_to_std for x in normed) < 1e-6
        assert all(x.std == pytest.approx(1, abs=1e-3) for x in normed)


def test_logits_point_the_same_way() -> None:
    plain, normed = ([x.logit_cosine for x in healths(norm)] for norm in (False, True))
    assert statistics.median(plain) == pytest.approx(0.97, abs=0.02)
    assert min(plain) > 0.8
    assert statistics.median(normed) == pytest.approx(0.3, abs=0.06)
    assert max(normed) < 0.5


def test_gradients_are_heavy_tailed() -> None:
    """Layer by layer. Over all entries together it is high with batch normalization, too: scales differ."""
    plain, normed = (
        [statistics.median(x.gradient_kurtosis for x in h.layers if x.name in linear(norm)) for h in healths(norm)]
        for norm in (False, True)
    )
    assert min(plain) > 15
    assert 3 < min(normed) < max(normed) < 5
    assert min(x.gradient_kurtosis for x in healths(True)) > 10


def linear(norm: bool) -> list[str]:
    return [str(i) for i in range(0, 91, 3 if norm else 2)]
