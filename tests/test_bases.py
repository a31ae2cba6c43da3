"""Bases and gradients that are out of the ordinary, several wrappers, and what is attached when."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_optim import BNPreconditioner
from tests.conftest import backward, hook_count, inputs, mlp, train, weights


class SignSGD(Optimizer):
    """A third party's optimizer; keeps what it saw."""

    def __init__(self, params: Any, lr: float = 0.1, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen = [(p.detach().clone(), p.grad.clone()) for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize("defaults", [{}, {"weight_decay": 0.0}, {"weight_decay": 0.1}], ids=str)
def test_an_unknown_base_warns_only_of_a_decay_that_is_there(defaults: dict[str, float]) -> None:
    model = mlp()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = BNPreconditioner(SignSGD(model.parameters(), **defaults), model)
        train(model, optimizer, inputs(2))
    assert [str(w.message)[:38] for w in caught] == ["BNPreconditioner: SignSGD is no optimi"] * bool(
        defaults.get("weight_decay")
    )
    assert "mode='two_sided'" in repr(optimizer)


@pytest.mark.parametrize("mode", ["gradient", "two_sided"])
@pytest.mark.filterwarnings("ignore:BNPreconditioner. mode='gradient' feeds")
def test_an_unknown_base_finds_its_parameters_in_place(mode: Any) -> None:
    """Not zeros, which its trust ratio or clipping would take for the weights."""
    model = mlp()
    base = SignSGD(model.parameters())
    optimizer = BNPreconditioner(base, model, mode=mode)
    train(model, optimizer, inputs(1))
    before = [w.detach().clone() for w in model.parameters()]
    train(model, optimizer, inputs(1, seed=2))
    assert all(torch.equal(w, seen) for w, (seen, _) in zip(before, base.seen, strict=True))
    assert all(torch.equal(p.grad, fed) for p, (_, fed) in zip(model.parameters(), base.seen, strict=True))


class Failing(torch.optim.SGD):
    """Moves its parameters, then raises."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("additive", [True, False])
def test_parameters_are_as_they_were_when_the_base_raises_in_the_two_sided_form(
    additive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of torch has them at zero at that moment."""
    model = mlp()
    if additive:

        def interrupted(self: Any, closure: Any = None) -> None:
            assert all(not p.any() for p in model.parameters())
            raise RuntimeError("interrupted")

        base: Optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        monkeypatch.setattr(torch.optim.Adagrad, "step", interrupted)
    else:
        base = Failing(model.parameters(), lr=0.1)
    optimizer = BNPreconditioner(base, model, mode="two_sided")
    before = weights(model)
    backward(model, inputs(1)[0])
    with pytest.raises(RuntimeError, match="interrupted"):
        optimizer.step()
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_on_bias_free_weights_runs_in_z() -> None:
    """One step, by hand: Muon's own step from zero on Pᵀg, mapped by P."""
    from bnp_optim.transform import from_z, to_z

    model = mlp(bias=False)
    optimizer = BNPreconditioner(torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.2), model)
    backward(model, inputs(1)[0])
    raw = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for layer, p, (old, g) in zip(optimizer._tracker.layers, model.parameters(), raw, strict=True):
        f = optimizer._tracker.factors(layer)
        z = nn.Parameter(torch.zeros_like(old))
        to_z(g.unsqueeze(0), None, f)
        z.grad = g
        torch.optim.Muon([z], lr=0.1, weight_decay=0.0).step()
        move = z.detach().clone()
        from_z(move.unsqueeze(0), None, f)
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.2) + move, rtol=1e-6, atol=1e-7)
    assert optimizer.coverage().preconditioned == ("0.weight", "2.weight")


# ---- gradients -----------------------------------------------------------------------------------


def test_sparse_gradients_pass_through() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3))

    model, plain = build(), build()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    tokens = torch.tensor([1, 3, 3, 7])
    for net, opt in ((model, optimizer), (plain, base)):
        net(tokens).square().mean().backward()
        opt.step()  # type: ignore[attr-defined]
    assert model[0].weight.grad.is_sparse
    assert torch.equal(model[0].weight, plain[0].weight)
    assert not torch.equal(model[1].weight, plain[1].weight)
    assert optimizer.statistics["1"].count == 4


def test_a_sparse_gradient_of_a_layers_own_weight_passes_through() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    backward(model, inputs(1)[0])
    sparse = torch.eye(3, 4).to_sparse()
    model[0].weight.grad = sparse
    before = weights(model), model[0].bias.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight.detach(), before[0]["0.weight"] - 0.1 * sparse.to_dense())
    assert torch.equal(model[0].bias.detach(), before[0]["0.bias"] - 0.1 * before[1])


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW], ids=["gradient", "two_sided"])
def test_a_gradient_whose_entries_share_memory_is_preconditioned_like_any(base_class: Any) -> None:
    """``sum`` of a parameter gives an expanded one; written in place it would change all entries at once."""
    results = []
    for expanded in (True, False):
        model = mlp()
        optimizer = BNPreconditioner(base_class(model.parameters(), lr=0.1), model)
        train(model, optimizer, inputs(1))
        for p in model.parameters():
            p.grad = torch.full((), 0.3).expand(p.shape)
            p.grad = p.grad if expanded else p.grad.clone()
        optimizer.step()
        results.append(weights(model))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW], ids=["gradient", "two_sided"])
def test_layers_without_a_gradient_are_not_moved(base_class: Any) -> None:
    model = mlp()
    optimizer = BNPreconditioner(base_class(model.parameters(), lr=0.1), model)
    train(model, optimizer, inputs(2))
    before = weights(model)
    optimizer.zero_grad()
    optimizer.step()
    model[2](torch.ones(5, 6)).sum().backward()
    optimizer.step()
    after = weights(model)
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["2.weight", "2.bias"]
    assert {name: int(s.count) for name, s in optimizer.statistics.items()} == {"0": 16, "2": 21}


# ---- several wrappers ----------------------------------------------------------------------------


def test_two_wrappers_on_one_model_own_disjoint_layers() -> None:
    model, expected = mlp(), mlp()
    first = BNPreconditioner(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    second = BNPreconditioner(torch.optim.AdamW(model[2].parameters(), lr=0.01), model)
    assert (list(first.statistics), list(second.statistics)) == (["0"], ["2"])
    assert first.coverage()["2.weight"].why == "not in this optimizer's parameter groups"
    both = BNPreconditioner(torch.optim.SGD(expected.parameters(), lr=0.1), expected)
    x = inputs(1)[0]
    backward(model, x)
    backward(expected, x)
    first.step()
    both.step()
    assert torch.equal(model[0].weight, expected[0].weight)
    assert torch.equal(model[2].weight, mlp()[2].weight)
    second.step()
    assert first.statistics["0"].count == second.statistics["2"].count == 8
    assert torch.equal(second.statistics["2"].mean, both.statistics["2"].mean)


def test_a_weight_and_its_bias_in_two_optimizers_get_the_rank_one_form() -> None:
    """As Muon for matrices and Adam for the rest: G̃_w is that of a layer without bias, the bias passes through."""
    model, expected = mlp(), mlp()
    with torch.no_grad():
        for layer in (expected[0], expected[2]):
            layer.bias.requires_grad_(False)
    matrices = BNPreconditioner(torch.optim.SGD([model[0].weight, model[2].weight], lr=0.1), model)
    rest = torch.optim.SGD([model[0].bias, model[2].bias], lr=0.0)
    frozen = BNPreconditioner(torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], lr=0.1), expected)
    for x in inputs(3):
        for net, opts in ((model, (matrices, rest)), (expected, (frozen,))):
            net.zero_grad()
            backward(net, x)
            for opt in opts:
                opt.step()
    for name, value in weights(expected).items():
        assert torch.equal(model.state_dict()[name], value), name


# ---- what is attached ----------------------------------------------------------------------------


def test_removed_hooks_stay_removed_until_rescan() -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD([model[0].weight], lr=0.1), model)
    train(model, optimizer, inputs(1))
    frozen = optimizer.statistics["0"]
    optimizer.remove_hooks()
    optimizer.add_param_group({"params": [model[2].weight]})
    assert hook_count(model) == 0
    before = model[0].weight.detach().clone()
    optimizer.zero_grad()
    backward(model, inputs(1, seed=2)[0])
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(optimizer.statistics["0"].mean, frozen.mean) and optimizer.statistics["0"].count == 8
    assert not torch.equal(model[0].weight.detach(), before - 0.1 * raw)  # the statistics go on being used
    optimizer.rescan()
    assert hook_count(model) == 2
    train(model, optimizer, inputs(1))
    assert {name: int(s.count) for name, s in optimizer.statistics.items()} == {"0": 16, "2": 8}


def test_a_dead_wrapper_leaves_no_hook_on_modules_or_tensors() -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train(model, optimizer, inputs(1))
    assert hook_count(model) == 2 and not model[0].weight._backward_hooks
    del optimizer
    import gc

    gc.collect()
    assert hook_count(model) == 0
    assert not any(p._backward_hooks for p in model.parameters())


def test_replaced_parameters_and_modules_are_followed() -> None:
    """FSDP2 and accelerate replace parameters; a growing head needs a rescan, and the others keep their statistics."""
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    train(model, optimizer, inputs(1))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    model[2] = nn.Linear(6, 5)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, inputs(1))
    assert optimizer.statistics["0"].count == 16
    optimizer.rescan()
    train(model, optimizer, inputs(1))
    assert {name: int(s.count) for name, s in optimizer.statistics.items()} == {"0": 24, "2": 8}


def test_pauses_nest_and_end_with_an_exception() -> None:
    model = mlp()
    optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)
    a, b, c = inputs(3)

    def fail() -> Tensor:
        with optimizer.pause_statistics(), optimizer.pause_statistics():
            backward(model, a)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    backward(model, b)
    backward(model, c)
    optimizer.step()
    assert optimizer.statistics["0"].count == 16
    torch.testing.assert_close(optimizer.statistics["0"].mean, torch.cat([b, c]).mean(0))


@pytest.mark.parametrize(("momentum", "form"), [(0.0, "gradient"), (0.9, "two_sided")])
def test_momentum_is_collected_in_z(momentum: float, form: str) -> None:
    """Around SGD "auto" is bitwise the form that it names, and the forms differ if there is momentum."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), [torch.randn(3, 4) * 3 for _ in range(6)]
    ends = {}
    for mode in ("auto", "gradient", "two_sided"):
        net = copy.deepcopy(model)
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum, nesterov=momentum > 0)
        optimizer = BNPreconditioner(base, net, mode=mode)
        assert f"mode={form if mode == 'auto' else mode!r}".replace("'", "") in repr(optimizer).replace("'", "")
        train(net, optimizer, data)
        ends[mode] = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.equal(ends["auto"], ends[form])
    apart = float((ends["gradient"] - ends["two_sided"]).abs().max())
    assert apart > 1e-2 if momentum else apart < 1e-6


def test_one_group_with_momentum_makes_the_optimizer_two_sided() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "momentum": 0.9}]
    assert "two_sided" in repr(BNPreconditioner(torch.optim.SGD(groups, lr=0.1), model))
    assert "gradient" in repr(BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model))
