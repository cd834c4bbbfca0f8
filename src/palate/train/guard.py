"""The guard: quantities that are not optimised, measured on fixed prompts against their values before training."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.core import Cond, EmbedsImages, GuardMeasure, Model, Random, Sampler
from palate.evaluate import embedded_panel, measure_for_guard
from palate.evaluate.monitor import ImageMonitor
from palate.models import families
from palate.models.latents import ImageSize
from palate.models.sizes import at_size
from palate.path import Prediction
from palate.recipe import GuardSettings, evenly_spaced
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError
from palate.runtime.phases import tell
from palate.train.job import Job
from palate.train.state import Weights

FALLS = {"heldout": "heldout_drop", "concept": "concept_drop", "background": "background_drop"}
RISES = {"duplicates": "duplicates_rise"}
SHIFTS = {
    name: name for name in ("cast_shift", "saturation_shift", "detail_shift", "drift", "latent_drift", "heldout_fall")
}
SHARES = {"variety": "variety_ratio", "fit": "fit_ratio"}
LIMITS = {**FALLS, **RISES, **SHIFTS, **SHARES, "diversity": "diversity_ratio"}  # of what is measured: the setting
SEEDS = 2  # images per guard prompt: diversity needs two, concept accuracy many prompts


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers between two checks; a checkpoint holds it."""

    base: dict[str, float] | None = None  # before the first step, or of the reference
    best_step: int | None = None
    best_value: float | None = None
    rollbacks: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of the metrics since the last check
    counts: dict[str, int] = field(default_factory=dict)  # of the steps that had each of them
    best_seen: bool = False  # whether trainer.guard.best has been logged or measured

    def means(self) -> dict[str, float]:
        return {key: value / self.counts[key] for key, value in self.sums.items()}


class Decision(NamedTuple):
    """What follows from a check."""

    row: dict[str, Any]  # of metrics.jsonl
    broken: list[str]  # a sentence for each limit that is broken
    action: str  # "", "warn", "rollback" or "stop"


class Guard:
    """Decides on measured values; what is done about it is the loop's."""

    def __init__(self, settings: GuardSettings, later_metrics: Sequence[str] = ()):
        """later_metrics: those that the first steps lack and `trainer.guard.best` may name (`core.LogsLater`)."""
        self.settings, self.later, self.state = settings, frozenset(later_metrics), GuardState()

    def begin(self, base: dict[str, float], start: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """Take the values to compare with, and those before the first step where these are others; returns the rows of
        metrics.jsonl. InputError: a value to compare with is no finite number, or the start is outside the limits, so
        that every result would be."""
        if broken := [key for key, value in base.items() if not math.isfinite(value)]:
            raise InputError(
                f"trainer.guard: {broken[0]} is {base[broken[0]]} before training, which nothing can be compared with; "
                "look at what measures it"
            )
        if not base.keys() & LIMITS.keys() and self.settings.best not in base:
            raise InputError(
                f"trainer.guard: what is measured ({', '.join(base) or 'nothing'}) has no limit; name it as one of "
                f"{', '.join(LIMITS)}, or let trainer.guard.best name it"
            )
        rows: list[dict[str, Any]] = [{"step": 0, "event": "guard", "verdict": "base", **base}]
        if start is not None:
            if broken := broken_limits(start, base, self.settings):
                raise InputError(
                    f"trainer.guard: already before the first step {'; '.join(broken)}: what this run begins with has "
                    "lost too much of the model without a LoRA. Begin with an earlier result or with none "
                    "(model.start), or compare with this start (trainer.guard.base=start)"
                )
            rows.append({"step": 0, "event": "guard", "verdict": "ok", "best_step": 0, **start})
        self.state = dataclasses.replace(self.state, base=base, best_step=0)
        return rows

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count a step's metrics in. InputError: the first step that changes the policy lacks trainer.guard.best, so
        did those before it, and the algorithm knows of none that comes later. Steps that follow may lack it, as DPO's
        `prefers` where all pairs are ties."""
        if not self.settings.every:
            return
        known = {*(self.state.base or {}), *metrics, *self.later}
        best_seen = self.state.best_seen or self.settings.best in known
        if self.settings.best is not None and not best_seen and metrics.get("grad_norm", 0.0) != 0.0:
            raise InputError(
                f"trainer.guard.best: there is no metric {self.settings.best!r}; expected null or one of "
                f"{', '.join(sorted(known))}"
            )
        sums, counts = dict(self.state.sums), dict(self.state.counts)
        for key, value in ((key, value) for key, value in metrics.items() if math.isfinite(value)):
            sums[key], counts[key] = sums.get(key, 0.0) + value, counts.get(key, 0) + 1
        self.state = dataclasses.replace(self.state, sums=sums, counts=counts, best_seen=best_seen)

    def forget_best(self) -> None:
        """New words make rewards incomparable: the next check inside the limits becomes the best."""
        self.state = dataclasses.replace(self.state, best_value=None, sums={}, counts={})

    def decide(self, step: int, now: dict[str, float]) -> Decision:
        """Compare the values of a step with those before training."""
        settings, values = self.settings, {**self.state.means(), **now}
        state = dataclasses.replace(self.state, sums={}, counts={})
        broken = broken_limits(now, state.base or {}, settings)
        row = {"step": step, "event": "guard", "verdict": "; ".join(broken) or "ok", **now}
        action = ""
        if not broken:
            value = float(step) if settings.best is None else values.get(settings.best)
            # None: no step since the last check had that metric, and nothing tells how good this one is
            if value is not None and math.isfinite(value) and (state.best_value is None or value >= state.best_value):
                state = dataclasses.replace(state, best_step=step, best_value=value)
        else:
            action = settings.action
            if action == "rollback" and state.rollbacks >= settings.rollbacks:
                action = "stop"
            if action == "rollback":
                state = dataclasses.replace(state, rollbacks=state.rollbacks + 1)
        self.state = state
        row |= {"best_step": state.best_step} | ({"action": action} if action else {})
        return Decision(row, broken, action)

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kept = dict(state)
        if "steps" in kept:  # an older checkpoint: one count for all metrics, and no word on whether the best was seen
            kept["counts"] = dict.fromkeys(kept["sums"], kept.pop("steps"))
            kept["best_seen"] = kept["best_value"] is not None or self.settings.best in kept["sums"]
        self.state = GuardState(**kept)


def broken_limits(now: Mapping[str, float], base: Mapping[str, float], guard: GuardSettings) -> list[str]:
    """Which of the guard's limits the values break, a sentence each. A value that is not measured breaks none, and one
    that is not a number breaks its limit."""
    limits = {key: getattr(guard, limit) for key, limit in LIMITS.items()}
    if "heldout_fall" in base:  # judged by its spread, where that was taken, and not in its own units
        limits["heldout"] = None
    watched = {key: limit for key, limit in limits.items() if limit is not None and key in now and key in base}
    broken = []
    for key, limit in watched.items():
        change = f"from {base[key]:.4g} to {now[key]:.4g}"
        if key in FALLS and not base[key] - now[key] <= limit:
            broken.append(f"{key} fell {change}, more than {limit:g}")
        if key in RISES and not now[key] - base[key] <= limit:
            broken.append(f"{key} rose {change}, more than {limit:g}")
        if key in SHIFTS and not now[key] <= limit:
            broken.append(f"{key} is {now[key]:.3g} of the base's spread, more than {limit:g}")
        if key in SHARES and not now[key] + now.get(f"{key}_error", 0.0) >= limit:
            broken.append(f"{key} is {now[key]:.3g} of the base's, below {limit:g}")
        if key == "diversity" and not now[key] >= limit * base[key]:
            broken.append(f"{key} fell {change}, below {limit:g} of it")
    return broken


@dataclass(frozen=True)
class Measurer:
    """Measures what the guard compares, with the averaged weights where they are kept; the same on all ranks."""

    model: Model
    prompts: list[str]  # those of the guard are evenly spaced over them
    settings: GuardSettings
    measure: GuardMeasure
    weights: Weights
    ranks: Ranks
    image_size: ImageSize | None = None  # that is looked at, `sample.image_size`; None = the model's own

    def __call__(self) -> dict[str, float]:
        with self.weights.averaged():
            return self._look()

    def before(self) -> list[dict[str, float]]:
        """What is compared with; and, where that is the reference and training begins elsewhere, the start."""
        if self.settings.base == "start" or not self._moved():
            return [self()]
        return [self._look(reference=True), self()]

    def _look(self, *, reference: bool = False) -> dict[str, float]:
        different = max(1, self.settings.prompts // SEEDS)
        prompts = [p for p in evenly_spaced(self.prompts, different) for _ in range(SEEDS)]
        tell("guard", 0, len(prompts))
        with torch.no_grad(), at_size(self.model, self.image_size):  # a view is made of the model as it is then
            model = as_reference(self.model) if reference else self.model
            values = self.measure(model, prompts, list(range(len(prompts))))
        if not isinstance(values, Mapping):
            raise InputError(
                f"check returned {type(values).__name__}; expected named numbers, for example {{'concept': 0.9}}"
            )
        return self.ranks.all_gather_json({key: float(value) for key, value in values.items()})[0]

    def _moved(self) -> bool:
        """Whether the policy predicts other than the reference: it began with a LoRA, or was trained before."""
        model, one = self.model, self.prompts[:1]
        place = model.parameters("policy")[0].device
        xt = Random(0, 0, [0]).normal("moved", model.latent_shape).to(place)
        t, cond = torch.full((1,), 0.5, device=place), model.encode_prompts(one)
        with torch.no_grad():
            now, then = (model.predict(xt, t, cond, weights=name).x0 for name in ("policy", "reference"))
        return any(self.ranks.all_gather_json(not torch.equal(now, then)))


def as_reference(model: Model) -> Model:
    """A view of the model whose policy predicts as its reference does; every weight is the model's own."""
    view = copy.copy(model)

    def predict(xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy") -> Prediction:
        name = "reference" if weights == "policy" else weights
        return model.predict(xt, t, cond, guidance=guidance, weights=name)

    vars(view)["predict"] = predict
    return view


def measure_of(job: Job, sampler: Sampler | None) -> GuardMeasure:
    """What the guard of a job measures: what it was given; else the embedded model's judges, if they know the model and
    trainer.guard.measures does not ask for images; else `evaluate.monitor`."""
    settings = job.trainer
    if job.measure is not None:
        return job.measure
    if isinstance(job.model, families.find("emoji").load_class()) and settings.guard.measures != "images":
        return embedded_measure(settings.seed, sampler)
    tower = job.reward if isinstance(job.reward, EmbedsImages) else None
    at_once = max(1, settings.batch_size // settings.micro_batches)
    return ImageMonitor(
        seed=settings.seed, sampler=sampler, tower=tower, steps=settings.guard.steps, batch_size=at_once
    )


def embedded_measure(seed: int, sampler: Sampler | None) -> GuardMeasure:
    """What the guard measures of the embedded model; its judges are read when they are first needed."""
    panel = functools.cache(embedded_panel)
    return lambda model, prompts, ids: measure_for_guard(model, prompts, ids, seed=seed, panel=panel(), sampler=sampler)
