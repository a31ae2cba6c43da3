"""Who is compared: a base optimizer, a normalization in the net, and BNP with its options around it, or none of it."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.evidence.muon import CPUMuon
from benchmarks.evidence.variants import VARIANTS
from benchmarks.workloads import Norm, mlp, norm2d
from bnp_optim import BNPreconditioner, CombinedOptimizer

SGD_RATES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ADAPTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
_DEFAULTS = {name: p.default for name, p in inspect.signature(BNPreconditioner).parameters.items()}
_SGD_LIKE = ("sgd", "momentum", "kfac, no momentum", "shampoo")


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
        base: A key of BASES.
        norm: In the net, after every hidden layer.
        bnp: Options of BNPreconditioner around the base; None: no BNP.
        variant: Of BNP, beyond its options: a key of VARIANTS.
        slow: So slow that reports may have fewer of its cells.
    """

    name: str
    base: str
    norm: Norm = "none"
    bnp: tuple[tuple[str, Any], ...] | None = None
    variant: str = ""
    slow: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid, the same for all methods of a kind."""
        return SGD_RATES if self.base in _SGD_LIKE else ADAPTIVE_RATES

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes its results its own (not what it is called): the sources go in as what they compute."""
        return (self.base, self.norm, self.bnp, self.variant, fingerprint(replace(self, name="", slow=False)))

    def make(self, model: nn.Module, learning_rate: float) -> Optimizer:
        """Its optimizer for ``model``."""
        base = BASES[self.base](model, learning_rate)
        if self.bnp is None:
            return base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a form that is chosen against advice is what an ablation is
            skip = VARIANTS[self.variant].left_out(model)
            return BNPreconditioner(base, model, **dict(self.bnp), skip=skip)

    def context(self) -> AbstractContextManager[None]:
        """What must hold while it trains."""
        return VARIANTS[self.variant].context()


def bnp(name: str, base: str, variant: str = "", **options: Any) -> Contender:
    """BNP around ``base``; options that are defaults are left out, so that the same runs have the same key."""
    options = {k: v for k, v in options.items() if v != _DEFAULTS[k]}
    if options.get("mode") == ("gradient" if base in ("sgd", "momentum") else "two_sided"):
        del options["mode"]
    return Contender(name, base, bnp=tuple(sorted(options.items())), variant=variant)


def _muon(model: nn.Module, lr: float) -> Optimizer:
    hidden = [
        m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not n.endswith("head")
    ]
    taken = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in taken]
    # what BNPMuon takes too: ten times the rate on the matrices
    return CombinedOptimizer([CPUMuon(hidden, lr * 10), torch.optim.AdamW(rest, lr, weight_decay=0.0)])


def _kfac(model: nn.Module, lr: float) -> Optimizer:
    from singd.optim.optimizer import SINGD

    return SINGD(
        model, lr=lr, momentum=0.0, T=1, loss_average="batch", structures=("dense", "dense"), kfac_like=True,
        alpha1=0.0, warn_unsupported=False,
    )  # fmt: skip


def _soap(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr)


def _shampoo(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import Shampoo

    return Shampoo(model.parameters(), lr=lr, preconditioning_compute_steps=10)


BASES: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "sgd": lambda model, lr: SGD(model.parameters(), lr=lr),
    "momentum": lambda model, lr: SGD(model.parameters(), lr=lr, momentum=0.9),
    "adamw": lambda model, lr: AdamW(model.parameters(), lr=lr),
    "muon": _muon,
    "kfac, no momentum": _kfac,
    "soap": _soap,
    "shampoo": _shampoo,
}
PACKAGES = {
    "kfac, no momentum": "singd",
    "soap": "pytorch_optimizer",
    "shampoo": "pytorch_optimizer",
}

CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("SGD", "sgd"),
        bnp("BNP-SGD", "sgd"),
        Contender("momentum", "momentum"),
        bnp("BNP-momentum", "momentum"),
        Contender("AdamW", "adamw"),
        bnp("BNP-AdamW", "adamw"),
        Contender("Muon", "muon"),
        bnp("BNP-Muon", "muon"),
        Contender("BN + SGD", "sgd", "bn"),
        Contender("BN + AdamW", "adamw", "bn"),
        Contender("LN + SGD", "sgd", "ln"),
        Contender("LN + AdamW", "adamw", "ln"),
        Contender("GN + AdamW", "adamw", "gn"),
        Contender("ON + SGD", "sgd", "on"),
        Contender("ON + AdamW", "adamw", "on"),
        bnp("BNP-momentum, two-sided", "momentum", mode="two_sided"),
        bnp("BNP-momentum, two-sided, spectral", "momentum", mode="two_sided", step_scale="spectral"),
        Contender("SOAP", "soap", slow=True),
        Contender("K-FAC", "kfac, no momentum", slow=True),
        Contender("Shampoo", "shampoo", slow=True),
    )
}
NOTES = {
    "momentum": "SGD with momentum 0.9",
    "GN": "GroupNorm, groups of 10 channels (MLP) or 8",
    "LN": "LayerNorm; GroupNorm(1, C) in convolutional nets",
    "ON": "Online Normalization, α_f 0.999, α_b 0.99, layer scaling",
    "Muon": "on all weights but the head's, at 10 × the rate of the AdamW on the rest",
    "K-FAC": "singd's SINGD (kfac_like, dense factors scaled by the batch size, T = 1, and no momentum: with its "
    "default of 0.9 it diverged from a rate of .01 on)",
    "SOAP": "pytorch_optimizer's, every 10 steps, its default",
    "Shampoo": "pytorch_optimizer's, every 10 steps, no grafting",
}


def prepared(model: nn.Module, contender: Contender) -> nn.Module:
    """The net as the variant wants it."""
    return VARIANTS[contender.variant].prepare(model)


@cache
def fingerprint(contender: Contender) -> str:
    """What ``contender`` computes: a hash of the parameters, to six digits, after a few steps of two small nets.

    In float64, batch sizes 1 and 5, with an input that never changes and one that is far larger than the others. So
    results outlive every change of the sources that changes no number. Of packages of others it is the version.
    """
    if contender.base in PACKAGES:
        return f"{PACKAGES[contender.base]} {metadata.version(PACKAGES[contender.base])}"
    torch.manual_seed(0)
    dense = mlp((7, 10, 10, 4), contender.norm)
    convolution = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), norm2d(8, contender.norm), nn.ReLU(), nn.Conv2d(8, 8, 2, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    digest = hashlib.sha256()
    for model, shape in ((dense, (7,)), (convolution, (2, 4, 4))):
        model = prepared(model.double(), contender)
        with contender.context():
            optimizer = contender.make(model, 0.01)
            for step in range(16):
                x = torch.randn(5 if step % 2 or contender.norm == "bn" else 1, *shape, dtype=torch.float64)
                x[:, 0], x[:, 1] = 0.5, 20 * x[:, 1] + 7
                optimizer.zero_grad()
                F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
                optimizer.step()
        with torch.no_grad():
            numbers = torch.cat([p.flatten() for p in model.parameters()])
            if not bool(numbers.isfinite().all()):
                raise RuntimeError(f"{contender}: the small net diverged, which proves nothing")
            digest.update(" ".join(f"{v:.5e}" for v in numbers.tolist()).encode())
    return digest.hexdigest()[:16]
