"""The modules, data and trainers of the tests with Lightning, and the loop that one would write instead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_optim import BNPreconditioner
from tests.conftest import inputs, mlp, weights

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

BATCHES, BATCH = 6, 8
BASES: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
}


def loader() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.cat(inputs(BATCHES)), batch_size=BATCH)  # type: ignore[arg-type]


def wrapped(net: nn.Module, base: str) -> BNPreconditioner:
    return BNPreconditioner(BASES[base](net.parameters()), net)


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """The smallest one; keeps losses and weights as they come."""

    def __init__(self, base: str = "SGD", net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.base = base
        self.example_input_array = torch.ones(3, 4)
        self.losses: list[Tensor] = []
        self.at_epoch_start: list[dict[str, Tensor]] = []
        self.after_step: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss: Tensor = self(x).float().square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return BNPreconditioner(BASES[self.base](self.parameters()), self)

    def on_train_epoch_start(self) -> None:
        self.at_epoch_start.append(weights(self.net))

    def on_train_batch_end(self, *args: Any) -> None:
        self.after_step.append(weights(self.net))


class Validated(Module):
    def validation_step(self, x: Tensor, index: int) -> None:
        with torch.enable_grad():  # the worst case
            self.log("validation", self(x).square().mean())


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
        | quiet
        | {"enable_checkpointing": False}
        | options
    )


def wrapper_of(run: Any, which: int = 0) -> BNPreconditioner:
    optimizer = run.optimizers[which]
    assert isinstance(optimizer, BNPreconditioner)
    return optimizer


def counts(optimizer: BNPreconditioner) -> set[int]:
    return {int(s.count) for s in optimizer.statistics.values()}


def assert_bitwise(
    net: nn.Module, optimizer: BNPreconditioner, other_net: nn.Module, other: BNPreconditioner, prefix: str = ""
) -> None:
    """Weights and statistics are the same to the last bit; ``prefix`` of the first one's layer names."""
    for (name, p), q in zip(net.named_parameters(), other_net.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert optimizer.statistics.keys() == {prefix + name for name in other.statistics}
    for name, expected in other.statistics.items():
        found = optimizer.statistics[prefix + name]
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance), name
        assert found.count == expected.count, name


def loop(
    net: nn.Module, optimizer: BNPreconditioner, data: Iterable[Tensor], *, accumulate: int = 1, clip: Any = None
) -> None:
    """Forward, backward, ``clip`` the parameters' gradients, step."""
    optimizer.zero_grad()
    for i, x in enumerate(data, start=1):
        (net(x).float().square().mean() / accumulate).backward()
        if i % accumulate == 0:
            if clip is not None:
                clip(list(net.parameters()))
            optimizer.step()
            optimizer.zero_grad()
