"""SRPO with Direct-Align.

"Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference", 2025, arXiv 2509.06942, by
Xiangwei Shen, Zhimin Li, Zhantao Yang, Shiyi Zhang, Yingfang Zhang, Donghao Li, Chunyu Wang, Qinglin Lu and Yansong
Tang.

Idea: noise a clean latent with noise you keep, let the network explain only a small slice of it, remove the rest
exactly; then the reward sees a sharp image at any noise level, one network call deep. Score that image with two prompts
that differ in a control word, so that the reward model's own biases cancel.

    x_s    = alpha_s x0 + sigma_s eps                      eps known                                       (eq. 3)
    x_e    = alpha_e x0_theta + sigma_e eps_theta          one step with the network, from level s to e    `move`
    x0hat  = (x_e - sigma_e eps) / alpha_e                 exact if the network is                         `recover`
    r      = (1 + k) R("pos. p") - R("neg. p")             the relative preference, SRP                    `relative`
    loss   = -lambda(t) r                                  averaged over n injections and both branches    (eq. 6)

Denoise branch: sigma_e < sigma_s. Inversion branch: sigma_e > sigma_s and the words swapped. An error delta of the
velocity comes out as x0hat = x0 - g delta, where g (`gain`) is positive in the first and negative in the second: the
swap makes both push the network the same way, while what they reward in common (an absolute reward, hacking) cancels.

Deviations from the paper and from the released program:
- eq. 5 divides by alpha_s; `recover` is the DDIM form, which divides by alpha_e. For a flow it is what the released
  program computes, for a variance-preserving model it is exact as well. Its gain is larger by 1 / alpha_e for a flow.
- The injected noise is fresh by default. The program re-uses the rollout's own noise (noise="rollout"), which biases
  x0hat.
- The program's "discount" is the k above (k_denoise, k_inversion); the paper's lambda(t) is `discount`. No hinge by
  default.
- Levels are drawn per sample, uniformly; levels="released" reproduces the program's index map instead, its truncation
  of the time given to the network included, in the rollout as in the trained forward. There, as in the program, all
  injections of a sample repeat the same draw: with noise="rollout" its gradient accumulation G is n * len(branches),
  G = 1 is branches=("inversion",), G = 4 is n=2.
- `reference_penalty` (Palate's, off by default) keeps the policy's prediction of x0 near the frozen reference's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from palate.core import Batch, Loss, Model, Random, Reward, require
from palate.path import Coefficient, Prediction, add_noise, from_velocity, move
from palate.rewards.combine import TEMPLATE, below_hinge, control_texts, relative, score_pair, with_control
from palate.runtime.errors import InputError
from palate.sampling import sample, shift_time, state_kind

Branch = Literal["denoise", "inversion"]


@dataclass(frozen=True)
class SRPOSettings:
    """Pairs (late, early) are values at the low-noise and at the high-noise end, linear in between.

    The window and the step are in the model's time t, which for a flow is sigma. Every level lies inside the window.
    """

    old_keys: ClassVar[Mapping[str, str]] = {"anchor": "reference_penalty"}  # of recipes, for one release

    positive: tuple[str, ...] = ("Realistic photo",)  # wanted words, rotated: the pair of step i is (POS[i], NEG[i]),
    negative: tuple[str, ...] = ("CG Render",)  # each index modulo its list's length
    word_offset: int = 0  # added to the step before the rotation
    template: str = TEMPLATE

    rollout_steps: int = 25
    rollout_guidance: float = 1.0
    rollout_weights: str = "policy"
    shift: float = 3.0  # of the rollout's grid, and of the released levels
    guidance: float = 1.0  # in the forward that is trained

    branches: tuple[Branch, ...] = ("denoise", "inversion")
    n: int = 1  # noise injections per rollout, each with its own level
    noise: Literal["fresh", "rollout"] = "fresh"
    shared_noise: bool = False  # one rollout noise for all samples of a step, as in the released program
    levels: Literal["window", "released"] = "window"
    window: tuple[float, float] = (0.75, 0.965)
    step: float = 0.0215  # |t_s - t_e|, the slice that the network explains

    timestep_length: int = 1000  # this and the next three: the released program's names, read with levels="released"
    groundtruth_ratio: float = 0.9
    train_timestep: tuple[int, int] = (5, 25)
    vis_sampling_step: int = 50

    preference: Literal["relative", "absolute"] = "relative"  # absolute: R("pos. p") alone, for ablations
    k_denoise: tuple[float, float] = (0.0, 0.0)  # the CFG-like reward's k: weight of the absolute reward
    k_inversion: tuple[float, float] = (0.0, 0.0)  # pushes away from what both prompts name; released: .3 to .01
    discount: tuple[float, float] = (1.0, 1.0)  # lambda(t), multiplies the loss
    hinge: float | None = None  # loss max(0, hinge - r) in place of -r; 0.7 in the released program
    reference_penalty: float = 0.0  # weight of mean (x0_policy - x0_reference)^2, both predicted from the same x_s

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            words = vars(self)[name]
            none = self.preference == "absolute" and not any(words)  # the plain prompt is asked
            object.__setattr__(self, name, ("",) if none else _word_list(name, words))
        for name in ("branches", "window", "train_timestep", "k_denoise", "k_inversion", "discount"):
            object.__setattr__(self, name, tuple(vars(self)[name]))
        require(
            self,
            (
                "branches: one or both of 'denoise', 'inversion', each once",
                not self.branches
                or len(set(self.branches)) < len(self.branches)
                or not set(self.branches) <= {"denoise", "inversion"},
            ),
            ("n and rollout_steps: at least 1", self.n < 1 or self.rollout_steps < 1),
            ("noise: 'fresh' or 'rollout'", self.noise not in ("fresh", "rollout")),
            ("levels: 'window' or 'released'", self.levels not in ("window", "released")),
            ("preference: 'relative' or 'absolute'", self.preference not in ("relative", "absolute")),
            (
                "template: a text with {control} and {prompt}",
                "{control}" not in self.template or "{prompt}" not in self.template,
            ),
            ("window: (low, high) with 0 <= low < high <= 1", not 0 <= self.window[0] < self.window[1] <= 1),
            (
                "step: above 0 and at most half of the window, because both branches stay inside it",
                not 0 < self.step <= (self.window[1] - self.window[0]) / 2 + 1e-12,
            ),
            ("timestep_length: at least 10", self.timestep_length < 10),
            ("groundtruth_ratio: between 0 and 1", not 0 < self.groundtruth_ratio <= 1),
            (
                "train_timestep: (a, b) with 0 <= a < b <= vis_sampling_step",
                not 0 <= self.train_timestep[0] < self.train_timestep[1] <= self.vis_sampling_step,
            ),
            ("shift: above 0", not self.shift > 0),
            ("reference_penalty: at least 0", not self.reference_penalty >= 0),
            (
                "k_denoise, k_inversion: (0, 0) with preference='absolute', which has no k",
                self.preference == "absolute" and any(self.k_denoise + self.k_inversion),
            ),
        )


class SRPO:
    """The algorithm object; its only state is the control words in force."""

    trains = ("policy",)
    needs_reward_gradient = True
    any_size = True

    def __init__(self, settings: SRPOSettings):
        self.settings = settings
        self.positive, self.negative = settings.positive, settings.negative

    @property
    def relative(self) -> bool:
        """Whether the difference between the control words is what is trained."""
        return self.settings.preference == "relative"

    def words(self, step: int) -> tuple[str, str]:
        """The positive and the negative control word of a step."""
        i = step + self.settings.word_offset
        return self.positive[i % len(self.positive)], self.negative[i % len(self.negative)]

    def steer(self, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None) -> None:
        """Replace the control words from the next step on; None keeps a list. InputError: both sides would be alike."""
        new_positive = self.positive if positive is None else _word_list("positive", positive)
        new_negative = self.negative if negative is None else _word_list("negative", negative)
        if self.relative and set(new_positive) == set(new_negative):
            both = ", ".join(new_positive)
            raise InputError(f"positive and negative would both be {both}, so neither is preferred; change both sides")
        self.positive, self.negative = new_positive, new_negative

    def control_texts(self, prompt: str) -> dict[str, list[str]]:
        """What the reward is asked about a prompt, for each control word in force."""
        return control_texts({"positive": self.positive, "negative": self.negative}, prompt, self.settings.template)

    def state_dict(self) -> dict[str, Any]:
        return {"positive": list(self.positive), "negative": list(self.negative)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.positive, self.negative = tuple(state["positive"]), tuple(state["negative"])

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: a rollout (or `batch.latents`), then a loss per injection and branch; the last one updates."""
        s = self.settings
        positive, negative = self.words(rng.step)
        texts = {
            "positive": with_control(positive, batch.prompts, s.template),
            "negative": with_control(negative, batch.prompts, s.template),
        }

        def judge(images: Tensor) -> tuple[Tensor, Tensor]:
            return score_pair(reward, images, texts["positive"], texts["negative"])

        x0, rollout_noise = self._clean_latents(model, batch, rng)
        for j in range(s.n):
            eps = rollout_noise if rollout_noise is not None else rng.normal(f"inject-{j}", model.latent_shape).to(x0)
            for branch in s.branches:
                levels = draw_levels(s, branch, rng, j)
                last = j == s.n - 1 and branch == s.branches[-1]
                value, metrics = self._branch_loss(model, judge, batch.cond, x0, eps, branch, levels)
                yield Loss(value / (s.n * len(s.branches)), metrics, "policy" if last else None)

    def _clean_latents(self, model: Model, batch: Batch, rng: Random) -> tuple[Tensor, Tensor | None]:
        """x0, and the noise to re-inject if it is not to be fresh. Real latents (offline) always get fresh noise."""
        s = self.settings
        kind = state_kind(model)
        if batch.latents is not None:
            return batch.latents.detach().to(**kind), None
        if s.shared_noise:
            noise = rng.shared_normal("rollout", model.latent_shape).expand(len(batch.prompts), -1, -1, -1)
        else:
            noise = rng.normal("rollout", model.latent_shape)
        noise = noise.to(**kind)
        with torch.no_grad():
            x0 = sample(
                model,
                batch.cond,
                noise,
                s.rollout_steps,
                guidance=s.rollout_guidance,
                shift=s.shift,
                weights=s.rollout_weights,
                timestep=truncated if s.levels == "released" else None,
            )
        return x0, noise if s.noise == "rollout" else None

    def _branch_loss(
        self,
        model: Model,
        judge: Callable[[Tensor], tuple[Tensor, Tensor]],
        cond: Any,
        x0: Tensor,
        eps: Tensor,
        branch: Branch,
        levels: Levels,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one injection and branch, and its metrics; `judge`: images -> scores of both sides, (B,) each."""
        s = self.settings
        levels = Levels(*(x.to(x0) for x in levels))
        alpha_s, sigma_s = model.schedule(levels.start)
        alpha_e, sigma_e = model.schedule(levels.end)
        xs = add_noise(x0, eps, alpha_s, sigma_s)

        def predict(weights: str) -> Prediction:
            pred = model.predict(xs, levels.timestep, cond, guidance=s.guidance, weights=weights)
            if s.levels == "window":
                return pred
            return from_velocity(xs, pred.eps - pred.x0, alpha_s, sigma_s)  # xs is at levels.start

        if s.reference_penalty:
            with torch.no_grad():  # before the policy's call: a switch of adapters after it would lose its gradient
                reference = predict("reference")
        pred = predict("policy")
        x0hat = recover(pred, eps, alpha_e, sigma_e)
        favoured, other = judge(model.decode(x0hat))
        r = self._preference(branch, favoured, other, levels.position)
        loss = preference_loss(r, between(s.discount, levels.position), s.hinge)
        metrics = {
            f"reward_{branch}": r.mean(),
            f"positive_{branch}": favoured.mean(),
            f"negative_{branch}": other.mean(),
            f"sigma_s_{branch}": sigma_s.mean(),
            f"sigma_e_{branch}": sigma_e.mean(),
            f"gain_{branch}": gain(alpha_s, sigma_s, alpha_e, sigma_e).mean(),
            f"distance_{branch}": (x0hat - x0).square().mean().sqrt(),
        }
        if s.reference_penalty:
            metrics[f"reference_distance_{branch}"] = apart = (pred.x0 - reference.x0).square().mean()
            loss = loss + s.reference_penalty * apart
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _preference(self, branch: Branch, positive: Tensor, negative: Tensor, position: Tensor) -> Tensor:
        s = self.settings
        if s.preference == "absolute":
            return positive if branch == "denoise" else -positive
        if branch == "denoise":
            return relative(positive, negative, between(s.k_denoise, position).to(positive))
        return relative(negative, positive, between(s.k_inversion, position).to(positive))


# The equations


def recover(pred: Prediction, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """x0hat = (x_e - sigma_e eps) / alpha_e, where x_e = move(pred, alpha_e, sigma_e).

    `alpha`, `sigma` are the END level, alpha > 0; `pred` was made at the start level from alpha_s x0 + sigma_s eps.
    """
    return (move(pred, alpha, sigma) - sigma * eps) / alpha


def gain(alpha_s: Tensor, sigma_s: Tensor, alpha_e: Tensor, sigma_e: Tensor) -> Tensor:
    """g in x0hat = x0 - g delta for a velocity error delta; (sigma_s - sigma_e) / (1 - sigma_e) for a flow."""
    return (sigma_s * alpha_e - sigma_e * alpha_s) / (alpha_e * (alpha_s + sigma_s))


def preference_loss(r: Tensor, weight: Tensor, hinge: float | None) -> Tensor:
    """mean of -lambda r, or of lambda max(0, hinge - r); the two have the same gradient while r < hinge."""
    return (weight.to(r) * below_hinge(r, hinge)).mean()


def between(ends: tuple[float, float], position: Tensor) -> Tensor:
    """The schedule (late, early), linear in the position: 0 is late (low noise), 1 is early (high noise)."""
    return ends[0] + (ends[1] - ends[0]) * position


# Noise levels


class Levels(NamedTuple):
    """Where one branch works, each (B,): it evaluates at `start`, lands on `end`, gives the network `timestep`.

    `position` is where its cleaner level stands in the range of levels, 0 late to 1 early.
    """

    start: Tensor
    end: Tensor
    timestep: Tensor
    position: Tensor


def draw_levels(settings: SRPOSettings, branch: Branch, rng: Random, injection: int) -> Levels:
    """The levels of an injection; both branches share the draw. The released program draws once per step."""
    if settings.levels == "window":
        return window_levels(settings, branch, rng.uniform(f"level-{injection}"))
    return released_levels(settings, branch, rng.integers("level", 5, settings.timestep_length - 5))


def window_levels(settings: SRPOSettings, branch: Branch, u: Tensor) -> Levels:
    """Both branches land on low + step + u (high - low - 2 step), u in [0, 1], and start `step` above or below it."""
    (low, high), step = settings.window, settings.step
    end = low + step + u * (high - low - 2 * step)
    start = end + step if branch == "denoise" else end - step
    return Levels(start, end, start, (torch.minimum(start, end) - low) / (high - low))


def released_levels(settings: SRPOSettings, branch: Branch, m0: Tensor) -> Levels:
    """The released program's index map. m0 (B,) in 5..N-5 counts towards high noise."""
    n, sigmas = settings.timestep_length, released_sigmas(settings)
    k = torch.minimum(n - m0, m0).clamp_max(released_reach(settings))
    cleaner = m0 if branch == "denoise" else (m0 - k).clamp_min(1)
    noisier = (cleaner + k).clamp_max(n)
    start, end = (noisier, cleaner) if branch == "denoise" else (cleaner, noisier)
    sigma_s = sigmas[n - start]
    return Levels(sigma_s, sigmas[n - end], truncated(sigma_s), cleaner.double() / (n - 1))


def truncated(t: Tensor) -> Tensor:
    """Whole thousandths, as the program tells the network its time; the state itself is at t."""
    return (1000 * t).floor() / 1000


def released_sigmas(settings: SRPOSettings) -> Tensor:
    """The program's levels (N,), float64, falling: linear between two entries of the shifted visualisation grid."""
    ends = 1 - torch.tensor(settings.train_timestep, dtype=torch.float64) / settings.vis_sampling_step
    first, last = shift_time(ends, settings.shift).tolist()
    return torch.linspace(first, last, settings.timestep_length, dtype=torch.float64)


def released_reach(settings: SRPOSettings) -> int:
    """The longest step in indices, floor((1 - groundtruth_ratio) N) + 1 in floating point, rounding error included.

    (1 - .9) 1000 is 99.99999999999997, so .9 gives the 100 that was meant, while (.6, 100) gives 41.
    """
    return math.floor((1 - settings.groundtruth_ratio) * settings.timestep_length) + 1


# Cost


def calls_per_update(settings: SRPOSettings, *, offline: bool = False) -> dict[str, int]:
    """Calls of one update at any batch size, with losses = n * len(branches):

    predict = (0 offline, else rollout_steps) + losses * (2 with reference_penalty, else 1); decode = backward = losses;
    image_towers = losses, and two prompts are scored on each (a plain reward, without `image_features`, runs twice).
    """
    losses = settings.n * len(settings.branches)
    rollout = 0 if offline else settings.rollout_steps
    predict = rollout + losses * (2 if settings.reference_penalty else 1)
    return {"predict": predict, "decode": losses, "image_towers": losses, "scores": 2 * losses, "backward": losses}


def _word_list(name: str, words: Sequence[str]) -> tuple[str, ...]:
    if isinstance(words, str) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise InputError(
            f"{name} control words: got {words!r}; expected a list of one or more words, like ['3d', 'glossy']"
        )
    return tuple(w.strip() for w in words)
