"""GammaDecay adds what GammaDecayPenalty says, where it says, and logs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from bnp_optim.nn import GammaDecayPenalty, convert_batchnorm
from tests.callbacks.runs import BATCH, BATCHES, data, loader, pl, seeded, trainer

from lightning_callbacks import GammaDecay, HessianConditionMonitor  # isort: skip
from lightning_callbacks._lightning import MisconfigurationException  # isort: skip


def norm_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return convert_batchnorm(net)  # type: ignore[return-value]


def free_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


NETS: dict[str, Any] = {"norm": norm_net, "free": free_net}


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = seeded(NETS[kind])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return optimizer_of(self)


def optimizer_of(module: nn.Module) -> Any:
    base = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    if any("PopulationNorm" in type(m).__name__ for m in module.modules()):
        return base
    return BNPreconditioner(base, module)


def by_hand(kind: str, epochs: int, *, accumulate: int = 1, clip: float | None = None, **options: Any) -> Any:
    """The module after a plain loop over the same batches, and the penalty of every step."""
    module, values = Module(kind), []
    optimizer = optimizer_of(module)
    bnp = optimizer if isinstance(optimizer, BNPreconditioner) else None
    penalty = GammaDecayPenalty(module, options.pop("batch_size", BATCH), optimizer=bnp, **options)
    for _ in range(epochs):
        for i, batch in enumerate(loader(shuffle=False)):
            (module.training_step(batch, i) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                values.append(penalty.add_gradients().item())
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return module, values, penalty


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def run(folder: Path, kind: str, callbacks: Any, ckpt: Any = None, **options: Any) -> tuple[Any, Any]:
    fitted, module = trainer(folder, callbacks, **options), Module(kind)
    fitted.fit(module, loader(shuffle=False), ckpt_path=ckpt, weights_only=None if ckpt is None else False)
    return fitted, module


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_is_that_of_the_plain_loop(kind: str, accumulate: int, clip: float | None, tmp_path: Path) -> None:
    options = {"strength": 3.0, "interval": 2}
    expected, values, penalty = by_hand(kind, 2, accumulate=accumulate, clip=clip, **options)
    fitted, module = run(
        tmp_path, kind, [GammaDecay(**options)], accumulate_grad_batches=accumulate, gradient_clip_val=clip
    )
    assert same(module, expected)
    assert not same(module, run(tmp_path, kind, [], accumulate_grad_batches=accumulate, gradient_clip_val=clip)[1])
    logged = [row["gamma_decay/penalty"] for _, row in fitted.logger.rows if "gamma_decay/penalty" in row]
    assert len(logged) == 2 * BATCHES // accumulate
    assert logged == pytest.approx(values, rel=1e-6)
    zeta = {f"gamma_decay/zeta/{name}": float(z.mean()) for name, z in penalty.coefficients.items()}
    assert set(zeta) == {f"gamma_decay/zeta/net.{i}" for i in ((1,) if kind == "norm" else (0, 2))}
    metrics = {k: float(v) for k, v in fitted.callback_metrics.items() if k in zeta}
    assert metrics == pytest.approx(zeta, rel=1e-6)
    assert not any(m._forward_hooks for m in module.modules() if type(m).__name__ == "PopulationNorm1d")


@pytest.mark.parametrize("kind", NETS)
def test_monitors_beside_it_leave_no_trace(kind: str, tmp_path: Path) -> None:
    monitor = HessianConditionMonitor(every_n_train_steps=2, num_steps=2, num_probes=0)
    _, alone = run(tmp_path, kind, [GammaDecay(16, interval=1)])
    _, watched = run(tmp_path, kind, [monitor, GammaDecay(16, interval=1)])
    assert len(monitor.history) == BATCHES
    assert same(alone, watched)


@pytest.mark.parametrize("kind", NETS)
def test_a_resumed_training_is_the_same(kind: str, tmp_path: Path) -> None:
    _, whole = run(tmp_path, kind, [GammaDecay(interval=3)], max_epochs=4)
    first, _ = run(tmp_path, kind, [GammaDecay(interval=3)], max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(tmp_path, kind, [GammaDecay(interval=3)], ckpt=tmp_path / "half.ckpt", max_epochs=4)
    assert same(whole, resumed)


def test_strength_zero_changes_nothing_and_log_is_optional(tmp_path: Path) -> None:
    _, plain = run(tmp_path, "free", [])
    fitted, zero = run(tmp_path, "free", [GammaDecay(strength=0.0, log=False)])
    assert same(plain, zero)
    assert not any("gamma_decay" in key for key in fitted.callback_metrics)


def test_two_optimizers_each_decay_their_own(tmp_path: Path) -> None:
    class Two(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = seeded(free_net), seeded(free_net)

        def training_step(self, batch: Any, index: int) -> None:
            for net, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [BNPreconditioner(torch.optim.SGD(net.parameters(), lr=0.1), net) for net in (self.a, self.b)]

    def fitted(callbacks: Any) -> Any:
        module = Two()
        trainer(tmp_path, callbacks, max_epochs=1).fit(module, loader(shuffle=False))
        return module

    callback = GammaDecay(activation={"a.4": "identity"}, interval=1)
    module = fitted([callback])
    plain = fitted([])
    assert not same(module.a, plain.a) and not same(module.b, plain.b)
    assert [len(states) for states in callback.state_dict()["meters"]] == [3, 2]
    assert not torch.equal(module.a[4].weight, module.b[4].weight)


@pytest.mark.parametrize(
    ("kind", "callback", "message"),
    [
        ("norm", GammaDecay(1), "GammaDecay: batch_size is 1"),
        ("norm", GammaDecay(strength=-1.0), "GammaDecay: strength is -1.0"),
        (
            "free",
            GammaDecay(activation={"fc": "relu"}),
            "GammaDecay: activation names 'fc', which is no layer to decay",
        ),
    ],
)
def test_bad_arguments(kind: str, callback: GammaDecay, message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, kind, [callback])


def test_nothing_to_decay(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="neither PopulationNorm layers"):
        trainer(tmp_path, [GammaDecay()]).fit(Plain("free"), loader())
    assert len(data()) == BATCHES * BATCH
