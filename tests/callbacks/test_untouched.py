"""Training with the monitors is training without, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.callbacks.runs import BATCHES, Busy, Plain, fit, left_behind, monitors, pl, seeded
from tests.conftest import same

from lightning_callbacks import StepDivergenceProbe  # isort: skip


def assert_untouched(folder: Path, make: Any, callbacks: Any = None, **options: Any) -> list[Any]:
    """Returns the monitors, each of which has seen something."""
    plain = make()
    expected = left_behind(fit(folder, plain, **options), plain)
    callbacks = monitors() if callbacks is None else callbacks
    watched = make()
    found = left_behind(fit(folder, watched, callbacks, **options), watched)
    for part in expected:
        assert same(found[part], expected[part]), part
    assert all(c.history for c in callbacks)
    return callbacks  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {}),
        ("BNP-SGD", {}),
        ("AdamW", {"accumulate_grad_batches": 4}),
        ("BNP-AdamW", {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
        ("BNP-AdamW", {"precision": "bf16-mixed"}),
        ("SGD", {"precision": "bf16-mixed", "gradient_clip_val": 0.1}),
    ],
)
def test_dropout_batch_norm_metrics_and_a_busy_training_step(
    optimizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    assert_untouched(tmp_path, lambda: Busy(optimizer), **options)


def test_batches_of_the_past_and_of_a_loader(tmp_path: Path) -> None:
    """A loader that shuffles draws from the same random numbers as training."""
    from tests.callbacks.runs import loader

    callbacks = [*monitors(num_batches=2), *monitors(num_batches=3, dataloader=loader(), log_key_prefix="loader/")]
    for c in assert_untouched(tmp_path, lambda: Busy("BNP-SGD"), callbacks):
        at_last = c.history[-1][1]
        numbers = [x for key, x in at_last.items() if key.endswith(("num_samples", "num_observations"))]
        assert set(numbers) == {8 * c.num_batches}


def test_resume_in_the_middle(tmp_path: Path) -> None:
    """Weights, and the monitors' own schedule."""
    straight = monitors(every_n_train_steps=3)
    fit(tmp_path, Busy("BNP-AdamW"), straight, max_epochs=3)

    def in_two(name: str, first: Any, second: Any) -> Any:
        fit(tmp_path, Busy("BNP-AdamW"), first, max_epochs=1).save_checkpoint(tmp_path / name)
        module = Busy("BNP-AdamW")
        return left_behind(fit(tmp_path, module, second, ckpt=tmp_path / name, max_epochs=3), module)

    resumed = monitors(every_n_train_steps=3)
    found = in_two("watched.ckpt", monitors(every_n_train_steps=3), resumed)
    assert same(found, in_two("plain.ckpt", (), ()))
    for one, other in zip(resumed, straight, strict=True):
        assert [step for step, _ in other.history] == [3, 6, 9, 12, 15, 18, 21, 24]
        assert [step for step, _ in one.history] == [9, 12, 15, 18, 21, 24]


class Gan(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Manual optimization with two optimizers, a scheduler, clipping, toggles and a metric."""

    def __init__(self, toggle: bool, wrap: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle, self.wrap = toggle, wrap
        self.seen: list[int] = []
        self.generator = seeded(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)))
        self.judge = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 1)))

    def configure_optimizers(self) -> Any:
        generator = torch.optim.AdamW(self.generator.parameters(), lr=0.01)
        judge: Any = torch.optim.SGD(self.judge.parameters(), lr=0.05)
        if self.wrap:
            judge = BNPreconditioner(judge, self)
        return [generator, judge], [torch.optim.lr_scheduler.StepLR(generator, 3)]

    def judge_loss(self, real: Tensor, noise: Tensor) -> Tensor:
        score = self.judge(real).mean() - self.judge(self.generator(noise).detach()).mean()
        return score + score.square()

    def training_step(self, batch: Any, index: int) -> None:
        generator, judge = self.optimizers()
        real, noise = batch[0], torch.randn(5, 2)
        self.seen.append(index)
        if self.toggle:
            self.toggle_optimizer(judge)
        judge.zero_grad()
        self.manual_backward(self.judge_loss(real, noise))
        judge.step()
        if self.toggle:
            self.untoggle_optimizer(judge)
            with generator.toggle_model():
                self.step_generator(generator, noise)
        else:
            self.step_generator(generator, noise)
        self.log("lr", self.lr_schedulers().get_last_lr()[0])
        self.lr_schedulers().step()

    def step_generator(self, generator: Any, noise: Tensor) -> None:
        generator.zero_grad()
        self.manual_backward(self.judge(self.generator(noise)).square().mean())
        self.clip_gradients(generator, gradient_clip_val=0.1)
        generator.step()


class Positive(StepDivergenceProbe):
    """Of a loss that may be negative, to which a relative one means nothing."""

    def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Tensor:
        return super().loss(pl_module, batch, batch_idx) + 10


@pytest.mark.parametrize(("toggle", "wrap"), [(False, True), (True, False)])
def test_manual_optimization_of_two_networks(toggle: bool, wrap: bool, tmp_path: Path) -> None:
    hessian, _, layers, activations, _ = monitors(every_n_train_steps=6)
    steps = Positive(every_n_train_steps=6)
    assert_untouched(tmp_path, lambda: Gan(toggle, wrap), [hessian, layers, activations, steps])
    name = "BNPreconditioner" if wrap else "SGD"
    keys = {key for key in hessian.history[0][1] if "kappa_mean" in key and "error" not in key}
    both = {"hessian/kappa_mean/AdamW", f"hessian/kappa_mean/{name}"}
    assert keys == (both | {f"preconditioned_hessian/kappa_mean/{name}"} if wrap else both)
    # two steps in a batch
    assert [step for step, _ in hessian.history] == [6, 12, 18, 24, 30]
    seen = {key.split("/")[1] for key in layers.history[0][1]}
    assert seen == {"generator.0", "generator.2", "judge.0", "judge.3"}
    assert {key.split("/")[1] for key in activations.history[0][1] if key.count("/") == 2} >= seen
    assert {f"activations/median_kurtosis/{x}" for x in ("AdamW", name)} <= set(activations.history[0][1])
    along = {key.split("/")[1] + "/" + key.split("/")[-1] for key in steps.history[0][1] if "best_step_size" in key}
    # AdamW's with its diagonal, BNP's with P; plain SGD has the gradient alone
    both = {"gradient/AdamW", "preconditioned/AdamW", f"gradient/{name}"}
    assert along == (both | {f"preconditioned/{name}"} if wrap else both)


def test_a_second_optimizer_of_the_same_class_gets_a_number(tmp_path: Path) -> None:
    class Two(Gan):
        def configure_optimizers(self) -> Any:
            generator, judge = (torch.optim.SGD(x.parameters(), lr=0.01) for x in (self.generator, self.judge))
            return [generator, judge], [torch.optim.lr_scheduler.StepLR(judge, 3)]

    callback = monitors()[0]
    fit(tmp_path, Two(False, False), [callback], max_epochs=1)
    assert {"hessian/lambda_max/SGD", "hessian/lambda_max/SGD-1"} <= set(callback.history[0][1])


class Attention(Plain):
    def __init__(self) -> None:
        super().__init__("AdamW", seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)))

    def training_step(self, batch: Any, index: int) -> Any:
        return self.net(batch[0].view(2, -1, 4)).square().mean()


def test_fused_attention_has_its_second_derivatives(tmp_path: Path) -> None:
    hessian = monitors()[0]
    assert_untouched(tmp_path, Attention, [hessian], max_epochs=1)
    assert hessian.reports["hessian"].method == "double backward"
    assert hessian.reports["hessian"].num_parameters == sum(p.numel() for p in Attention().parameters())


def test_a_compiled_module(tmp_path: Path) -> None:
    """aot_eager compiles the backward pass, which then has no backward of its own."""

    def make() -> Plain:
        module = Plain("SGD")
        module.net = torch.compile(module.net, backend="aot_eager")  # type: ignore[assignment]
        return module

    torch.compiler.reset()
    hessian = monitors()[0]
    assert_untouched(tmp_path, make, [hessian], max_epochs=1)
    assert hessian.reports["hessian"].method == "double backward"
    assert hessian.history[0][0] == 2 and len(hessian.history) == BATCHES // 2


def test_modes_and_frozen_parameters_are_put_back(tmp_path: Path) -> None:
    """A loss of one's own may evaluate in another mode and freeze what it likes; a step may accumulate gradients."""
    from lightning_callbacks import HessianConditionMonitor

    class Evaluating(HessianConditionMonitor):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Tensor:
            pl_module.eval()
            pl_module.net[0].bias.requires_grad_(False)
            pl_module.net[1].running_mean = torch.ones(6)  # another tensor
            nn.functional.cross_entropy(pl_module(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            pl_module.net[0].bias.requires_grad_(True)
            pl_module.extra = 1
            loss: Tensor = nn.functional.cross_entropy(pl_module(batch[0]), batch[1])
            return loss

    modules = []

    def make() -> Busy:
        modules.append(Busy("BNP-SGD"))
        return modules[-1]

    assert_untouched(tmp_path, make, [Evaluating(num_steps=3, num_probes=1, every_n_train_steps=2)])
    assert all(m.training for m in modules[-1].modules())
    assert not hasattr(modules[-1], "extra")


def test_every_evaluation_of_an_estimate_is_the_same(tmp_path: Path) -> None:
    """Of dropout, power iterations and a batch that the step changes: a symmetric matrix needs one and the same loss.

    And it is that of training: in its precision, while BNP measures nothing.
    """
    from lightning_callbacks import HessianConditionMonitor

    losses: list[float] = []

    class Watching(HessianConditionMonitor):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Tensor:
            loss = super().loss(pl_module, batch, batch_idx)
            losses.append(float(loss.detach()))
            assert pl_module(batch[0]).dtype == torch.bfloat16
            assert pl_module.trainer.optimizers[0]._tracker.gate.paused > 0
            return loss

    monitor = Watching(num_steps=5, num_probes=1, every_n_train_steps=16)
    fit(tmp_path, Busy("BNP-SGD"), [monitor], precision="bf16-mixed")
    assert [step for step, _ in monitor.history] == [16]
    assert len(losses) == 10 and len(set(losses)) == 1


class Accumulating(Plain):
    """Steps itself, at every third batch: an epoch's eight batches end with gradients that wait."""

    def __init__(self) -> None:
        super().__init__("BNP-AdamW")
        self.automatic_optimization = False
        self.waiting: list[bool] = []

    def training_step(self, batch: Any, index: int) -> Any:
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]) / 3)
        if index % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def on_train_batch_end(self, *args: Any) -> None:
        self.waiting.append(self.net[0].weight.grad is not None)


def test_gradients_that_wait_for_a_step(tmp_path: Path) -> None:
    """Theirs and BNP's samples; the default loss has none there, and says so."""
    from lightning_callbacks import HessianConditionMonitor

    class Own(HessianConditionMonitor):
        def loss(self, pl_module: Any, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(pl_module(batch[0]), batch[1])

    modules = []

    def make() -> Accumulating:
        modules.append(Accumulating())
        return modules[-1]

    own = Own(every_n_epochs=1, num_steps=3, num_probes=1)
    assert_untouched(tmp_path, make, [own])
    assert [step for step, _ in own.history] == [2, 4]  # of the last, waiting batch, all the same
    assert modules[-1].waiting[7]
    with pytest.warns(UserWarning, match="optimizer 0 made no step in training_step on a loss"):
        fit(tmp_path, make(), [HessianConditionMonitor(every_n_epochs=1)])


def test_a_module_compiled_as_a_whole(tmp_path: Path) -> None:
    torch.compiler.reset()
    hessian = monitors()[0]
    assert_untouched(tmp_path, lambda: torch.compile(Plain("SGD"), backend="aot_eager"), [hessian], max_epochs=1)
    assert hessian.reports["hessian"].method == "double backward"
