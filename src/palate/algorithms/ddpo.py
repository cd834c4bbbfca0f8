"""DDPO, Denoising Diffusion Policy Optimization, with clipped importance ratios (DDPO-IS).

"Training Diffusion Models with Reinforcement Learning", 2023, arXiv 2305.13301, by Kevin Black, Michael Janner, Yilun
Du, Ilya Kostrikov and Sergey Levine.

Idea: stochastic sampling is a Markov decision process. The state is x_t, the action x_next, its density a known
Gaussian, and the reward comes at the end; so the policy gradient needs no gradient of the reward.

    p_theta(x_next | x_t, c) = N(mean_theta(x_t, c), std_t^2 I)                        `transition`
    rho_t        = p_theta(x_next | x_t, c) / p_old(x_next | x_t, c)                   `ratio`
    A            = (R - mean R) / std R, per prompt where enough is known of it        `DDPO.advantages`
    loss         = -E mean_t min(rho_t A, clip(rho_t, 1 - clip, 1 + clip) A)           `clipped_loss`

p_old is the policy that drew the batch, which serves `minibatches` updates: from the second on, rho leaves 1.

Deviations from the paper and its program:
- The step to t = 0 adds no noise here (the posterior's variance is 0 there), so it has no density and is not trained.
- density = "per_element" divides log-densities by the number of latent elements, as the program does, and the small
  clip belongs to that; "joint" is the density as the paper writes it.
- The sum over t is a mean; advantages of a rank come from its own batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.path import move
from palate.rewards.groups import differences, divided, standard_scores
from palate.runtime.errors import InputError
from palate.sampling import Transition, log_prob, state_kind, stochastic_step, time_grid, transition_std


@dataclass(frozen=True)
class DDPOSettings:
    """Hyperparameters of DDPO, with the paper's symbols and defaults."""

    steps: int = 50  # of sampling; steps - 1 of them are random and trained
    eta: float = 1.0  # 1 is the ancestral sampler
    guidance: float = 5.0
    shift: float = 1.0
    minibatches: int = 2  # updates per batch of samples
    clip: float = 1e-4
    advantage_clip: float = 5.0  # the authors' configuration
    density: Literal["per_element", "joint"] = "per_element"
    history: int = 16  # rewards remembered per prompt; 0 = statistics of the batch only
    enough: int = 16  # rewards of a prompt from which on its own mean and standard deviation are used

    def __post_init__(self) -> None:
        require(
            self,
            ("steps: at least 2, because the last one adds no noise", self.steps < 2),
            ("eta: above 0 and at most 1", not 0 < self.eta <= 1),
            ("shift: above 0", not self.shift > 0),
            ("minibatches: at least 1", self.minibatches < 1),
            ("clip: above 0", not self.clip > 0),
            ("advantage_clip: above 0", not self.advantage_clip > 0),
            ("density: 'per_element' or 'joint'", self.density not in ("per_element", "joint")),
            (
                "history: 0, or at least enough, and enough at least 2",
                self.history < 0 or self.enough < 2 or 0 < self.history < self.enough,
            ),
        )

    def check_batch(self, size: int) -> None:
        """ValueError for a batch that is too small."""
        if size < (least := max(2, self.minibatches)):
            count = "1 sample" if size == 1 else f"{size} samples"
            raise InputError(
                f"trainer.batch_size, trainer.micro_batches: a micro-batch of a rank has {count}; DDPO expected at "
                f"least {least} (2, and algorithm.minibatches = {self.minibatches}), because rewards are compared "
                "within it: raise trainer.batch_size or lower trainer.micro_batches"
            )


class DDPO:
    """Its state is the last rewards of each prompt."""

    trains = ("policy",)
    injects_noise = True  # between the steps of a rollout
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: DDPOSettings):
        self.settings = settings
        self.seen: dict[str, deque[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [[prompt, list(rewards)] for prompt, rewards in self.seen.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = {prompt: deque(rewards, self.settings.history) for prompt, rewards in state["seen"]}

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """Draw a sample for each prompt, then one update a minibatch; each random step is its own backward."""
        s = self.settings
        s.check_batch(len(batch.prompts))
        with torch.no_grad():
            x0, path = rollout(model, batch.cond, rng, s)
            rewards = reward(model.decode(x0), batch.prompts).detach()
        advantages = self.advantages(batch.prompts, rewards)
        for part in range(s.minibatches):
            chosen = torch.arange(part, len(rewards), s.minibatches)
            with torch.no_grad():
                cond = model.encode_prompts([batch.prompts[int(i)] for i in chosen])
            for number, drawn in enumerate(path):
                now = drawn.rows(chosen.to(x0.device))
                mean, std = transition(model, now.x, now.t, now.t_next, cond, s)
                rho = ratio(log_prob(now.x_next, mean, std), now.log_prob, now.x[0].numel(), s.density)
                value = clipped_loss(rho, advantages[chosen.to(x0.device)], s.clip) / len(path)
                metrics = {
                    "reward": rewards.mean(),
                    "ratio": rho.mean().detach(),
                    "clipped": ((rho - 1).abs() > s.clip).double().mean(),
                }
                yield Loss(value, metrics, "policy" if number == len(path) - 1 else None)

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """(B,): standardised within a prompt's own history once it is long enough, otherwise within the batch."""
        s = self.settings
        values = standardised(rewards)
        if s.history:
            for prompt, value in zip(prompts, rewards.tolist(), strict=True):
                kept = self.seen.setdefault(prompt, deque(maxlen=s.history))
                if math.isfinite(value):  # else this update is skipped, and is not to spoil later ones
                    kept.append(value)
            for i, prompt in enumerate(prompts):
                if len(self.seen[prompt]) >= s.enough:
                    own = torch.tensor(self.seen[prompt], dtype=torch.float64)
                    equal = not bool(differences(own.to(rewards.dtype), len(own)).any())
                    apart = rewards[i] - (rewards[i] if equal else own.mean())  # nan where the reward is not finite
                    values[i] = apart if equal else divided(apart, own.std(correction=0))
        return values.clamp(-s.advantage_clip, s.advantage_clip)


# The Markov decision process


def rollout(model: Model, cond: Cond, rng: Random, settings: DDPOSettings) -> tuple[Tensor, list[Transition]]:
    """Clean latents (B, C, h, w) and the steps - 1 random transitions that led to them. Run it under no_grad."""
    s = settings
    x = rng.normal("rollout", model.latent_shape).to(**state_kind(model))
    times = time_grid(s.steps, shift=s.shift).to(x)
    path: list[Transition] = []
    for i in range(s.steps):
        t, t_next = times[i].expand(len(x)), times[i + 1].expand(len(x))
        level, following = model.schedule(t), model.schedule(t_next)
        pred = model.predict(x, t, cond, guidance=s.guidance)
        if i == s.steps - 1:
            return move(pred, *following), path
        std = transition_std(*level, *following, s.eta)
        x_next = stochastic_step(pred, *following, std, rng.normal(f"sde-{i}", model.latent_shape).to(x))
        path.append(Transition(x, x_next, t, t_next, log_prob(x_next, move(pred, *following, std), std)))
        x = x_next
    raise AssertionError("the last step returns")


def transition(
    model: Model, x: Tensor, t: Tensor, t_next: Tensor, cond: Cond, settings: DDPOSettings
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and standard deviation (B, 1, 1, 1) of p_theta(x_next | x)."""
    following = model.schedule(t_next)
    std = transition_std(*model.schedule(t), *following, settings.eta)
    return move(model.predict(x, t, cond, guidance=settings.guidance), *following, std), std


# The equations


def standardised(rewards: Tensor) -> Tensor:
    """(R - mean R) / std R over the batch (B,); 0 where all are equal, up to rounding."""
    return standard_scores(rewards, len(rewards))


def ratio(log_prob_now: Tensor, log_prob_old: Tensor, elements: int, density: str) -> Tensor:
    """rho (B,): exp of the difference of log-densities, or of its mean over the latent's elements."""
    return ((log_prob_now - log_prob_old) / (elements if density == "per_element" else 1)).exp()


def clipped_loss(rho: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-mean min(rho A, clip(rho, 1 - clip, 1 + clip) A): no gradient once rho is past the clip in A's direction."""
    advantages = advantages.to(rho)
    return -torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages).mean()


def calls_per_update(settings: DDPOSettings) -> dict[str, int]:
    """Denoiser evaluations of one step (= `minibatches` updates) per prompt of the batch, a guided call counted twice.

    forward = (2 steps - 1) g,  backward = (steps - 1) g,  decode = reward = 1,  g = 2 with guidance, else 1.
    """
    guided = 1 if settings.guidance == 1 else 2
    return {
        "forward": (2 * settings.steps - 1) * guided,
        "backward": (settings.steps - 1) * guided,
        "decode": 1,
        "reward": 1,
    }
