"""ReFL, Reward Feedback Learning.

"ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", 2023, arXiv 2304.05977, by
Jiazheng Xu, Xiao Liu, Yuchen Wu, Yuxuan Tong, Qinkai Li, Ming Ding, Jie Tang and Yuxiao Dong: Algorithm 1.

Idea: late in sampling one network call already predicts the final image well enough to be scored. So sample without
gradient until t steps are left, t random in [T1, T2], predict x0 there in one differentiated call, raise its reward.

    x_t          T - t sampling steps of the policy, no gradient                       `approach`
    x0hat        = E_theta[x0 | x_t]                                                   `Model.predict(...).x0`
    L_reward     = lambda E[phi(R(x0hat, c))],   phi(r) = max(0, hinge - r)            `reward_loss`
    L_pre        = E |eps - eps_theta(alpha x + sigma eps)|^2 on real images x         `pretrain_loss`
    loss         = L_reward + pretrain L_pre

Deviations from the paper:
- The paper alternates a step on L_pre and a step on L_reward; here one update takes their weighted sum. L_pre is off
  (pretrain = 0) unless asked for, because it needs captioned images (`Batch.latents`).
- hinge = None gives -r, without the threshold. phi and lambda are those of the authors' program (hinge 2, lambda 1e-3).
- t is drawn once per update for the whole batch, as there.
- The paper names PNDM; its program samples by DDPM's ancestral sampler, eta = 1. Here eta = 0, DDIM or Euler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from palate.core import Batch, Cond, Loss, Model, Random, Reward
from palate.path import add_noise, move
from palate.rewards.combine import below_hinge
from palate.runtime.errors import InputError
from palate.sampling import random_step, state_kind, time_grid


@dataclass(frozen=True)
class ReFLSettings:
    """Hyperparameters of ReFL, with the paper's symbols and defaults."""

    T: int = 40  # sampling steps
    T1: int = 1  # t, the steps left when the reward looks, is uniform in T1..T2; 1 is the last step
    T2: int = 10
    lam: float = 1e-3  # lambda; an optimizer like Adam sees it only beside L_pre
    hinge: float | None = 2.0  # phi(r) = max(0, hinge - r); None: phi(r) = -r
    pretrain: float = 0.0  # weight of L_pre; above 0 it needs real images
    guidance: float = 7.5  # of every call but L_pre's, the differentiated one included
    shift: float = 1.0  # of the sampling grid
    eta: float = 0.0  # of the steps before the look: 0 is deterministic, 1 the ancestral sampler, as in the program

    def __post_init__(self) -> None:
        if not 1 <= self.T1 <= self.T2 <= self.T:
            raise InputError(
                f"ReFLSettings expected 1 <= T1 <= T2 <= T; got T1 = {self.T1}, T2 = {self.T2}, T = {self.T}"
            )
        if not (self.lam > 0 and self.pretrain >= 0 and self.shift > 0 and 0 <= self.eta <= 1):
            raise InputError(
                "ReFLSettings expected lam > 0, pretrain >= 0, shift > 0, 0 <= eta <= 1; "
                f"got lam = {self.lam}, pretrain = {self.pretrain}, shift = {self.shift}, eta = {self.eta}"
            )


class ReFL:
    """Differentiates the reward of a clean image that is predicted late in sampling; `core.Algorithm`."""

    trains = ("policy",)
    needs_reward_gradient = True
    any_size = True

    def __init__(self, settings: ReFLSettings):
        self.settings = settings
        self.reads_images = settings.pretrain > 0

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: the reward of a one-call prediction late in sampling, then L_pre if it has a weight."""
        s = self.settings
        if s.pretrain and batch.latents is None:
            raise InputError(
                f"algorithm.pretrain is {s.pretrain} but the run has no real images; give prompts.images "
                "a folder of captioned images, or set algorithm.pretrain=0"
            )
        left = rng.shared_integer("steps-left", s.T1, s.T2)
        noise = rng.normal("rollout", model.latent_shape).to(**state_kind(model))
        with torch.no_grad():
            xt, t = approach(model, batch.cond, noise, s, left, lambda i: rng.normal(f"sde-{i}", model.latent_shape))
        x0hat = model.predict(xt, t, batch.cond, guidance=s.guidance).x0
        r = reward(model.decode(x0hat), batch.prompts)
        metrics = {"reward": r.mean().detach(), "steps_left": torch.tensor(float(left)), "t": t[0]}
        yield Loss(s.lam * reward_loss(r, s.hinge), metrics, None if s.pretrain else "policy")
        if s.pretrain:
            eps = rng.normal("pretrain", model.latent_shape).to(noise)
            t = 1 - rng.uniform("pretrain-level").to(noise)  # in (0, 1]
            assert batch.latents is not None, "asked for above"
            value = pretrain_loss(model, batch.latents.to(noise), eps, t, batch.cond)
            yield Loss(s.pretrain * value, {"pretrain": value.detach()}, "policy")


def approach(
    model: Model,
    cond: Cond,
    noise: Tensor,
    settings: ReFLSettings,
    left: int,
    rng_noise: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t (B, C, h, w) and t (B,) with `left` of the T steps still to come, the call that predicts x0 included.

    rng_noise(i) is the standard normal of step i, needed with eta > 0.
    """
    times = time_grid(settings.T, shift=settings.shift).to(noise)
    x = noise
    for i in range(settings.T - left):
        t, t_next = times[i].expand(len(x)), times[i + 1].expand(len(x))
        pred = model.predict(x, t, cond, guidance=settings.guidance)
        if settings.eta and rng_noise is not None:
            mean, std = random_step(pred, model.schedule(t), model.schedule(t_next), settings.eta)
            x = mean + std * rng_noise(i).to(x)
        else:
            x = move(pred, *model.schedule(t_next))
    return x, times[settings.T - left].expand(len(x))


def reward_loss(r: Tensor, hinge: float | None) -> Tensor:
    """mean phi(r): max(0, hinge - r), or -r. Both have the same gradient while r < hinge."""
    return below_hinge(r, hinge).mean()


def pretrain_loss(model: Model, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """L_pre, the mean square error of the noise prediction on real latents x0 (B, C, h, w) at times t (B,)."""
    xt = add_noise(x0, eps, *model.schedule(t))
    return (model.predict(xt, t, cond).eps - eps).square().mean()


def calls_per_update(settings: ReFLSettings, left: int | None = None) -> dict[str, float]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice.

    forward = (T - t + 1) g + (1 with L_pre),  backward = g + (1 with L_pre),  g = 2 with guidance, else 1.
    `left` is the drawn t; None gives the mean over its draw.
    """
    t = (settings.T1 + settings.T2) / 2 if left is None else left
    guided, pre = (1 if settings.guidance == 1 else 2), int(settings.pretrain > 0)
    return {"forward": (settings.T - t + 1) * guided + pre, "backward": guided + pre, "decode": 1, "reward": 1}
