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
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.evidence.muon import CPUMuon
from benchmarks.evidence.variants import FOLD, MAX_NORM, VARIANTS
from benchmarks.workloads import Norm, mlp, norm2d
from bnp_optim import BNPreconditioner, CombinedOptimizer

SGD_RATES = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ADAPTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
# "trace" is what "auto" picks but around Muon
_DEFAULTS = {n: p.default for n, p in inspect.signature(BNPreconditioner).parameters.items()} | {"step_scale": "trace"}
_IMPLIED = {"sgd": "gradient", "momentum": "gradient"}  # the form that keys and published results leave out
_SGD_LIKE = ("sgd", "momentum", "kfac, no momentum", "shampoo")


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
        base: A key of BASES.
        norm: In the net, after every hidden layer.
        bnp: Options of BNPreconditioner around the base; None: no BNP.
        variant: Beyond the base, the norm and BNP's options: a key of VARIANTS.
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
        return VARIANTS[self.variant].clipping(self._make(model, learning_rate))

    def _make(self, model: nn.Module, learning_rate: float) -> Optimizer:
        base = BASES[self.base](model, learning_rate)
        if self.bnp is None:
            return base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a form that is chosen against advice is what an ablation is
            skip = VARIANTS[self.variant].left_out(model)
            mode = _IMPLIED.get(self.base, "two_sided")
            options = {"mode": mode, "step_scale": _DEFAULTS["step_scale"], **dict(self.bnp)}
            return BNPreconditioner(base, model, **options, skip=skip)

    def context(self) -> AbstractContextManager[None]:
        """What must hold while it trains."""
        return VARIANTS[self.variant].context()


def bnp(name: str, base: str, variant: str = "", **options: Any) -> Contender:
    """BNP around ``base``; options that are defaults are left out, so that the same runs have the same key."""
    options = {k: v for k, v in options.items() if v != _DEFAULTS[k]}
    mode = options.setdefault("mode", "gradient" if base == "sgd" else "two_sided")  # what "auto" picks
    if mode == _IMPLIED.get(base, "two_sided"):
        del options["mode"]
    return Contender(name, base, bnp=tuple(sorted(options.items())), variant=variant)


def _muon(model: nn.Module, lr: float) -> Optimizer:
    hidden = [
        p
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.RNNBase) and not name.endswith("head")
        for p in module.parameters()
        if p.ndim > 1
    ]
    taken = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in taken]
    # what BNPMuon takes too: ten times the rate on the matrices
    return CombinedOptimizer([CPUMuon(hidden, lr * 10), torch.optim.AdamW(rest, lr, weight_decay=0.0)])


def _kfac(model: nn.Module, lr: float) -> Optimizer:
    from singd.optim.optimizer import SINGD

    # Tried on 12,800 images of Fashion-MNIST at batch size 64, seed 0, at the best of three to five rates: singd's own
    # damping .001 and lr_cov .01 .810; damping .03, .1, .3 .815, .817, .827; lr_cov rising to .1, with damping .01,
    # .03, .1 .837, .842, .836; to .03 (damping .03) .827, to .05 (.1) .826, to .3 (.1) .835; momentum .9 .804, with
    # lr_cov rising .833; not kfac_like .800; normalize_lr_cov diverges. On 4,800 at batch size 16 singd's .765; lr_cov
    # rising to .1 with damping .1 .823, with .01 it diverges. On 600 at 1 all diverge but .01 with damping .1.
    options = dict(OPTIONS["kfac, no momentum"])
    options["lr_cov"] = CovarianceRate(model, *options["lr_cov"])
    return SINGD(model, lr=lr, warn_unsupported=False, **options)


class CovarianceRate:
    """singd's ``lr_cov``: from ``first`` to ``last`` in ``steps`` steps, but at most ``first`` × batch size.

    Its factors are learned by gradient descent, which diverges where this rate times the largest eigenvalue of a
    batch's covariance, in the coordinates learned so far, is too large: at first by raw inputs, later by few samples.
    """

    def __init__(self, model: nn.Module, first: float, last: float, steps: int) -> None:
        self.first, self.last, self.steps, self.batch_size = first, last, steps, 1
        model.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.batch_size = len(inputs[0])

    def __call__(self, step: int) -> float:
        last = min(self.last, self.first * self.batch_size)
        return self.first * (last / self.first) ** min(1.0, step / self.steps)


def _soap(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr)


def _soap_without_decay(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr, weight_decay=0.0)  # of z it would not be the decay of w


def _shampoo(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import Shampoo

    return Shampoo(model.parameters(), lr=lr, **OPTIONS["shampoo"])


BASES: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "sgd": lambda model, lr: SGD(model.parameters(), lr=lr),
    "momentum": lambda model, lr: SGD(model.parameters(), lr=lr, momentum=0.9),
    "adamw": lambda model, lr: AdamW(model.parameters(), lr=lr),
    "muon": _muon,
    "kfac, no momentum": _kfac,
    "soap": _soap,
    "soap, no decay": _soap_without_decay,
    "shampoo": _shampoo,
}
PACKAGES = {
    "kfac, no momentum": "singd",
    "soap": "pytorch_optimizer",
    "soap, no decay": "pytorch_optimizer",
    "shampoo": "pytorch_optimizer",
}
OPTIONS: dict[str, dict[str, Any]] = {  # of these packages; with the version they are the fingerprint
    "kfac, no momentum": {
        "momentum": 0.0, "T": 1, "loss_average": "batch", "structures": ("dense", "dense"), "kfac_like": True,
        "alpha1": 0.0, "damping": 0.1, "lr_cov": (0.01, 0.1, 50),
    },
    "shampoo": {"preconditioning_compute_steps": 10},
}  # fmt: skip

PEERS: dict[str, Contender] = {  # everywhere
    c.name: c
    for c in (
        Contender("SGD", "sgd"),
        bnp("BNP-SGD", "sgd"),
        Contender("momentum", "momentum"),
        bnp("BNP-momentum", "momentum"),
        Contender("AdamW", "adamw"),
        bnp("BNP-AdamW", "adamw"),
        Contender("Muon", "muon"),
        bnp("BNP-Muon", "muon", step_scale="common"),  # what "auto" picks
        Contender("BN + SGD", "sgd", "bn"),
        Contender("BN + AdamW", "adamw", "bn"),
        Contender("LN + SGD", "sgd", "ln"),
        Contender("LN + AdamW", "adamw", "ln"),
        Contender("GN + AdamW", "adamw", "gn"),
        Contender("ON + SGD", "sgd", "on"),
        Contender("ON + AdamW", "adamw", "on"),
        bnp("BNP-momentum, gradient form", "momentum", mode="gradient"),
        bnp("BNP-momentum, spectral", "momentum", step_scale="spectral"),
        Contender("SOAP", "soap", slow=True),
        replace(bnp("BNP-SOAP", "soap, no decay"), slow=True),
        Contender("K-FAC", "kfac, no momentum", slow=True),
        Contender("Shampoo", "shampoo", slow=True),
    )
}
OWN_Q = "BNP-Muon, a q each"  # as before there was one for all layers
_FOLDABLE = [f"{of}{base}" for of in ("", "BNP-") for base in ("SGD", "momentum", "AdamW", "Muon", "SOAP")]
_STARTS = {"folded": _FOLDABLE, "He": ["BN + SGD", "BN + AdamW"]}  # batch normalization undoes a fold
CONTENDERS = PEERS | {  # those for some tasks too
    c.name: c
    for c in (
        *(replace(PEERS[n], name=f"{n}, {start}", variant=start) for start, names in _STARTS.items() for n in names),
        bnp(OWN_Q, "muon"),
        bnp("BNP-Muon, no bound", "muon", step_scale=None),
        *(
            bnp(f"{n}, ε1 = {e:g}", PEERS[n].base, var_rel_eps=e, **dict(PEERS[n].bnp or ()))
            for n in ("BNP-momentum", "BNP-AdamW", "BNP-Muon")
            for e in (0.1, 1.0)
        ),
        bnp("BNP-momentum, clipped", "momentum", max_norm=MAX_NORM),
        bnp("BNP-momentum, folded, clipped", "momentum", "folded", max_norm=MAX_NORM),
        *(bnp(f"BNP-{base}, following", base.lower(), follow_inputs=True) for base in ("SGD", "momentum", "AdamW")),
        bnp("BNP-momentum, clipped, following", "momentum", max_norm=MAX_NORM, follow_inputs=True),
        *(replace(PEERS[n], name=f"{n}, g clipped", variant="g clipped") for n in ("momentum", "BN + SGD")),
        *(
            replace(PEERS[n], name=f"{n}, folded, g clipped", variant="folded, g clipped")
            for n in ("momentum", "BNP-momentum")
        ),
    )
}
NOTES = {
    "momentum": "SGD with momentum 0.9",
    "GN": "GroupNorm, groups of 10 channels (MLP) or 8",
    "LN": "LayerNorm; GroupNorm(1, C) in convolutional nets; on the last output of recurrent ones",
    "ON": "Online Normalization, α_f 0.999, α_b 0.99, layer scaling",
    "Muon": "on all weights but the head's, at 10 × the rate of the AdamW on the rest",
    "folded": f"fold_normalization on the first {FOLD} training inputs, before the first step",
    "clipped": f"max_norm={MAX_NORM:g}, of Pᵀg",
    "following": "follow_inputs=True",
    "g clipped": f"clip_grad_norm_ at {MAX_NORM:g}",
    "He": "He's initialization of the convolutions",
    "K-FAC": "singd's SINGD (kfac_like, dense factors scaled by the batch size, T = 1, no momentum, damping .1, lr_cov "
    "rising from .01 to .1, or .01 × batch size, in 50 steps)",
    "SOAP": "pytorch_optimizer's, every 10 steps, its default",
    "Shampoo": "pytorch_optimizer's, every 10 steps, no grafting",
}


def prepared(model: nn.Module, contender: Contender) -> nn.Module:
    """The net as the variant wants it."""
    return VARIANTS[contender.variant].prepare(model)


def started(model: nn.Module, contender: Contender, inputs: Callable[[], Tensor]) -> nn.Module:
    """The net with the initial weights that the variant wants; ``inputs`` gives FOLD of them, if they are needed."""
    start = VARIANTS[contender.variant].start
    if start is not None:
        start(model, inputs())
    return model


@cache
def fingerprint(contender: Contender) -> str:
    """What ``contender`` computes: a hash of the parameters, to six digits, after a few steps of two small nets.

    In float64, batch sizes 1 and 5, with an input that never changes and one that is far larger than the others; where
    the units of inputs are followed, more steps, and in the last of them other units. So results outlive every change
    of the sources that changes no number. Of packages of others it is the version and the options.
    """
    if contender.base in PACKAGES:
        options = sorted(OPTIONS.get(contender.base, {}).items())
        return " ".join([PACKAGES[contender.base], metadata.version(PACKAGES[contender.base]), *map(repr, options)])
    torch.manual_seed(0)
    dense = mlp((7, 10, 10, 4), contender.norm)
    convolution = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), norm2d(8, contender.norm), nn.ReLU(), nn.Conv2d(8, 8, 2, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    digest = hashlib.sha256()
    follows = dict(contender.bnp or ()).get("follow_inputs", False)
    for model, shape in ((dense, (7,)), (convolution, (2, 4, 4))):
        model = prepared(model.double(), contender)
        model = started(model, contender, lambda shape=shape: torch.randn(FOLD, *shape, dtype=torch.float64))  # type: ignore[misc]
        with contender.context():
            optimizer = contender.make(model, 0.01)
            for step in range(100 if follows else 16):
                x = torch.randn(5 if step % 2 or contender.norm == "bn" else 1, *shape, dtype=torch.float64)
                x[:, 0], x[:, 1] = 0.5, 20 * x[:, 1] + 7
                x = 30 * x if step >= 80 else x
                optimizer.zero_grad()
                F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
                optimizer.step()
        with torch.no_grad():
            numbers = torch.cat([p.flatten() for p in model.parameters()])
            if not bool(numbers.isfinite().all()):
                raise RuntimeError(f"{contender}: the small net diverged, which proves nothing")
            digest.update(" ".join(f"{v:.5e}" for v in numbers.tolist()).encode())
    return digest.hexdigest()[:16]
