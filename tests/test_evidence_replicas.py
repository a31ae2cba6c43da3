"""Stacked nets are the nets: sample by sample against BNPreconditioner, torch's optimizers and OnlineNorm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("tqdm", reason="the benchmarks show progress")

from benchmarks.evidence.contenders import CONTENDERS, Contender, bnp
from benchmarks.evidence.replica_statistics import Statistics
from benchmarks.evidence.replicas import Stack, errors_of, supports
from benchmarks.evidence.streams import Stream
from benchmarks.workloads import mlp
from bnp_optim import fold_normalization

WIDTHS = (8, 6)
RATES = (0.003, 0.02)
CHOSEN = [
    *(CONTENDERS[n] for n in ("SGD", "momentum", "AdamW", "BNP-SGD", "BNP-momentum", "BNP-AdamW")),
    *(CONTENDERS[n] for n in ("ON + SGD", "ON + AdamW")),
    bnp("BNP-SGD, ρ = .9", "sgd", stat_decay=0.9, var_rel_eps=1e-4, var_eps=1e-3),
    bnp("BNP-AdamW, unbounded", "adamw", step_scale=None),
    bnp("BNP-SGD, feature floors", "sgd", "feature floors"),
    bnp("BNP-SGD, first floors", "sgd", "first floors"),
    bnp("BNP-AdamW, geometric floors", "adamw", "geometric floors"),
    bnp("BNP-SGD, no debias", "sgd", debias=False),
    bnp("BNP-AdamW, no debias", "adamw", debias=False),
    bnp("BNP-momentum, clipped", "momentum", max_norm=0.7),
    bnp("BNP-AdamW, clipped", "adamw", max_norm=0.7),
    bnp("BNP-SGD, restart at 3", "sgd", "restart at 3"),
    bnp("BNP-AdamW, restart at 5", "adamw", "restart at 5"),
]
FOLLOWING = [
    bnp("BNP-SGD, following", "sgd", follow_inputs=True, stat_decay=0.9),
    bnp("BNP-momentum, following", "momentum", follow_inputs=True, stat_decay=0.9, max_norm=0.7),
    bnp("BNP-AdamW, following", "adamw", follow_inputs=True, stat_decay=0.9),
    bnp("BNP-AdamW, following at 4", "adamw", "following at 4", follow_inputs=True, stat_decay=0.9),
]


def stream(classes: int) -> Stream:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)) * [0.1, 1, 2, 0, 3] + [1, 2, 0, 1, 0]  # one input never changes
    return Stream(x, (x[:, 1] > 2).astype(int) + (x[:, 2] > 1) if classes else x[:, 1] * 2, classes)


def net_by_net(
    contender: Contender, data: Stream, rate: float, seed: int, fold: int
) -> tuple[nn.Module, list[torch.Tensor]]:
    """Outputs before each step, and the net after the last."""
    torch.manual_seed(seed)
    model = mlp((5, *WIDTHS, data.classes or 1), contender.norm).double()
    x, y, outputs = torch.from_numpy(data.x), torch.from_numpy(data.y), []

    def learn(i: int) -> None:
        output = model(x[i : i + 1])
        outputs.append(output.detach()[0])
        if i >= fold or len(outputs) > fold:
            optimizer.zero_grad()
            loss = F.cross_entropy(output, y[i : i + 1]) if data.classes else F.mse_loss(output[:, 0], y[i : i + 1])
            loss.backward()
            optimizer.step()

    with contender.context():
        optimizer = contender.make(model, rate)
        for i in range(len(x)):
            if fold and i == fold:
                fold_normalization(model, x[:i])
                optimizer = contender.make(model, rate)
                for j in range(i):
                    learn(j)
            learn(i)
    return model, outputs


def shifting(classes: int) -> Stream:
    """The same, its inputs elsewhere from sample 40 on: what a restart is for."""
    data = stream(classes)
    data.x[40:] += 5
    return data


def rescaled(classes: int) -> Stream:
    """The same, one of its inputs in other units from sample 40 on: what is followed."""
    data = stream(classes)
    data.x[40:, 0] = 30 * data.x[40:, 0] - 2
    return data


CASES = [(c, classes, 0) for c in CHOSEN for classes in (3, 0)]
CASES += [(c, classes, fold) for c in FOLLOWING for classes, fold in ((3, 0), (0, 0), (3, 10))]
CASES += [(CONTENDERS[name], 3, 10) for name in ("SGD", "BNP-SGD", "BNP-momentum", "BNP-AdamW")]
CASES += [(bnp("BNP-SGD, layer floors", "sgd", "layer floors"), 3, 10)]


@pytest.mark.parametrize(("contender", "classes", "fold"), CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_every_output_is_that_of_the_net_alone(
    contender: Contender, classes: int, fold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert supports(contender)
    make = shifting if "restart" in contender.variant else rescaled if contender in FOLLOWING else stream
    data, seen = make(classes), []
    forward = Stack.forward

    def recorded(self: Stack, x: torch.Tensor) -> torch.Tensor:
        output = forward(self, x)
        seen.append(output.clone())
        return output

    monkeypatch.setattr(Stack, "forward", recorded)
    errors = errors_of(contender, data, RATES, (0, 1), fold, dtype=torch.float64, widths=WIDTHS)
    for i, (rate, seed) in enumerate(zip(RATES, (0, 1), strict=True)):
        _, outputs = net_by_net(contender, data, rate, seed, fold)
        # statistics are float64 in both; beyond rounding nothing differs
        torch.testing.assert_close(torch.stack([s[i] for s in seen]), torch.stack(outputs), rtol=1e-7, atol=1e-9)
        outputs = outputs[:fold] + outputs[2 * fold :]  # between them are those of the samples that are learned late
        wrong = [float(o.argmax()) != y if classes else abs(float(o) - y) for o, y in zip(outputs, data.y, strict=True)]
        np.testing.assert_allclose(errors[i], np.array(wrong, dtype=float), rtol=1e-7, atol=1e-9)


def means_after(variant: str, x: np.ndarray) -> torch.Tensor:
    """μ after each sample, (samples, inputs)."""
    statistics = Statistics(bnp("", "sgd", variant), torch.zeros(1, x.shape[1], dtype=torch.float64), first=True)
    means = []
    for row in torch.from_numpy(x):
        statistics.update(row[None])
        means.append(statistics.mean[0].clone())
    return torch.stack(means)


def test_a_restart_follows_a_shift_and_neither_noise_nor_one_outlier() -> None:
    x = np.random.default_rng(0).normal(size=(600, 4))
    torch.testing.assert_close(means_after("restart at 5", x), means_after("", x), rtol=1e-12, atol=1e-12)
    absurd = x.copy()
    absurd[300] *= 1000
    torch.testing.assert_close(means_after("restart at 5", absurd), means_after("", absurd), rtol=1e-12, atol=1e-9)
    shift = x.copy()
    shift[300:] += 10
    assert means_after("", shift)[319].mean() == pytest.approx(10 * (1 - 0.99**20), abs=0.3)  # 1.8
    mass, left = 10.0, 0.9**2  # two samples are seen before the fast memory, of mass 10, is believed
    for _ in range(18):
        mass = 0.99 * mass + 1
        left *= 1 - 1 / mass
    assert means_after("restart at 5", shift)[319].mean() == pytest.approx(10 * (1 - left), abs=0.3)  # 7.0


def test_a_replica_that_diverges_leaves_the_others_alone() -> None:
    data = stream(0)
    alone = errors_of(CONTENDERS["SGD"], data, [0.003], [0])
    both = errors_of(CONTENDERS["SGD"], data, [0.003, 1e6], [0, 0])
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-4)  # float32
    dead = np.isnan(both[1])
    assert not dead[0] and dead[-1] and (np.diff(dead.astype(int)) >= 0).all()


def test_what_is_not_written_out_is_not_supported() -> None:
    assert not supports(CONTENDERS["Muon"]) and not supports(CONTENDERS["BNP-momentum, gradient form"])
    assert not supports(bnp("", "sgd", step_scale="spectral")) and not supports(bnp("", "sgd", mode="two_sided"))
