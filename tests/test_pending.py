"""Steps that are skipped, shared, frozen or poisoned: whose samples are in the statistics, and whose are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_statistics, backward, count, inputs, mlp, same, wrap


@pytest.mark.parametrize("by", ["optimizer", "model", "in place"])
def test_a_skipped_step_never_was(by: str) -> None:
    """The user (or GradScaler) skips a step and zeroes: the next step's N and statistics know nothing of it."""
    with_skip, without = mlp(), mlp()
    a, b = wrap(with_skip), wrap(without)
    for i, x in enumerate(inputs(6)):
        if i == 3:
            backward(with_skip, x * 100)
            if by == "model":
                with_skip.zero_grad()
            else:
                a.zero_grad(set_to_none=by == "optimizer")
            continue
        for model, optimizer in ((with_skip, a), (without, b)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert same(a.state_dict(), b.state_dict())
    assert same(dict(with_skip.state_dict()), dict(without.state_dict()))


def test_two_optimizers_of_a_gan() -> None:
    """The discriminator's forward for the generator's loss reaches its weights, but that gradient is dropped."""
    torch.manual_seed(0)
    generator, discriminator = nn.Sequential(nn.Linear(2, 4)), nn.Sequential(nn.Linear(4, 1))
    reference = copy.deepcopy(discriminator)
    opt_g, opt_d, opt_r = wrap(generator), wrap(discriminator), wrap(reference)
    noise = torch.Generator().manual_seed(1)
    for real in inputs(4):
        z = torch.randn(8, 2, generator=noise)
        fake = generator(z)
        for d, optimizer in ((discriminator, opt_d), (reference, opt_r)):
            d.zero_grad()
            (d(real).mean() - d(fake.detach()).mean()).backward()
            optimizer.step()
        generator.zero_grad()
        discriminator(fake).mean().backward()  # leaves a gradient, and samples, in the discriminator
        opt_g.step()
    assert count(opt_d) == 4 * 16
    assert count(opt_g) == 4 * 8
    assert same(opt_d.state_dict(), opt_r.state_dict())
    assert same(dict(discriminator.state_dict()), dict(reference.state_dict()))


def test_frozen_and_partly_frozen_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    optimizer = wrap(model)
    frozen = [p.clone() for p in (*model[0].parameters(), model[1].weight, model[2].bias)]
    x = inputs(1)[0]
    backward(model, x)
    expected = model[1].bias.grad.clone()
    optimizer.step()
    assert [count(optimizer, str(i)) for i in range(4)] == [0, 0, 8, 8]
    assert all(map(torch.equal, frozen, (*[p.detach() for p in model[0].parameters()], model[1].weight, model[2].bias)))
    assert torch.equal(model[1].bias.grad, expected)  # a bias without its weight passes through
    rows = {row.name: (row.preconditioned, row.why) for row in optimizer.coverage()}
    assert rows["0.weight"] == (False, "frozen")
    assert rows["2.weight"] == (True, "rank-one P: its bias is frozen")
    assert not rows["1.bias"][0]


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_batch_changes_no_statistics(position: int, poison: float) -> None:
    """Each layer's input in turn; the step is skipped, and training goes on as if the batch had not been."""

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 1)]
            )
            self.at = -1

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1)
            known = 0
            for layer in self.layers:
                if not isinstance(layer, nn.Flatten):
                    if known == self.at:
                        mask = torch.zeros_like(x)
                        mask.view(-1)[1] = poison
                        x = x + mask
                    known += 1
                x = layer(x)
            return x

    torch.manual_seed(0)
    poisoned = Poisoned()
    clean = copy.deepcopy(poisoned)
    a, b = wrap(poisoned, step_scale="spectral"), wrap(clean, step_scale="spectral")
    for i, x in enumerate(inputs(6)):
        if i in (0, 3):
            before = a.state_dict()["state"]
            poisoned.at = position
            backward(poisoned, x)
            with torch.no_grad():
                keep = [p.clone() for p in poisoned.parameters()]
            a.step()  # taken, not skipped: the parameters go bad, the statistics must not
            after = a.state_dict()["state"]
            if i:
                assert same(before, after)
            else:
                assert all(int(s.count) == 0 for s in a.statistics.values())
            with torch.no_grad():
                for p, k in zip(poisoned.parameters(), keep, strict=True):
                    p.copy_(k)
            poisoned.at = -1
            a.zero_grad()
            continue
        for model, optimizer in ((poisoned, a), (clean, b)):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    assert_same_statistics(a, b, 0)
    assert same(dict(poisoned.state_dict()), dict(clean.state_dict()))


def test_stat_interval_measures_every_kth_step() -> None:
    model = mlp()
    optimizer = wrap(model, stat_interval=3)
    counts = []
    for x in inputs(7):
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
        counts.append(count(optimizer))
    assert counts == [8, 8, 8, 16, 16, 16, 24]


def test_remove_hooks_keeps_the_statistics() -> None:
    model = mlp()
    optimizer = wrap(model)
    first, second = inputs(2)
    backward(model, first)
    optimizer.step()
    optimizer.remove_hooks()
    before = optimizer.statistics
    optimizer.zero_grad()
    backward(model, second)
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert same([vars(s) for s in before.values()], [vars(s) for s in optimizer.statistics.values()])
    assert not torch.equal(model[0].weight.grad, raw)
    assert not model[0]._forward_hooks
    assert not model[0].weight._backward_hooks
