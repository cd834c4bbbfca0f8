"""DGPO, Direct Group Preference Optimization, on the forward process. Advantage Weighted Matching is a setting of it.

"Reinforcing Diffusion Models by Direct Group Preference Optimization", 2025, arXiv 2510.08425, by Yihong Luo, Tianyang
Hu and Jing Tang.
"Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", 2025, arXiv 2509.25050, by Shuchen Xue
and others: objective = "awm".

Idea: draw a group of images for each prompt with any sampler, and let the good ones together be preferred over the bad
ones, as DPO prefers one image over another. No likelihoods, no trajectories: the implicit reward of an image is how
much better than the reference the network denoises it.

    A_i          = (R_i - mean R) / std R   over the group, clipped                    `rewards.groups.standard_scores`
    x_t          = alpha x0 + sigma eps,  v = eps - x0
    d_i          = |v_theta(x_t) - v|^2,   mean over the elements                      `matching_error`
    loss         = -log sigmoid(-beta mean_i A_i (d_i - d_i^ref))      per group       `group_loss`
                   + kl |v_theta - v_ref|^2
    awm          = beta/2 mean_i A_i (d_i - d_i^ref): the sigmoid's weight held at the 1/2 where it starts
    power        : t d^power / power in place of d, so that large errors pull less    `weighed` (AWM's program: .25)
    kl_old       : + kl_old |v_theta - v_old|^2, a trust region about the old weights (AWM's program: 1)

The advantages of a group add up to 0, so the intractable normaliser of the implicit rewards cancels. With two images
A = 1, -1 and DGPO is Diffusion-DPO with the same beta, on velocities. A sample whose error has moved past `clip`
against the old weights in the direction of its advantage has no gradient, as in PPO:

    rho_i        = exp(d_i^old - d_i);  no gradient where A > 0 and rho > 1 + clip, or A < 0 and rho < 1 - clip
    theta_old   <- eta_i theta_old + (1 - eta_i) theta,  eta_i = min(old_rate i, old_most)       `old_decay`

Groups: the loop gives B prompts; `step` repeats each `group` times. Image k of sample id i has the id i * group + k.

Deviations from the papers and their programs:
- Times are uniform in `times` (then shifted), n for each image in one update, where DGPO's program takes the sampler's
  own steps and makes an update for each. A group shares time and noise, as there.
- The policy draws the images. DGPO's program has its old weights draw them from update 200 or 500 on.
- AWM's policy loss is -A rho with a clip of 1, which never acts; its gradient on policy is that of "awm" with beta = 2,
  or .4 where its program divides the clipped advantages by 5. Its solver is SA-Solver; ours is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.algorithms.snapshot import sharded_like, taken, using
from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.path import Prediction, add_noise
from palate.rewards.groups import standard_scores
from palate.sampling import sample, shift_time, state_kind

TINY = 1e-10  # keeps the slope of d^power finite at 0; AWM's program has the same


@dataclass(frozen=True)
class DGPOSettings:
    """Hyperparameters of DGPO, with the paper's symbols and defaults."""

    group: int = 24  # images per prompt
    steps: int = 10  # of sampling while training
    guidance: float = 4.5  # of sampling; the trained forward has none
    shift: float = 3.0  # of the sampling grid and of the trained times
    n: int = 4  # trained times per image
    times: tuple[float, float] = (0.0, 1.0)  # ends of the trained times, after the shift (the program: about .4 to 1)
    objective: Literal["dgpo", "awm"] = "dgpo"
    beta: float = 100.0  # the program's; 10 to 100 with a frozen reference, 2000 to 5000 with the old weights
    reference: Literal["frozen", "old"] = "frozen"  # whose error is subtracted
    baseline: Literal["group", "batch"] = "group"  # whose standard deviation divides
    advantage_clip: float = 5.0
    clip: float | None = 1e-3  # of exp(d_old - d); the program: 1e-5 with guidance 1. None skips the old weights' call
    kl: float = 1e-3  # weight of |v_theta - v_ref|^2
    kl_guidance: float = 1.0  # of v_ref in it
    kl_old: float = 0.0  # weight of |v_theta - v_old|^2 (AWM's program: 1)
    power: float | None = None  # t d^power / power in place of d (AWM's program: .25); None = d itself
    old_rate: float = 0.001  # eta_i = min(old_rate i, old_most): how slowly the old weights follow
    old_most: float = 0.3
    shared_noise: bool = True  # a group's images are noised alike
    shared_time: bool = True  # and at the same times

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(self.times))
        require(
            self,
            ("group: at least 2, because its images are compared with each other", self.group < 2),
            ("steps: at least 1", self.steps < 1),
            ("shift: above 0", not self.shift > 0),
            ("n: at least 1", self.n < 1),
            (
                "times: (low, high) with 0 <= low < high <= 1",
                len(self.times) != 2 or not 0 <= self.times[0] < self.times[1] <= 1,
            ),
            ("objective: 'dgpo' or 'awm'", self.objective not in ("dgpo", "awm")),
            ("beta: above 0", not self.beta > 0),
            ("reference: 'frozen' or 'old'", self.reference not in ("frozen", "old")),
            ("baseline: 'group' or 'batch'", self.baseline not in ("group", "batch")),
            ("advantage_clip: above 0", not self.advantage_clip > 0),
            ("clip: above 0, or null for none", self.clip is not None and not self.clip > 0),
            ("kl: at least 0", not self.kl >= 0),
            ("kl_old: at least 0", not self.kl_old >= 0),
            ("power: above 0 and at most 1, or null", self.power is not None and not 0 < self.power <= 1),
            ("old_rate: at least 0", not self.old_rate >= 0),
            ("old_most: at least 0 and below 1", not 0 <= self.old_most < 1),
        )


class DGPO:
    """Its state is theta_old, a copy of the policy's trainable parameters, where the settings need one."""

    trains = ("policy",)
    injects_noise = True  # into finished images, for the trained forward
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: DGPOSettings):
        self.settings = settings
        self.old: list[Tensor] | None = None  # None = still the policy

    def state_dict(self) -> dict[str, Any]:
        return {"old": self.old}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old = None if state["old"] is None else [tensor.clone() for tensor in state["old"]]

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """Draw a group for each prompt with the policy, then one update over n times per image."""
        s, parameters = self.settings, model.parameters("policy")
        if needs_old(s):
            self.old = taken(parameters) if self.old is None else sharded_like(self.old, parameters)
        prompts = [prompt for prompt in batch.prompts for _ in range(s.group)]
        images_rng = rng.grouped(s.group)
        noise = images_rng.normal("rollout", model.latent_shape).to(**state_kind(model))
        with torch.no_grad():
            cond = model.encode_prompts(prompts)
            x0 = sample(model, cond, noise, s.steps, guidance=s.guidance, shift=s.shift)
            rewards = reward(model.decode(x0), prompts).detach()
        advantages = standard_scores(rewards, s.group, baseline=s.baseline)
        advantages = advantages.clamp(-s.advantage_clip, s.advantage_clip).to(x0)
        reward_std = rewards.view(-1, s.group).std(1, correction=0).mean()
        for j in range(s.n):
            u = 1 - (rng if s.shared_time else images_rng).uniform(f"level-{j}")  # in (0, 1]
            eps = (rng if s.shared_noise else images_rng).normal(f"inject-{j}", model.latent_shape)
            u = u.repeat_interleave(s.group) if s.shared_time else u
            eps = (eps.repeat_interleave(s.group, 0) if s.shared_noise else eps).to(x0)
            t = between(s.times, shift_time(u, s.shift)).to(x0)
            value, metrics = self._loss(model, x0, eps, t, cond, advantages)
            metrics |= {"reward": rewards.mean(), "reward_std": reward_std}
            yield Loss(value / s.n, metrics, "policy" if j == s.n - 1 else None)
        if self.old is not None:
            decay = old_decay(rng.step, s.old_rate, s.old_most)
            with torch.no_grad():
                self.old = [p + decay * (old.to(p) - p) for old, p in zip(self.old, parameters, strict=True)]

    def _loss(
        self, model: Model, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s, target = self.settings, eps - x0
        xt = add_noise(x0, eps, *model.schedule(t))
        with torch.no_grad():  # before the policy's call: the graph must not see weights change
            v_ref = v_old = v_kl = target
            if s.reference == "frozen":
                v_ref = velocity(model.predict(xt, t, cond, weights="reference"))
            if s.kl and not (s.reference == "frozen" and s.kl_guidance == 1):
                v_kl = velocity(model.predict(xt, t, cond, guidance=s.kl_guidance, weights="reference"))
            elif s.kl:
                v_kl = v_ref
            with using(model.parameters("policy"), self.old) if self.old is not None else nullcontext():
                if self.old is not None:
                    v_old = velocity(model.predict(xt, t, cond))
            v_ref = v_old if s.reference == "old" else v_ref
        v_theta = velocity(model.predict(xt, t, cond))
        error, before = (weighed(matching_error(v, target), t, s.power) for v in (v_theta, v_ref))
        metrics = {"error": error.mean(), "implicit_reward": (before - error).mean()}
        if s.clip is not None:
            stopped = past_clip(error, weighed(matching_error(v_old, target), t, s.power), advantages, s.clip)
            error = torch.where(stopped, error.detach(), error)
            metrics["clipped"] = stopped.double().mean()
        value, weight = group_loss(error, before, advantages, s.beta, s.group, s.objective)
        metrics["weight"] = weight.mean()
        if s.kl:
            metrics["kl"] = apart = (v_theta - v_kl).square().mean()
            value = value + s.kl * apart
        if s.kl_old:
            metrics["kl_old"] = moved = (v_theta - v_old).square().mean()
            value = value + s.kl_old * moved
        return value, {name: number.detach() for name, number in metrics.items()}


def needs_old(settings: DGPOSettings) -> bool:
    """Whether an update asks the policy from before it: for the clip, the trust region, or as the reference."""
    return settings.clip is not None or settings.reference == "old" or settings.kl_old > 0


# The equations


def velocity(pred: Prediction) -> Tensor:
    """eps - x0."""
    return pred.eps - pred.x0


def matching_error(v: Tensor, target: Tensor) -> Tensor:
    """d = mean |v - target|^2, (B,)."""
    return (v - target).square().flatten(1).mean(1)


def weighed(error: Tensor, t: Tensor, power: float | None) -> Tensor:
    """t d^power / power, (B,): the generalised Huber form of AWM's program; d itself for None."""
    return error if power is None else t.to(error) * (error + TINY) ** power / power


def group_loss(
    error: Tensor, reference: Tensor, advantages: Tensor, beta: float, group: int, objective: str = "dgpo"
) -> tuple[Tensor, Tensor]:
    """The mean over groups of -log sigmoid(-beta mean_i A_i (d_i - d_i^ref)), or of its first order "awm"; and the
    weights of the groups, (B,): 1/2 at the reference, near 0 where the group is told apart already."""
    mean = (advantages * (error - reference)).view(-1, group).mean(1)
    weight = torch.sigmoid(beta * mean).detach()
    if objective == "awm":
        return (beta / 2 * mean).mean(), torch.full_like(weight, 0.5)
    return -F.logsigmoid(-beta * mean).mean(), weight


def past_clip(error: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether exp(d_old - d) is past the clip in the direction of A, (B,)."""
    rho = (old - error).detach().exp()
    return torch.where(advantages > 0, rho > 1 + clip, rho < 1 - clip)


def between(ends: tuple[float, float], u: Tensor) -> Tensor:
    """u in (0, 1] carried to (low, high]."""
    return ends[0] + (ends[1] - ends[0]) * u


def old_decay(step: int, rate: float, most: float) -> float:
    """eta_i = min(rate i, most)."""
    return min(rate * step, most)


def calls_per_update(settings: DGPOSettings) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice.

    forward = group (steps g + n (1 + reference + kl + old)),  backward = group n,  decode = reward = group; the
    reference's call serves kl too unless kl_guidance is not 1.
    """
    s = settings
    own = s.reference == "frozen"
    of_kl = 0 if not s.kl or (own and s.kl_guidance == 1) else (1 if s.kl_guidance == 1 else 2)
    each = 1 + int(own) + of_kl + int(needs_old(s))
    forward = s.steps * (1 if s.guidance == 1 else 2) + s.n * each
    return {"forward": s.group * forward, "backward": s.group * s.n, "decode": s.group, "reward": s.group}
