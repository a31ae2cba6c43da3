"""Layers that read data and follow its units: against dense matrices in NumPy, and what must not follow."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPSGD, BNPAdamW, BNPreconditioner, fold_normalization
from bnp_optim.tracking import Tracker
from bnp_optim.units import UNITS
from tests.conftest import assert_same_weights, backward, hook_count, inputs, mlp, same, train, wrap
from tests.reference.numpy_bnp import ReferenceBNP, ReferenceLayer

LR, BETA = 0.05, 0.9
DECAY = 0.8  # a memory of five steps, of which three are enough
SHORT: dict[str, float] = {"stat_decay": DECAY, "var_rel_eps": 1e-6}  # the large must not hide the small


def momentum(model: nn.Module, **options: Any) -> BNPreconditioner:
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=BETA)
    return BNPreconditioner(base, model, **(SHORT | {"follow_inputs": True} | options))


def moved(before: int, after: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """In the middle two features of four change their units, and two move, one of them both."""
    data = [x.to(dtype) for x in inputs(before + after)]
    units, offset = torch.tensor([50.0, 1.0, 0.05, 1.0]), torch.tensor([0.0, 8.0, 9.0, 0.0])
    return data[:before] + [x * units + offset for x in data[before:]]


def expressed_at(reference: ReferenceBNP, mean: np.ndarray, sigma: np.ndarray) -> ReferenceBNP:
    """Of which ``from_z`` is P of these statistics, with q = 1."""
    other = copy.copy(reference)
    other.mean, other.sigma, other.q2 = mean, sigma, 1.0
    return other


class Follower:
    """What follows, by dense matrices: w ← P' P⁻¹ w."""

    def __init__(self, reference: ReferenceBNP) -> None:
        self.reference, self.changes, self.shrunk, self.steps = reference, 0, 0, 0
        self.beyond, self.went = np.zeros(4, int), np.zeros(4, bool)

    def follow(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """After a step on ``x``, (observations, channels)."""
        now = self.reference
        self.steps += 1
        if self.steps == 1 or sum(DECAY**k for k in range(self.steps)) < 0.5 / (1 - DECAY):
            self.mean, self.sigma = now.mean.copy(), now.sigma.copy()
            return weight, bias
        growth, distance = now.sigma / self.sigma, abs(now.mean - self.mean) / self.sigma
        far = np.sqrt(((x - self.mean) ** 2).mean(0)) > 2 * np.sqrt(self.sigma * now.sigma)
        self.beyond = np.where(far & ((growth > 2) | (distance > 1)), self.beyond + 1, 0)
        out = self.beyond >= 3
        self.went |= out
        shrunk = (growth < 0.5) & self.went & ~out
        self.shrunk += int(shrunk.sum())
        out |= shrunk
        self.changes += int(out.sum())
        self.beyond[out] = 0
        old = expressed_at(now, self.mean, self.sigma)
        self.mean, self.sigma = np.where(out, now.mean, self.mean), np.where(out, now.sigma, self.sigma)
        new = expressed_at(now, self.mean, self.sigma)
        found, shift = new.from_z(*old._map_rows(weight, bias, lambda p, row: np.linalg.solve(p, row)))
        assert shift is not None
        return found, shift


@pytest.mark.parametrize("on_host", [True, False], ids=["on the host", "on the device"])
def test_training_is_that_of_numpy(on_host: bool) -> None:
    """SGD with momentum in z; the first layer follows, the second, whose inputs move with it, does not."""
    model, data = mlp().double(), moved(8, 30, dtype=torch.float64)
    own = copy.deepcopy(model)
    linear: list[nn.Linear] = [own[0], own[2]]  # type: ignore[list-item]
    references = [ReferenceBNP(ReferenceLayer("linear", tuple(m.weight.shape), True), **SHORT) for m in linear]
    follower, buffers = Follower(references[0]), [np.zeros(p.shape) for p in own.parameters()]
    for x in data:
        own.zero_grad()
        backward(own, x)
        for i, (m, reference, seen) in enumerate(zip(linear, references, (x, own[:2](x)), strict=True)):
            reference.observe(seen.detach().numpy())
            reference.commit()
            gradient = reference.to_z(m.weight.grad.numpy(), m.bias.grad.numpy())  # type: ignore[union-attr]
            for k in (0, 1):
                buffers[2 * i + k] = BETA * buffers[2 * i + k] + gradient[k]
        for i, (m, reference) in enumerate(zip(linear, references, strict=True)):
            dw, db = reference.from_z(-LR * buffers[2 * i], -LR * buffers[2 * i + 1])
            w, b = m.weight.detach().numpy() + dw, m.bias.detach().numpy() + db  # type: ignore[operator]
            with torch.no_grad():
                for parameter, value in zip(
                    (m.weight, m.bias), follower.follow(x.numpy(), w, b) if i == 0 else (w, b), strict=True
                ):
                    parameter.copy_(torch.from_numpy(value))
    assert follower.changes >= 6 and follower.shrunk >= 2  # the case is what it says

    optimizer = momentum(model)
    if not on_host:
        optimizer._tracker._on_host = False
        optimizer._tracker.reset()
    train(model, optimizer, data)
    for found, wanted in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_follows_channel_by_channel(groups: int) -> None:
    """With a rate of zero nothing but the units moves it."""
    torch.manual_seed(3)
    layer = nn.Conv2d(4, 6, 3, groups=groups).double()
    model = nn.Sequential(layer, nn.Flatten())
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = BNPreconditioner(base, model, **SHORT, follow_inputs=True)
    reference = ReferenceBNP(ReferenceLayer("conv", tuple(layer.weight.shape), True, groups=groups), **SHORT)
    follower = Follower(reference)
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    for step in range(24):
        x = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) + 0.3
        if step >= 8:
            x = x * torch.tensor([20, 1, 0.1, 1]).view(4, 1, 1) + torch.tensor([0, 0, 9, 0]).view(4, 1, 1)
        train(model, optimizer, [x])
        reference.observe(x.numpy())
        reference.commit()
        weight, bias = follower.follow(np.moveaxis(x.numpy(), 1, -1).reshape(-1, 4), weight, bias)
    assert follower.changes >= 3 and follower.shrunk >= 1
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("on_host", [True, False], ids=["on the host", "on the device"])
def test_where_no_unit_changes_nothing_is_changed_to_the_last_bit(on_host: bool) -> None:
    plain, following = mlp(), mlp()
    optimizers = [momentum(plain, follow_inputs=False, stat_decay=0.99), momentum(following, stat_decay=0.99)]
    for model, optimizer in zip((plain, following), optimizers, strict=True):
        if not on_host:
            optimizer._tracker._on_host = False
            optimizer._tracker.reset()
        train(model, optimizer, inputs(100))
    assert same(list(following.parameters()), list(plain.parameters()))
    assert "bnp_origin" in optimizer.state_dict()["state"][0]  # it was watched
    assert "bnp_origin" not in optimizer.state_dict()["state"][2]


def test_a_stream_goes_on_where_it_was_when_units_change() -> None:
    """Squared error of a line that is learned at batch size 1, before, just after and later, with and without."""
    units, offset = torch.tensor([300.0, 0.01, 1.0, 20.0]), torch.tensor([0.0, 5.0, -30.0, 0.0])
    x = torch.cat(inputs(2400, batch=1))
    y = x @ torch.tensor([1.0, -1.0, 0.5, 0.2])
    raw = torch.where(torch.arange(2400)[:, None] < 800, x, x * units + offset)

    def late_error(*, follow: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        fold_normalization(model, raw[:20])
        optimizer = BNPAdamW(model, lr=3e-3, follow_inputs=follow)
        errors = []
        for sample, target in zip(raw, y, strict=True):
            optimizer.zero_grad()
            loss = (model(sample[None])[0, 0] - target).square()
            loss.backward()
            optimizer.step()
            errors.append(loss.item())
        return float(np.mean(errors[600:800])), float(np.mean(errors[2000:]))

    before, late = late_error(follow=True)
    same_before, lost = late_error(follow=False)
    assert before == same_before < 0.1
    assert late < 1.5 * before and lost > 1000


def test_neither_an_outlier_nor_a_silence_is_a_change_of_units() -> None:
    """Both move the running statistics out of the band; three samples of the new kind in a row are followed."""

    def weights_after(change: dict[int, Tensor]) -> Tensor:
        model = mlp()
        data = inputs(400, batch=1)
        for i, x in change.items():
            data[i] = x
        train(model, BNPSGD(model, lr=0.0, follow_inputs=True), data)
        return model[0].weight.detach()

    outlier, silent = torch.full((1, 4), 1e3), torch.zeros(1, 4)
    start = mlp()[0].weight
    assert torch.equal(weights_after({100: outlier, 101: -outlier, 104: outlier, 300: outlier}), start)
    assert torch.equal(weights_after(dict.fromkeys(range(100, 400), silent)), start)
    assert (start / weights_after(dict.fromkeys(range(397, 400), outlier))).min() > 50


def test_only_what_reads_data_follows() -> None:
    """Neither a hidden layer, nor a first one whose inputs need gradients, nor one without a bias or with two users."""

    def changed(model: nn.Module, data: list[Tensor]) -> list[str]:
        before = copy.deepcopy(model.state_dict())
        optimizer = BNPSGD(model, lr=0.0, **SHORT, follow_inputs=True)
        train(model, optimizer, data)
        return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]

    data = moved(8, 8)
    assert changed(mlp(), data) == ["0.weight", "0.bias"]
    assert changed(mlp(), [x.requires_grad_() for x in moved(8, 8)]) == []
    assert changed(mlp(bias=False), data) == []
    frozen = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    frozen[0].weight.data.copy_(torch.eye(4))
    assert changed(frozen, data) == ["1.weight", "1.bias"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert changed(tied, data) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_follows_like_an_eager_one() -> None:
    torch._dynamo.reset()
    eager, model = mlp(), mlp()
    a, b = momentum(eager), momentum(model)
    train(eager, a, moved(6, 8))
    train(torch.compile(model, backend="eager", fullgraph=True), b, moved(6, 8))
    torch._dynamo.reset()
    assert_same_weights(eager, model, rtol=1e-5)
    fixed = mlp()
    train(fixed, momentum(fixed, follow_inputs=False), moved(6, 8))
    assert (fixed[0].weight / model[0].weight).abs().max() > 5


def test_the_floors_of_a_fold_follow_too() -> None:
    """Units are kept in the optimizer, in its checkpoints, and beside the weights for the optimizer after it."""
    model, data = mlp(), moved(8, 40)
    fold_normalization(model, torch.cat(data[:8]))
    first = model[0]._buffers[UNITS].clone()  # type: ignore[union-attr]
    optimizer = momentum(model)
    train(model, optimizer, data)
    units = model[0]._buffers[UNITS]
    assert isinstance(units, Tensor)
    growth = (units / first).sqrt()
    assert growth[0] > 20 and growth[2] < 0.2 and 0.5 < growth[3] < 2
    assert torch.equal(optimizer.state_dict()["state"][0]["bnp_units"], units)
    after = momentum(model)
    train(model, after, data[-2:])
    assert torch.equal(after.state_dict()["state"][0]["bnp_units"], units)


def test_checkpoints_copies_and_pickles_go_on_following() -> None:
    model, data = mlp(), moved(9, 9)
    optimizer = momentum(model)
    train(model, optimizer, data[:8])
    twin, copied = copy.deepcopy((model, optimizer))
    thawed, unpickled = pickle.loads(pickle.dumps((model, optimizer)))
    resumed = mlp()
    resumed.load_state_dict(model.state_dict())
    loaded = momentum(resumed)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the buffers otherwise
    for m, o in ((model, optimizer), (twin, copied), (thawed, unpickled), (resumed, loaded)):
        train(m, o, data[8:])
    for m in (twin, thawed, resumed):
        assert same(list(m.parameters()), list(model.parameters()))
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0]["bnp_origin"] = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"bnp_origin of shape \(4, 5\) for layer '0', which needs \(4, 4\)"):
        loaded.load_state_dict(wrong)


def test_a_checkpoint_without_and_a_pickle_of_before_the_option_start_where_they_are() -> None:
    model, data = mlp(), inputs(12)
    plain = momentum(model, follow_inputs=False)
    train(model, plain, data[:10])
    optimizer = momentum(model)
    optimizer.load_state_dict(plain.state_dict())
    assert "bnp_origin" not in optimizer.state_dict()["state"][0]
    train(model, optimizer, data[10:11])
    now = optimizer.statistics["0"]
    origin = optimizer.state_dict()["state"][0]["bnp_origin"]
    assert torch.equal(origin[0], now.mean)
    torch.testing.assert_close(origin[1] ** -2, now.variance + 1e-6 * now.variance.max() + 1e-4)
    state = plain.__getstate__()
    del state["settings"]["follow_inputs"]
    old = BNPreconditioner.__new__(BNPreconditioner)
    old.__setstate__(state)
    assert not old._tracker.gate.follows


def test_half_precision_weights_follow() -> None:
    model = mlp().bfloat16()
    exact = mlp()
    exact.load_state_dict(model.state_dict())
    for m in (model, exact):
        optimizer = BNPSGD(m, lr=0.0, **SHORT, follow_inputs=True)
        train(m, optimizer, [x.to(m[0].weight.dtype) for x in moved(6, 8)])
    torch.testing.assert_close(model[0].weight.float(), exact[0].weight, rtol=0.1, atol=0)


def test_what_cannot_follow_is_refused_before_anything_is_attached() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"follow_inputs is True with mode='gradient'.*leave mode='auto'"):
        momentum(model, mode="gradient")
    with (
        mock.patch.object(Tracker, "sharded", True),
        pytest.raises(ValueError, match="follow_inputs is True, but weights are sharded: normalize the inputs"),
    ):
        wrap(model, follow_inputs=True)
    assert hook_count(model) == 0
    assert "mode='gradient'" in repr(wrap(model, follow_inputs=True, mode="gradient"))  # plain SGD remembers nothing
