"""LeapAlign: the reward's gradient to any step of sampling, through two leaps. DRTune and DRaFT-1 are settings of it.

"LeapAlign: Post-Training Flow Matching Models at Any Generation Step by Building Two-Step Trajectories", 2026, arXiv
2604.15311, by Zhanhao Liang, Tao Yang, Jie Wu, Chengjian Feng and Liang Zheng.
"Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models" (DRTune), 2024, arXiv 2405.00760: nested = 0.

Idea: sample without gradient and remember two states on the way. Leap from the first to the second and from there to
the image, a network call each; the values stay the rollout's own, the gradient takes the leaps. So the early steps,
which decide the layout, learn at the price of two calls, and the reward sees real samples.

    xhat_j   = alpha_j x0_theta(x_k) + sigma_j eps_theta(x_k)              t_k > t_j              (eq. 4) `path.move`
    x_j      = xhat_j + sg[x_j - xhat_j]                                   value x_j               (eq. 6) `connected`
    v        = v_theta(a x_j + (1 - a) sg[x_j])                            a = nested              (eq. 9) `discounted`
    x_0      = xhat_0 + sg[x_0 - xhat_0],  xhat_0 = x_j - t_j v            value x_0               (eq. 7) `leap`
    w        = 1 / (max(d_j, tau) + max(d_0, tau)),  d = mean |x - xhat|                          (eq. 12) `similarity`
    loss     = E sg[w] max(0, hinge - R(x_0, c))                                            (eq. 11, 13) `reward_loss`

For a flow dx_0/dtheta = -t_j dv_j/dtheta - (t_k - t_j) dv_k/dtheta + a t_j (t_k - t_j) dv_j/dx dv_k/dtheta (eq. 10):
the last, nested term is the one that explodes, and the one that DRTune drops.

Deviations from the paper:
- w is multiplied by 2 tau, so that an exact leap weighs 1 and learning rates compare with those of other methods.
- hinge = None gives -R; the paper's .55 is for HPSv2.1, .4 for PickScore, 13.5 for HPSv3. nested: .3 for HPSv2.1, .1
  for the other two.
- Steps are drawn for each sample, uniformly over all pairs.
- Any schedule: a leap is the DDIM step, which for a flow is the paper's; v is eps - x0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.path import Prediction, from_velocity, move
from palate.rewards.combine import below_hinge
from palate.sampling import state_kind, time_grid


@dataclass(frozen=True)
class LeapAlignSettings:
    """Hyperparameters of LeapAlign, with the paper's symbols and defaults."""

    steps: int = 25  # of sampling (section 6.1)
    guidance: float = 3.5  # of every call, the differentiated ones included (section 6.1)
    shift: float = 3.0  # of the sampling grid
    nested: float = 0.3  # the paper's alpha, scale of the gradient through both calls; 0 = DRTune
    leaps: Literal[1, 2] = 2  # 1: from x_j to the image only, as ReFL does but with the rollout's own values
    j: Literal["random", "last"] = "random"  # where the last leap begins; leaps = 1 and "last" is DRaFT-1
    tau: float = 0.1  # distance below which leaps count as exact (section 6.1)
    weighted: bool = True  # by how well leap and rollout agree
    hinge: float | None = None  # phi(r) = max(0, hinge - r), .55 for HPSv2.1 in the paper; None: phi(r) = -r

    def __post_init__(self) -> None:
        require(
            self,
            ("steps: at least 1, and at least 2 with leaps = 2", self.steps < (2 if self.leaps == 2 else 1)),
            ("shift: above 0", not self.shift > 0),
            ("nested: between 0 and 1", not 0 <= self.nested <= 1),
            ("leaps: 1 or 2", self.leaps not in (1, 2)),
            ("j: 'random' or 'last'", self.j not in ("random", "last")),
            ("tau: above 0", not self.tau > 0),
        )


class LeapAlign:
    """Differentiates the reward through two leaps along a sampled path; `core.Algorithm`."""

    trains = ("policy",)
    needs_reward_gradient = True
    any_size = True
    reads_images = False

    def __init__(self, settings: LeapAlignSettings):
        self.settings = settings

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: a rollout that remembers two states per sample, then the leaps between them."""
        s = self.settings
        k, j = drawn_steps(s, rng)
        noise = rng.normal("rollout", model.latent_shape).to(**state_kind(model))
        times = time_grid(s.steps, shift=s.shift).to(noise)
        with torch.no_grad():
            x_k, x_j, x0 = remembered(model, batch.cond, noise, times, s.guidance, k, j)
        t_k, t_j = times[k.to(times.device)], times[j.to(times.device)]
        off_j = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
        if s.leaps == 2:
            xhat_j = move(model.predict(x_k, t_k, batch.cond, guidance=s.guidance), *model.schedule(t_j))
            x_j, off_j = connected(x_j, xhat_j), distance(x_j, xhat_j)
        xhat_0 = leap(model, x_j, t_j, batch.cond, s.guidance, s.nested)
        image, off_0 = connected(x0, xhat_0), distance(x0, xhat_0)
        r = reward(model.decode(image), batch.prompts)
        weight = similarity(off_j, off_0, s.tau) if s.weighted else torch.ones_like(off_0)
        metrics = {
            "reward": r.mean(),
            "leap_weight": weight.mean(),
            "leap_distance": off_0.mean(),
            "t_j": t_j.mean(),
        }
        if s.leaps == 2:
            metrics |= {"leap_distance_j": off_j.mean(), "t_k": t_k.mean()}
        yield Loss(reward_loss(r, weight, s.hinge), {name: value.detach() for name, value in metrics.items()}, "policy")


def drawn_steps(settings: LeapAlignSettings, rng: Random) -> tuple[Tensor, Tensor]:
    """Sampling steps k < j of each sample, (B,) each, at whose beginnings the leaps start; all pairs equally likely.

    With one leap k is j, and unused.
    """
    last = settings.steps - 1
    if settings.leaps == 1:
        j = torch.full((len(rng.ids),), last) if settings.j == "last" else rng.integers("leap-j", 0, last)
        return j, j
    if settings.j == "last":
        return rng.integers("leap-k", 0, last - 1), torch.full((len(rng.ids),), last)
    one, other = rng.integers("leap-k", 0, last), rng.integers("leap-j", 0, last - 1)
    other = other + (other >= one)  # any step but the first one's
    return torch.minimum(one, other), torch.maximum(one, other)


def remembered(
    model: Model, cond: Cond, noise: Tensor, times: Tensor, guidance: float, k: Tensor, j: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States at the beginning of steps k and j (B,) of a deterministic rollout, and its end: (B, C, h, w) each."""
    x, x_k, x_j = noise, noise, noise
    here = [step.to(noise.device).view(-1, 1, 1, 1) for step in (k, j)]
    for i in range(len(times) - 1):
        x_k, x_j = torch.where(here[0] == i, x, x_k), torch.where(here[1] == i, x, x_j)
        pred = model.predict(x, times[i].expand(len(x)), cond, guidance=guidance)
        x = move(pred, *model.schedule(times[i + 1].expand(len(x))))
    return x_k, x_j, x


def leap(model: Model, x: Tensor, t: Tensor, cond: Cond, guidance: float, nested: float) -> Tensor:
    """xhat_0 (B, C, h, w) from x at times t (B,): x itself keeps its gradient, the network's input `nested` of it."""
    pred = model.predict(discounted(x, nested), t, cond, guidance=guidance)
    return from_velocity(x, velocity(pred), *model.schedule(t)).x0


# The equations


def connected(value: Tensor, predicted: Tensor) -> Tensor:
    """`value` to the last bit, with the gradient of `predicted`."""
    return value.detach() + (predicted - predicted.detach())


def discounted(x: Tensor, scale: float) -> Tensor:
    """x to the last bit, with `scale` times its gradient."""
    return x.detach() + scale * (x - x.detach())


def velocity(pred: Prediction) -> Tensor:
    """eps - x0."""
    return pred.eps - pred.x0


def distance(x: Tensor, predicted: Tensor) -> Tensor:
    """d = mean |x - xhat|, (B,), without gradient."""
    return (x - predicted).detach().abs().flatten(1).mean(1)


def similarity(off_j: Tensor, off_0: Tensor, tau: float) -> Tensor:
    """2 tau / (max(d_j, tau) + max(d_0, tau)), (B,) in (0, 1]."""
    return 2 * tau / (off_j.clamp_min(tau) + off_0.clamp_min(tau))


def reward_loss(r: Tensor, weight: Tensor, hinge: float | None) -> Tensor:
    """mean of w phi(r), phi(r) = max(0, hinge - r) or -r."""
    return (weight.to(r) * below_hinge(r, hinge)).mean()


def calls_per_update(settings: LeapAlignSettings) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice.

    forward = (steps + leaps) g,  backward = leaps g whatever the steps,  decode = reward = 1,  g = 2 with guidance.
    """
    guided = 1 if settings.guidance == 1 else 2
    return {
        "forward": (settings.steps + settings.leaps) * guided,
        "backward": settings.leaps * guided,
        "decode": 1,
        "reward": 1,
    }
