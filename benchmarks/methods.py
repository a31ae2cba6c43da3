"""Who takes part in the overhead benchmark: a table of methods, and one training of each.

All methods step at the tiny rate LEARNING_RATE, so that nothing diverges and no method learns the few batches by
heart (gradients that vanish are not what training costs), and have their packages' defaults but for what ``note``
says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.workloads import Norm, Workload
from bnp_optim import BNPreconditioner

LEARNING_RATE = 1e-6
MOMENTUM = 0.9

Make = Callable[[nn.Module, Workload], list[Optimizer]]


@dataclass(frozen=True)
class Method:
    """A way to train a workload's net.

    Args:
        make: The optimizers, stepped one after the other.
        base: The method that its ratios are to.
        norm: What follows each hidden layer of the net.
        period: Steps after which the work of a step repeats; the cost of a step is the mean over whole periods.
        peer: Slow, so that it may take part in fewer rounds, and is left out by --quick.
        package: What must be installed.
        note: How it is configured, and why, where that is no default.
        optional: Runs only when named by --methods.
    """

    name: str
    make: Make
    base: str = "sgd"
    norm: Norm = "none"
    period: int = 1
    peer: bool = False
    package: str | None = None
    note: str = ""
    optional: bool = False


def _sgd(model: nn.Module, _: Workload) -> list[Optimizer]:
    return [_base(SGD, model)]


def _adamw(model: nn.Module, _: Workload) -> list[Optimizer]:
    return [_base(AdamW, model)]


def _base(base: type[Optimizer], model: nn.Module) -> Optimizer:
    if base is SGD:
        return SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return AdamW(model.parameters(), lr=LEARNING_RATE)


def _bnp(base: type[Optimizer], **options: Any) -> Make:
    return lambda model, _: [BNPreconditioner(_base(base, model), model, **options)]


def _kfac(model: nn.Module, work: Workload, *, interval: int) -> list[Optimizer]:
    from singd.optim.optimizer import SINGD

    kfac = SINGD(
        model,
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        T=interval,
        loss_average=work.loss_average,
        structures=("dense", "dense"),
        kfac_like=True,
        alpha1=0.0,
        warn_unsupported=False,
    )
    taken = {id(p) for group in kfac.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [kfac, SGD(rest, lr=LEARNING_RATE, momentum=MOMENTUM)] if rest else [kfac]


def _soap(model: nn.Module, _: Workload) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=LEARNING_RATE)]


def _shampoo(model: nn.Module, _: Workload, *, interval: int) -> list[Optimizer]:
    from pytorch_optimizer import Shampoo

    return [Shampoo(model.parameters(), lr=LEARNING_RATE, preconditioning_compute_steps=interval)]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of all ``nn.Linear`` but the head: what Muon is for."""
    return [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]


def _muon(model: nn.Module, _: Workload) -> list[Optimizer]:
    matrices = hidden_matrices(model)
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [torch.optim.Muon(matrices, lr=LEARNING_RATE), AdamW(rest, lr=LEARNING_RATE)]


_KFAC_NOTE = (
    "singd's SINGD with kfac_like=True (and alpha1=0, which that asks for) and dense factors; loss_average says "
    "what the loss is a mean over, so that the factors are scaled by the batch size; LayerNorm goes to SGD; T={}"
)
_SHAMPOO_NOTE = "pytorch_optimizer's Shampoo, preconditioning_compute_steps={}"
METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("sgd", _sgd, note=f"momentum {MOMENTUM}"),
        Method("bnp-sgd", _bnp(SGD, mode="gradient"), note="the gradient form, which SGD without momentum gets"),
        Method("bnp-sgd-compiled", _bnp(SGD, mode="gradient", compiled=True), note="compiled=True"),
        Method("bn", _sgd, norm="bn", note="BatchNorm after each hidden layer, SGD"),
        Method("ln", _sgd, norm="ln", note="LayerNorm, or GroupNorm(1, C), after each hidden layer, SGD"),
        Method("adamw", _adamw),
        Method("bnp-adamw", _bnp(AdamW), base="adamw"),
        Method(
            "muon", _muon, peer=True,
            note="torch.optim.Muon on the weights of nn.Linear but the head, AdamW on the rest; "
            "it orthogonalizes in bfloat16, which is slow on a CPU without bfloat16 instructions",
        ),
        Method("kfac", partial(_kfac, interval=1), peer=True, package="singd", note=_KFAC_NOTE.format(1)),
        Method(
            "kfac-10", partial(_kfac, interval=10), period=10, peer=True, package="singd",
            note=_KFAC_NOTE.format("10, the package's default"),
        ),
        Method(
            "soap", _soap, period=10, peer=True, package="pytorch_optimizer",
            note="pytorch_optimizer's SOAP (precondition_frequency=10, its default)",
        ),
        Method(
            "shampoo", partial(_shampoo, interval=1), peer=True, package="pytorch_optimizer",
            note=_SHAMPOO_NOTE.format("1, its default"),
        ),
        Method(
            "shampoo-10", partial(_shampoo, interval=10), period=10, peer=True, package="pytorch_optimizer",
            note=_SHAMPOO_NOTE.format("10, as SOAP's and K-FAC's: wide layers are out of reach at 1"),
        ),
        Method("bnp-sgd-spectral", _bnp(SGD, mode="gradient", step_scale="spectral"), optional=True),
        Method("bnp-sgd-interval10", _bnp(SGD, mode="gradient", stat_interval=10), period=10, optional=True),
        Method("bnp-sgd-two-sided", _bnp(SGD), note="the default around momentum", optional=True),
        Method("bnp-adamw-spectral", _bnp(AdamW, step_scale="spectral"), base="adamw", optional=True),
        Method("bnp-adamw-interval10", _bnp(AdamW, stat_interval=10), base="adamw", period=10, optional=True),
    )
}  # fmt: skip


def why_not(method: Method, work: Workload, batch_size: int) -> str | None:
    """Why ``method`` cannot train ``work`` at ``batch_size``, or None."""
    if method.norm not in work.norms:
        return "the net has LayerNorm already" if work.norms == ("none",) else "not on this net"
    if method.norm == "bn" and batch_size == 1:
        return "impossible at batch size 1"
    if method.package is not None and importlib.util.find_spec(method.package) is None:
        return f"{method.package} is not installed"
    if method.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            return f"torch {torch.__version__} has no Muon"
        with torch.device("meta"):
            if not hidden_matrices(work.build("none")):
                return "Muon takes matrices only, and the hidden weights are convolutions"
    return None


class Training:
    """A net, its inputs and its optimizers; the same seed gives all methods the same plain net and inputs.

    Args:
        device: "cpu", or "cuda": there the forward runs under bfloat16 autocast.
        compiled: Compile the model.
        batches: How many batches to go round; by default 8, and 64 samples at least. Of one single sample half of
            the gradient would be zero for ever, and AdamW's square root of zeros is three times as slow.
    """

    def __init__(
        self,
        work: Workload,
        batch_size: int,
        method: Method,
        *,
        device: str = "cpu",
        compiled: bool = False,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        self.work, self.device = work, device
        with torch.device(device):
            torch.manual_seed(seed)
            self.batches = [work.data(batch_size) for _ in range(batches or max(8, -(-64 // batch_size)))]
            torch.manual_seed(seed)
            self.model = work.build(method.norm)
        self.optimizers = method.make(self.model, work)
        self._call: nn.Module = self.model
        if compiled:  # without guards on hooks, the wrapped net would run the graph of the plain one, which has none
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._dynamo.config.recompile_limit = 64  # the methods share the nets' code
            self._call = torch.compile(self.model)
        self._next = 0

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def forward(self) -> torch.Tensor:
        """The loss on the next batch."""
        x, y = self.batches[self._next]
        self._next = (self._next + 1) % len(self.batches)
        if self.device == "cuda":
            with torch.autocast("cuda", torch.bfloat16):
                return self.work.loss(self._call(x), y)
        return self.work.loss(self._call(x), y)

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self) -> None:
        """One training step, which is what the benchmark times."""
        self.zero_grad()
        self.forward().backward()
        self.optimize()

    def finite(self) -> bool:
        """Whether all parameters still are."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def preconditioned_bytes(self) -> int | None:
        """Size of the parameters that go through P; None without the wrapper."""
        wrapper = self.optimizers[0]
        if not isinstance(wrapper, BNPreconditioner):
            return None
        named = dict(self.model.named_parameters())
        return sum(named[name].nbytes for name in wrapper.coverage().preconditioned)
