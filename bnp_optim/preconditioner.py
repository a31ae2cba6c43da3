"""BNPreconditioner: Batch Normalization Preconditioning around any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from bnp_optim.advice import ALONE, COLD, at_first_steps, at_the_door
from bnp_optim.application import CompiledTransforms, apply_to_all, gradient_task
from bnp_optim.around import AroundOptimizer
from bnp_optim.bases import enter, leave, traits_of
from bnp_optim.checkpoint import check_form, is_rehearsal, merge, split
from bnp_optim.checks import (
    check_after_backward,
    check_decay,
    check_differentiable,
    check_following,
    check_max_norm,
    check_objects,
    check_options,
    check_whole_norm,
    checked_skip,
)
from bnp_optim.coverage import Coverage, coverage_of
from bnp_optim.discovery import SkipRule
from bnp_optim.distributed import Ranks, Synchronization, checked_group
from bnp_optim.sharding.checks import check_copies
from bnp_optim.sharding.columns import over_columns
from bnp_optim.statistics import LayerStatistics, StatisticsOptions
from bnp_optim.tracking import Tracker
from bnp_optim.transform import precondition
from bnp_optim.two_sided import ZCoordinates

__all__ = ["BNPreconditioner"]

Mode = Literal["auto", "gradient", "two_sided"]
StepScale = Literal["auto", "trace", "common", "spectral", "fan_in"]
Variance = Literal["total", "batch"]


class BNPreconditioner(AroundOptimizer):
    """Wraps ``optimizer`` so that each layer's gradient is rescaled with running statistics of the layer's input.

    The forward pass is untouched; the optimizer sees the Hessian PᵀHP that batch normalization would give it, at
    any batch size, 1 included (S. Lange, K. Helfrich, Q. Ye, JMLR 23(72), 2022; constants reconstructed).

        optimizer = BNPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model)

    It is a ``torch.optim.Optimizer``: ``param_groups``, ``state`` and ``defaults`` are the base's own objects, so
    schedulers, scalers and trainers work on it. Call it where you would call the base: after backward, unscaling
    and clipping. ``step()`` leaves the *preconditioned* gradient in ``.grad``.

    Samples of a step are those whose gradient is in ``.grad``; gradients that are zeroed in place by anyone but
    this optimizer cannot be seen to be gone. Padded positions count in the statistics. The loss should be a mean over
    the batch: with a sum, ``N`` in ``q²`` means nothing.

    Args:
        optimizer: The base. Anything with a ``torch.optim.Optimizer`` interface but closure-driven ones (LBFGS).
        model: The module whose layers are looked up; the base may hold any subset of its parameters. Wrap before
            the first call of a compiled model.
        stat_decay: ρ of the running statistics, in [0, 1). 0.99: the paper's, a memory of 100 steps.
        var_rel_eps: ε1 ≥ 0 of σ̃² = σ² + ε1·max(σ²) + ε2. 1e-2: the paper's.
        var_eps: ε2 > 0. 1e-4: the paper's.
        mode: "gradient" feeds P Pᵀg to the base; "two_sided" runs the base in z, w = P z, as adaptive bases need.
            "auto" picks "gradient" for plain SGD, where both take the same steps, and ASGD, and "two_sided" for all
            others, SGD with momentum among them (docs/ablations.md). Bases that read their
            parameters (Adafactor, LAMB, LARS) see w, not z.
        step_scale: q². "trace": the trace of the batch's preconditioned second moment over N; on dense layers at
            batch size 1 that is the exact norm, so an outlier cannot blow the step up: one learning rate serves many
            batch sizes;
            "common": the geometric mean of the layers' "trace", one for all, as Muon needs, whose steps have one size
            in every layer; "spectral": the largest eigenvalue by a power step; "fan_in": the paper's max(n/N, 1);
            None: 1. "auto" picks "common" around every Muon (by the name of its class), alone or in a combination, and
            "trace" around all others (docs/ablations.md).
        debias: Let the first batch count fully, as Adam's correction does; False starts from μ = 0, σ² = 1. True:
            otherwise the first 1/(1-ρ) steps are spoiled.
        variance: "total" includes the distance of batch means from the running mean; "batch" is the paper's, which
            is zero at batch size 1.
        max_norm: Clip the norm of Pᵀg over all preconditioned parameters together at this, as ``clip_grad_norm_`` does
            with g, but in coordinates in which neither the inputs' units nor an ill-conditioned layer decide what is
            large. Around SGD with momentum and with a decaying rate it makes higher rates usable, and gains; there 1.0
            is where to start (docs/ablations.md). None: at a constant rate it gains nothing, and steps below the best
            rate become slower. Needs the two-sided form, which "auto" then picks, and weights that are not sharded.
        follow_inputs: Let dense layers and convolutions that read data (inputs that need no gradient) and have a bias
            follow its units: where a feature has moved for good, express the weights anew, so that of the normalized
            feature the layer computes what it did (docs/method.md). For streams whose sensors or units change. It
            changes the model's function, so False. Averages of weights that are kept elsewhere do not follow, and
            nothing does where several ranks train together.
        stat_interval: Measure every k-th step only; in between μ, σ̃ and q stay. 1: exact.
        max_observations: Of more observations (samples × positions) in one forward call of a layer, measure about so
            many: every k-th row of positions, another one at each call. None: all, which is exact.
        compiled: Transform all layers in one graph of ``torch.compile``. Worth trying on accelerators; needs what
            the compiler needs, and its time at the first step.
        skip: Module classes, names or instances to leave alone.
        process_group: The ranks that train this model together: at each step they pool their samples, by one
            collective (docs/distributed.md). None, at the first step: the group of the DistributedDataParallel around
            the model, or else the default group where torch.distributed is initialized. Ranks that train on their own
            pass a group of their own rank alone. Copies keep the group; a pickle forgets it.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, is already a BNPreconditioner or calls the loss itself; if
            ``model`` is no module or contains ``nn.DataParallel``; if an option is of the wrong type; if FSDP1,
            DeepSpeed or an optimizer inside backward has the parameters.
        ValueError: if an option is out of its range, a name in ``skip`` fits no module, or the base was built with
            ``differentiable=True``, or is a ZeroRedundancyOptimizer whose weight decay the two-sided form cannot see;
            if ``max_norm`` comes with mode="gradient" or sharded weights, or ``follow_inputs`` with the gradient form
            of a base that remembers gradients or with sharded weights.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        stat_decay: float = 0.99,
        var_rel_eps: float = 1e-2,
        var_eps: float = 1e-4,
        mode: Mode = "auto",
        step_scale: StepScale | None = "auto",
        debias: bool = True,
        variance: Variance = "total",
        max_norm: float | None = None,
        follow_inputs: bool = False,
        stat_interval: int = 1,
        max_observations: int | None = None,
        compiled: bool = False,
        skip: Collection[SkipRule] = (),
        process_group: Any = None,
    ) -> None:
        if any(isinstance(x, BNPreconditioner) for x in (optimizer, getattr(optimizer, "optimizer", None))):
            raise TypeError("optimizer is already a BNPreconditioner: wrap the base optimizer once")
        check_objects(optimizer, model)
        check_options(stat_decay, var_rel_eps, var_eps, mode, step_scale, variance, stat_interval, max_observations)
        check_max_norm(max_norm, mode)
        max_observations = None if max_observations is None else int(max_observations)
        rules = checked_skip(skip, model)
        mode = "two_sided" if mode == "auto" and max_norm is not None else mode
        settings: dict[str, Any] = {"mode": mode, "skip": rules, "max_norm": max_norm}
        settings["follow_inputs"] = bool(follow_inputs)
        settings |= {"stat_interval": int(stat_interval), "compiled": bool(compiled)}
        self._setup(
            optimizer,
            model,
            StatisticsOptions(stat_decay, var_rel_eps, var_eps, step_scale, bool(debias), variance, max_observations),
            settings,
            Ranks(checked_group(process_group)),
        )
        try:
            check_decay(optimizer, self._form)
            check_whole_norm(max_norm, sharded=self._tracker.sharded)
            check_following(follow_inputs, self._form, self._traits.form, sharded=self._tracker.sharded)
            check_differentiable(optimizer, has_layers=bool(self._tracker.layers))
            self._advise(at_the_door(optimizer, model, self._form, self._tracker))
        except (ValueError, Warning):  # warnings may be errors: leave the model as it was
            self._tracker.detach()
            raise

    @classmethod
    def paper(cls, optimizer: Optimizer, model: nn.Module, **options: Any) -> BNPreconditioner:
        """The paper's letter: start from μ = 0, σ² = 1, variance inside the batch, q² = max(n/N, 1), P Pᵀ g.

        ``options`` override single settings. At batch size 1 its variance is zero: prefer the defaults there.
        """
        letter: dict[str, Any] = {"mode": "gradient", "step_scale": "fan_in", "debias": False, "variance": "batch"}
        return cls(optimizer, model, **(letter | options))

    def _setup(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        options: StatisticsOptions,
        settings: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        self._go_around(optimizer)
        self._ranks = ranks
        self._model = model
        self._settings = settings
        self._traits = traits_of(optimizer)
        self._form = self._traits.form if settings["mode"] == "auto" else settings["mode"]
        self._options = options if options.step_scale != "auto" else replace(options, step_scale=self._traits.scale)
        self._about = {"the base": type(optimizer).__name__, "the form": self._form} | vars(self._options)
        self._about |= {key: settings.get(key) for key in ("stat_interval", "compiled", "max_norm", "follow_inputs")}
        self._apply = CompiledTransforms() if settings["compiled"] else apply_to_all
        self._z = ZCoordinates(optimizer, self._apply, settings.get("max_norm"))  # pickles of before have none
        # an object: clients copy our __dict__ and must see the same count
        self._progress = {"steps": 0, "started": 0}
        self._warned: set[str] = set()
        self._tracking: dict[str, Any] = {"tracker": None, "restore": {}}

    @property
    def _tracker(self) -> Tracker:
        """Hooks and statistics; made when first needed, since a copied model may still be under construction."""
        tracker: Tracker | None = self._tracking["tracker"]
        if tracker is None:
            squared = self._form == "gradient"
            tracker = Tracker(
                self._model,
                self._settings["skip"],
                self._options,
                self._owned(),
                squared=squared,
                on_host=not self._settings["compiled"],  # numbers in a graph would be constants
                follows=self._settings.get("follow_inputs", False),  # pickles of before have none
            )
            self._tracking["tracker"] = tracker
            tracker.gate.due = self._measures_next()
            for layer in tracker.layers:
                if layer.name in self._tracking["restore"]:
                    tracker.restore(layer, self._tracking["restore"][layer.name])
        return tracker

    def _measures_next(self) -> bool:
        return bool(self._progress["steps"] % self._settings["stat_interval"] == 0)

    # The algorithm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Commit the statistics of the samples behind the gradients, precondition, and let the base step.

        Args:
            closure: Computes the loss and its gradients; run once, with gradients enabled. Returned is its result.
        """
        check_after_backward()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tracker = self._tracker
        rehearsal = tracker.idle and is_rehearsal(self.param_groups)
        together = not rehearsal and self._ranks.group(self._model) is not None
        with torch.no_grad():
            base_step = enter(self.base_optimizer)
            try:
                live = tracker.live(self._owned())
                if "seen" not in self._warned and not rehearsal:
                    self._advise(at_first_steps(live, tracker, together=together, steps=self._progress["steps"]))
                    if any(tracker.fired(x.layer) for x in live):
                        self._warned.add("seen")  # a forward was seen: all is well
                if not together:
                    tracker.commit()
                elif tracker.gate.due:
                    tracker.commit(partial(self._ranks.share, about=self._about, steps=self._progress["steps"]))
                else:
                    tracker.drop()
                tasks = [(x, tracker.factors(x.layer)) for x in live if x.layer in tracker.ready]
                if self._form == "two_sided":
                    self._z.step(base_step, tasks, sharded=tracker.sharded)
                else:
                    apply = over_columns(self._apply) if tracker.sharded else self._apply
                    apply(precondition, [gradient_task(x, f) for x, f in tasks])
                    base_step()
                if not together:
                    tracker.follow_inputs()
                elif tracker.gate.follows:
                    self._advise([ALONE])
            finally:
                tracker.release()
            leave(self.base_optimizer)
        self._progress["started"] = 1
        if rehearsal:
            return loss
        self._progress["steps"] += 1
        tracker.gate.due = self._measures_next()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and with them the samples that they were made of."""
        self._tracker.discard()
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; layers whose weights it brings are preconditioned from now on."""
        self.base_optimizer.add_param_group(param_group)
        if self._tracker.attached:
            self.rescan()

    def rescan(self) -> None:
        """Look for layers again, after modules were replaced; known layers keep their statistics."""
        self._tracker.rescan(self._owned())

    def _owned(self) -> set[int]:
        return {id(p) for group in self.param_groups for p in group["params"]}

    # Statistics and reports

    @property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Copies of the running statistics, by layer name."""
        return self._tracker.statistics()

    @contextmanager
    def pause_statistics(self) -> Iterator[None]:
        """Forward passes inside measure nothing (extra passes of a callback, say); contexts nest."""
        self._tracker.gate.paused += 1
        try:
            yield
        finally:
            self._tracker.gate.paused -= 1

    def remove_hooks(self) -> None:
        """Stop measuring: the statistics stay as they are, and go on being used, until ``rescan()``."""
        self._tracker.detach()

    def coverage(self) -> Coverage:
        """Per parameter: preconditioned or passed through, and why. ``print(optimizer.coverage())``."""
        return coverage_of(self._model, self._tracker, self.param_groups, started=self._progress["started"] > 0)

    @property
    def synchronization(self) -> Synchronization | None:
        """Ranks that share their samples and bytes that each contributes to a step; None before, or alone."""
        return self._ranks.synchronization

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.base_optimizer).__name__}, {len(self._tracker.layers)} layers, "
            f"mode={self._form!r}, step_scale={self._options.step_scale!r}, stat_decay={self._options.stat_decay})"
        )

    # Checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """The base's ``state_dict()`` with the statistics beside each layer's weight; the base can load it too.

        In the two-sided form the base's moments live in z: the plain base can load them, but its trajectory is
        another one.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        steps, started = self._progress["steps"] % self._settings["stat_interval"], self._progress["started"] > 0
        base = self.base_optimizer.state_dict()
        header = {"steps": steps, "form": self._form}
        state_dict = merge(base, self.param_groups, self._tracker, header, started=started)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of ours, or of the plain base (the statistics then start anew).

        Samples that wait for a step are dropped: their gradients are not in the checkpoint.

        Raises:
            ValueError: if it belongs to other layers, shapes or parameter groups, or if the base's moments in it were
                collected in the other form. Nothing is loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        loaded = split(state_dict, self.param_groups, self._tracker)
        check_form(loaded, self._form, chosen=self._settings["mode"] != "auto", adaptive=self._traits.adaptive)
        self.base_optimizer.load_state_dict(loaded.base)
        self._tracker.reset()
        for layer, snapshot in loaded.snapshots.items():
            self._tracker.restore(layer, snapshot)
        self._progress |= {"steps": loaded.steps, "started": int(bool(loaded.snapshots))}
        self._tracker.gate.due = self._measures_next()
        if loaded.foreign:
            self._advise([COLD])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        check_copies(self._model)
        tracker = self._tracker
        return {
            "base_optimizer": self.base_optimizer,
            "model": self._model,
            "options": self._options,
            "settings": self._settings,
            "ranks": self._ranks,
            "progress": dict(self._progress),
            "statistics": {layer.name: tracker.snapshot(layer) for layer in tracker.layers if layer in tracker.ready},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._setup(*(state[key] for key in ("base_optimizer", "model", "options", "settings", "ranks")))
        self._progress |= state["progress"]
        self._tracking["restore"] = state["statistics"]
        if "_modules" in state["model"].__dict__:
            _ = self._tracker  # hooks from the copy's first forward on
        # otherwise the model holds this optimizer, is being copied itself, and follows at the first use

    def _advise(self, advice: Iterable[tuple[str, str]]) -> None:
        """Say each kind of advice once."""
        for key, message in advice:
            if key not in self._warned:
                self._warned.add(key)
                warnings.warn(f"BNPreconditioner: {message}.", stacklevel=4)
