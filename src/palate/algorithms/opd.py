"""DiffusionOPD: several teachers, each trained for one taste, distilled into one student on the student's own samples.

"DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion Models", 2026, arXiv 2605.15055, by Quanhao
Li, Junqiu Yu, Kaixun Jiang, Yujie Wei, Zhen Xing, Pandeng Li, Ruihang Chu, Shiwei Zhang, Yu Liu and Zuxuan Wu.

Idea: rewards that are optimised together disturb each other; optimised in turn, the later makes forget the earlier. So
train a teacher for each by itself. Then let the student sample, and at every state it visits let it step as the
teacher of that prompt would. No reward, no exploration, and the states are those the student will meet.

    x_i                                    the student's rollout, no gradient                    `visited`
    mean_S, mean_T                         one step of each from x_i                             `sampling.random_step`
    KL_i   = |mean_S - mean_T|^2 / (2 std_i^2)       eta > 0: the exact KL of the two steps      `step_kl`
    or     = mean |y_S - y_T|^2                      eta = 0, y = x_next, velocity or x0         `matching`
    loss   = E mean_i

Both are least where the student steps as the teacher. For a flow and eta = 0, |x_next|^2 is dt^2 and |x0|^2 is t^2
times the velocity's, so `target` is a weight of the steps.

Teachers are named weights of the model that never train. Each has prompts of its own; a prompt that several have is
theirs by turns, sample by sample, and one that none has is refused.

Deviations from the paper: the KL is per latent element, as everywhere here where a program averages; `steps_trained`
distils a random part of the steps, which its program does not do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.data import prompts_at
from palate.path import Prediction, move
from palate.runtime.errors import InputError
from palate.runtime.sharding import max_over_ranks
from palate.sampling import random_step, state_kind, time_grid

Target = Literal["x_next", "velocity", "x0"]


@dataclass(frozen=True)
class Teacher:
    """Frozen weights and the prompts that they teach."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    adapter: str  # folder of a run's adapter, or of any LoRA of this network
    prompts: tuple[str, ...] = ()  # taught by it, besides those of `file`; none of either = all prompts
    file: str | None = None  # of prompts, as prompts.file
    guidance: float | None = None  # of its step; None = the student's

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))


@dataclass(frozen=True)
class OPDSettings:
    """Hyperparameters of the distillation of teachers into one student."""

    teachers: Mapping[str, Teacher] = field(default_factory=dict)  # by name; the name is that of the frozen weights
    steps: int = 10  # of sampling
    steps_trained: int | None = None  # steps of a rollout that are distilled, drawn anew; None = all
    guidance: float = 1.0  # of the student, in the rollout and in the trained step
    shift: float = 3.0
    eta: float = 0.0  # 0: deterministic rollout, means are matched; above: its random steps, and their KL
    target: Target = "velocity"  # what is matched with eta = 0
    normalised: bool = False  # divide a sample's square error by its mean absolute error, as NFT does; eta = 0

    def __post_init__(self) -> None:
        require(
            self,
            ("teachers: one or more", not self.teachers),
            ("steps: at least 1", self.steps < 1),
            (
                "steps_trained: between 1 and the steps there are, or null for all",
                self.steps_trained is not None and not 1 <= self.steps_trained <= trainable(self),
            ),
            ("shift: above 0", not self.shift > 0),
            ("eta: between 0 and 1", not 0 <= self.eta <= 1),
            ("eta: 0 with steps = 1, whose only step adds no noise", self.eta > 0 and self.steps == 1),
            ("normalised: false with eta above 0, where the KL is what is trained", self.eta > 0 and self.normalised),
            ("target: 'x_next', 'velocity' or 'x0'", self.target not in ("x_next", "velocity", "x0")),
            (
                "target: 'x_next' or 'velocity' with eta above 0, where the KL is of the step",
                self.eta > 0 and self.target == "x0",
            ),
            ("teachers: names other than policy and reference", bool({"policy", "reference"} & set(self.teachers))),
            ("teachers: names without a dot", any("." in name for name in self.teachers)),
            ("teachers: names that are no attribute of torch.nn.ModuleDict", any(map(taken, self.teachers))),
        )


def taken(name: str) -> bool:
    """Whether torch refuses the name for a part of a module: keys, train, float and others, or none."""
    return not name or hasattr(torch.nn.ModuleDict(), name)


class OPD:
    """It has no state: the teachers are frozen, and which one speaks is a function of the prompt and the id."""

    trains = ("policy",)
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: OPDSettings):
        self.settings = settings
        self.routes = routes_of(settings.teachers)  # reads the teachers' files

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: the student's rollout, then its steps against the teachers'; each step is its own backward."""
        s = self.settings
        names = [route(self.routes, prompt, i) for prompt, i in zip(batch.prompts, rng.ids, strict=True)]
        chosen = chosen_steps(trainable(s), s.steps_trained, rng)
        with torch.no_grad():
            states, times = visited(model, batch.cond, rng, s)
        for number, i in enumerate(chosen):
            x, t, t_next = states[i], times[i].expand(len(names)), times[i + 1].expand(len(names))
            with torch.no_grad():  # before the student's call: a switch of adapters after it would lose its gradient
                theirs = self._teachers(model, x, t, batch, names)
            ours = model.predict(x, t, batch.cond, guidance=s.guidance)
            now, following = model.schedule(t), model.schedule(t_next)
            errors = step_error(ours, theirs, now, following, s)
            metrics = {"distance": errors.mean()}
            for name in s.teachers:
                own = [k for k, given in enumerate(names) if given == name]
                if own:
                    metrics[f"distance_{name}"] = errors[own].mean()
            metrics = {key: value.detach() for key, value in metrics.items()}
            yield Loss(errors.mean() / len(chosen), metrics, "policy" if number == len(chosen) - 1 else None)

    def _teachers(self, model: Model, x: Tensor, t: Tensor, batch: Batch, names: Sequence[str]) -> Prediction:
        """What each sample's own teacher says; a teacher is called on its own samples only.

        A network that is cut over several ranks is called on one sample of a rank that has none of a teacher's.
        """
        x0, eps = torch.zeros_like(x), torch.zeros_like(x)
        for name, teacher in self.settings.teachers.items():
            rows = [k for k, given in enumerate(names) if given == name]
            if not max_over_ranks(len(rows), model.parameters("policy")[0]):  # a question that every rank asks
                continue
            asked = rows or [0]
            cond = model.encode_prompts([batch.prompts[k] for k in asked])
            guidance = self.settings.guidance if teacher.guidance is None else teacher.guidance
            pred = model.predict(x[asked], t[asked], cond, guidance=guidance, weights=name)
            if rows:
                x0[rows], eps[rows] = pred.x0.to(x), pred.eps.to(x)
        return Prediction(x0, eps)


def routes_of(teachers: Mapping[str, Teacher]) -> dict[str, list[str]]:
    """The teachers of each prompt; "" stands for those that teach every prompt."""
    routes: dict[str, list[str]] = {}
    for name, teacher in teachers.items():
        prompts = [
            *teacher.prompts,
            *(prompts_at(f"algorithm.teachers.{name}.file", teacher.file) if teacher.file else []),
        ]
        for prompt in prompts or [""]:
            routes.setdefault(prompt, []).append(name)
    return routes


def route(routes: Mapping[str, Sequence[str]], prompt: str, sample: int) -> str:
    """The teacher of a sample; several take turns by its id. ValueError for a prompt that none teaches."""
    names = [*routes.get(prompt, []), *(routes.get("", []) if prompt else [])]
    if not names:
        raise InputError(
            f"no teacher has the prompt {prompt!r}; add it to algorithm.teachers.NAME.prompts, or leave one teacher's "
            "prompts out, who then teaches every prompt"
        )
    return names[sample % len(names)]


def trainable(settings: OPDSettings) -> int:
    """Steps of a rollout that can be distilled: all, or with noise all but the last, which adds none."""
    return settings.steps if settings.eta == 0 else settings.steps - 1


def chosen_steps(count: int, kept: int | None, rng: Random) -> list[int]:
    """`kept` of `count` steps, ascending, the same on every rank; None = all."""
    left = list(range(count))
    while len(left) > (count if kept is None else kept):
        del left[rng.shared_integer(f"leave-out-{len(left)}", 0, len(left) - 1)]
    return left


def visited(model: Model, cond: Cond, rng: Random, settings: OPDSettings) -> tuple[list[Tensor], Tensor]:
    """States (B, C, h, w) at the beginning of each step of the student's rollout, and the times (steps + 1,)."""
    s = settings
    x = rng.normal("rollout", model.latent_shape).to(**state_kind(model))
    times, states = time_grid(s.steps, shift=s.shift).to(x), []
    for i in range(s.steps):
        states.append(x)
        t, t_next = times[i].expand(len(x)), times[i + 1].expand(len(x))
        if i == s.steps - 1:
            break  # the image itself is not needed
        pred = model.predict(x, t, cond, guidance=s.guidance)
        following = model.schedule(t_next)
        if s.eta == 0:
            x = move(pred, *following)
        else:
            mean, std = random_step(pred, model.schedule(t), following, s.eta)
            x = mean + std * rng.normal(f"sde-{i}", model.latent_shape).to(x)
    return states, times


# The equations


def step_error(
    ours: Prediction,
    theirs: Prediction,
    now: tuple[Tensor, Tensor],
    following: tuple[Tensor, Tensor],
    settings: OPDSettings,
) -> Tensor:
    """How far the student's step is from the teacher's, (B,)."""
    s = settings
    if s.eta > 0:
        mean, std = random_step(ours, now, following, s.eta)
        return step_kl(mean, random_step(theirs, now, following, s.eta)[0], std)
    of: dict[str, Any] = {"x_next": lambda p: move(p, *following), "velocity": velocity, "x0": lambda p: p.x0}
    return matching(of[s.target](ours), of[s.target](theirs), normalised=s.normalised)


def velocity(pred: Prediction) -> Tensor:
    """eps - x0."""
    return pred.eps - pred.x0


def step_kl(mean: Tensor, teacher: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2 I) | N(teacher, std^2 I)) in nats per element, (B,)."""
    return ((mean - teacher) ** 2 / (2 * std**2)).flatten(1).mean(1)


def matching(ours: Tensor, theirs: Tensor, *, normalised: bool = False) -> Tensor:
    """mean |y_S - y_T|^2, (B,); normalised: over stop_grad(mean |y_S - y_T|)."""
    apart = (ours - theirs).flatten(1)
    error = apart.square().mean(1)
    return error / apart.detach().abs().mean(1).clamp_min(1e-8) if normalised else error


def calls_per_update(settings: OPDSettings) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice, all teachers with the
    student's guidance.

    forward = (steps - 1 + 2 m) g,  backward = m g,  m distilled steps,  decode = reward = 0,  g = 2 with guidance.
    """
    s = settings
    guided, m = (1 if s.guidance == 1 else 2), s.steps_trained or trainable(s)
    return {"forward": (s.steps - 1 + 2 * m) * guided, "backward": m * guided, "decode": 0, "reward": 0}
