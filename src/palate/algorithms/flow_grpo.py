"""Flow-GRPO: group-relative policy optimisation of flow and diffusion models. DanceGRPO and MixGRPO are settings of it.

"Flow-GRPO: Training Flow Matching Models via Online RL", 2025, arXiv 2505.05470, by Jie Liu, Gongye Liu, Jiajun Liang,
Yangguang Li, Jiaheng Liu, Xintao Wang, Pengfei Wan, Di Zhang and Wanli Ouyang.
"DanceGRPO: Unleashing GRPO on Visual Generation", 2025, arXiv 2505.07818, by Zeyue Xue and others: recipe
dance-grpo-emoji (one initial noise per group, a random share of the steps trained, no KL).
"MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE", 2025, arXiv 2507.21802, by Junzhe Li and others:
recipe mix-grpo-emoji (noise and training only in a window of steps that slides from high to low noise).

Idea: draw a group of images for each prompt with a stochastic sampler and compare them with each other; the group's
mean is the baseline, so no value network and no gradient of the reward is needed.

    p_theta(x_next | x_t, c) = N(mean_theta(x_t, c), std_t^2 I)                        `transition`
    A_i          = (R_i - mean R) / std R   over the group                             `group_advantages`
    rho_t        = p_theta(x_next | x_t, c) / p_old(x_next | x_t, c)                   `ratio`
    KL_t         = |mean_theta - mean_ref|^2 / (2 std_t^2)                             `kl`
    loss         = E mean_t [-min(rho_t A, clip(rho_t, 1 - clip, 1 + clip) A) + beta KL_t]

Groups: the loop gives B prompts; `step` repeats each `group` times. Image k of sample id i has the id i * group + k,
from which alone its random numbers come; so a batch draws B * group images and a group never crosses ranks.

Safeguards of later papers, each a setting, off by default:
    trust = "kl"        the gradient is blocked where KL(p_theta | p_old) > kl_limit and the update would move further
                        away, in place of the clip: Flow-DPPO, arXiv 2606.11025               `divergence_mask`
    ratio = "guard"     log rho + KL(p_theta | p_old), times std, and the loss divided by t - t_next: every step has the
                        same mean ratio 1 and the same gradient: GRPO-Guard, arXiv 2510.22319 `guarded_ratio`
    noise               "coefficients" is Flow-CPS, arXiv 2509.05952                          `sampling.random_step`
    per_reward          each part of reward.weights is standardised by itself: GDPO, arXiv 2601.05242
    compare             "win_rate" inside the group in place of the reward: Pref-GRPO, arXiv 2508.20751

Deviations from the papers and their programs, with the setting that repeats the program:
- noise = "posterior" keeps the marginals at any step length. Flow-GRPO and DanceGRPO take Euler-Maruyama steps
  ("flow_sde", "constant_sde"), which do so only for short ones. `sampling.eta_of_noise_level` relates the two.
- The step to t = 0 adds no noise, so it has no density and is not trained. (In the programs it adds noise.)
- density = "per_element" divides log-densities and KL by the number of latent elements, as the programs do, and
  the small clip and beta belong to that; "joint" is what the papers write.
- Flow-GRPO's program leaves the time step out of the KL: kl_unit = "released". Its .04 is .04 (t - t_next) of "exact".
- DanceGRPO: unbiased = True, fraction_rounding = "down", steps_per = "sample". Its images all share their
  first noise (same_noise = "all"), MixGRPO's those of a group.
- Flow-GRPO's SD3 configurations: baseline = "batch", minibatches = 2. With one update per batch of samples every ratio
  is 1, and the clip never acts.
- Rewards that are equal up to rounding give exactly no update; the programs divide the rounding by 1e-4 or 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.path import move
from palate.rewards.combine import parts_of
from palate.rewards.groups import decoupled, standard_scores, win_rate
from palate.runtime.errors import InputError
from palate.sampling import Noise, Transition, log_prob, random_step, state_kind, time_grid


@dataclass(frozen=True)
class FlowGRPOSettings:
    """Hyperparameters of Flow-GRPO, DanceGRPO and MixGRPO, with Flow-GRPO's defaults."""

    group: int = 24  # images per prompt
    steps: int = 10  # of sampling while training
    eta: float = 0.5  # the paper's a = .7 for short steps (`sampling.eta_of_noise_level`)
    guidance: float = 4.5
    shift: float = 3.0
    noise: Noise = "posterior"  # what a random step adds; eta is then its level (`sampling.random_step`)
    same_noise: bool | Literal["all"] = False  # one initial noise for a group (MixGRPO); all: of a step (DanceGRPO)
    fraction: float = 1.0  # share of the random steps that is trained, drawn anew each step (DanceGRPO: .6)
    fraction_rounding: Literal["up", "down"] = "up"  # of fraction times the random steps (DanceGRPO: down)
    steps_per: Literal["batch", "sample"] = "batch"  # whether the images share the trained steps (DanceGRPO: sample)
    window: int | None = None  # steps with noise; the others are deterministic (MixGRPO: 4). None = all
    window_every: int = 25  # training steps until the window moves one towards low noise; at the end it starts again
    baseline: Literal["group", "batch"] = "group"  # whose standard deviation divides; the mean is always the group's
    unbiased: bool = False  # standard deviation with n - 1 (DanceGRPO)
    compare: Literal["reward", "win_rate"] = "reward"  # what is compared inside a group (Pref-GRPO: win_rate)
    per_reward: bool = False  # standardise each part of reward.weights by itself (GDPO)
    advantage_clip: float = 5.0
    ratio: Literal["plain", "guard"] = "plain"  # GRPO-Guard: guard
    trust: Literal["clip", "kl"] = "clip"  # what stops a step that went too far (Flow-DPPO: kl)
    clip: float = 1e-4
    kl_limit: float = 1e-6  # of trust = "kl", in the unit of `density`; Flow-DPPO's program
    beta: float = 0.04  # weight of the KL to the reference; 0 skips its network calls
    kl_unit: Literal["exact", "released"] = "exact"  # released: times the length of the time step, as Flow-GRPO's
    density: Literal["per_element", "joint"] = "per_element"
    minibatches: int = 1  # updates per batch of samples

    def __post_init__(self) -> None:
        require(
            self,
            ("group: at least 2, because its images are compared with each other", self.group < 2),
            ("steps: at least 2, because the last one adds no noise", self.steps < 2),
            (
                "eta: above 0, and at most 1 with noise = 'posterior' or 'coefficients'",
                not self.eta > 0 or (self.eta > 1 and self.noise in ("posterior", "coefficients")),
            ),
            (
                "noise: 'posterior', 'coefficients', 'flow_sde' or 'constant_sde'",
                self.noise not in ("posterior", "coefficients", "flow_sde", "constant_sde"),
            ),
            ("shift: above 0", not self.shift > 0),
            ("same_noise: true, false or 'all'", self.same_noise not in (True, False, "all")),
            ("fraction: above 0 and at most 1", not 0 < self.fraction <= 1),
            (
                "window: between 1 and steps - 1, or null for all steps",
                self.window is not None and not 1 <= self.window < self.steps,
            ),
            ("window_every: at least 1", self.window_every < 1),
            ("baseline: 'group' or 'batch'", self.baseline not in ("group", "batch")),
            ("fraction_rounding: 'up' or 'down'", self.fraction_rounding not in ("up", "down")),
            ("steps_per: 'batch' or 'sample'", self.steps_per not in ("batch", "sample")),
            ("compare: 'reward' or 'win_rate'", self.compare not in ("reward", "win_rate")),
            (
                "compare: 'reward' with per_reward, which compares the parts of the reward",
                self.per_reward and self.compare != "reward",
            ),
            ("ratio: 'plain' or 'guard'", self.ratio not in ("plain", "guard")),
            ("trust: 'clip' or 'kl'", self.trust not in ("clip", "kl")),
            ("kl_limit: above 0", not self.kl_limit > 0),
            ("kl_unit: 'exact' or 'released'", self.kl_unit not in ("exact", "released")),
            ("advantage_clip: above 0", not self.advantage_clip > 0),
            ("clip: above 0", not self.clip > 0),
            ("beta: at least 0", not self.beta >= 0),
            ("density: 'per_element' or 'joint'", self.density not in ("per_element", "joint")),
            ("minibatches: between 1 and group", not 1 <= self.minibatches <= self.group),
        )
        count = len(random_steps(self, 1))
        if trained_count(count, self.fraction, self.fraction_rounding) < 1:
            raise InputError(
                f"FlowGRPOSettings expected fraction: at least 1 / {count}, so that a random step is left to train; "
                f"got fraction = {self.fraction}"
            )


class FlowGRPO:
    """Group-relative policy gradient on a stochastic flow sampler; `core.Algorithm`."""

    trains = ("policy",)
    injects_noise = True  # between the steps of a rollout
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: FlowGRPOSettings):
        self.settings = settings

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """Draw a group for each prompt, then one update a minibatch; each trained step is its own backward."""
        s = self.settings
        prompts = [prompt for prompt in batch.prompts for _ in range(s.group)]
        images_rng = rng.grouped(s.group)
        shared = rng if s.same_noise else None
        with torch.no_grad():
            x0, path = rollout(model, model.encode_prompts(prompts), images_rng, shared, s)
            images = model.decode(x0)
            parts = parts_of(reward, images, prompts) if s.per_reward else {"reward": (1.0, reward(images, prompts))}
        rewards = torch.stack([weight * part.detach() for weight, part in parts.values()]).sum(0)
        advantages = self._advantages(parts, rewards).clamp(-s.advantage_clip, s.advantage_clip)
        if s.steps_per == "sample":
            path = own_steps(path, trained_count(len(path), s.fraction, s.fraction_rounding), images_rng)
        else:
            path = [path[i] for i in trained_steps(len(path), s.fraction, rng, s.fraction_rounding)]
        reward_std = rewards.view(-1, s.group).std(1, correction=0).mean()
        for part in range(s.minibatches):
            chosen = torch.arange(part, len(rewards), s.minibatches, device=x0.device)
            with torch.no_grad():
                cond = model.encode_prompts([prompts[int(i)] for i in chosen])
            for number, drawn in enumerate(path):
                now = drawn.rows(chosen)
                value, metrics = self._loss(model, now, cond, advantages[chosen])
                metrics |= {"reward": rewards.mean(), "reward_std": reward_std}
                yield Loss(value / len(path), metrics, "policy" if number == len(path) - 1 else None)

    def _advantages(self, parts: dict[str, tuple[float, Tensor]], rewards: Tensor) -> Tensor:
        s = self.settings
        if s.per_reward:
            return decoupled({n: (w, p.detach()) for n, (w, p) in parts.items()}, s.group, unbiased=s.unbiased)
        values = win_rate(rewards, s.group) if s.compare == "win_rate" else rewards
        return group_advantages(values, s.group, s.baseline, unbiased=s.unbiased)

    def _loss(self, model: Model, now: Transition, cond: Cond, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        elements = now.x[0].numel() if s.density == "per_element" else 1
        if s.beta:
            with torch.no_grad():  # before the policy's call: a switch of adapters after it would lose its gradient
                reference, _ = transition(model, now.x, now.t, now.t_next, cond, s, weights="reference")
        mean, std = transition(model, now.x, now.t, now.t_next, cond, s)
        length = (now.t - now.t_next).to(mean)
        now_log_prob = log_prob(now.x_next, mean, std)
        # KL(p_theta | p_old), where a setting reads it
        moved = torch.zeros_like(now_log_prob) if now.mean is None else kl(mean, now.mean, std)
        if s.ratio == "guard":
            rho = guarded_ratio(now_log_prob, now.log_prob, moved, std, elements)
            advantages = advantages / length
        else:
            rho = ratio(now_log_prob, now.log_prob, elements)
        metrics = {"ratio": rho.mean()}
        if s.trust == "kl":
            kept = divergence_mask(rho, advantages, moved / elements, s.kl_limit)
            value = -(kept * rho * advantages.to(rho)).mean()
            metrics["masked"] = 1 - kept.mean()
        else:
            value = clipped_loss(rho, advantages, s.clip)
            metrics["clipped"] = ((rho - 1).abs() > s.clip).double().mean()
        if s.trust == "kl" or s.ratio == "guard":
            metrics["kl_old"] = moved.mean() / elements
        if s.beta:
            unit = length if s.kl_unit == "released" else 1.0
            apart = (unit * kl(mean, reference, std)).mean() / elements
            value, metrics["kl"] = value + s.beta * apart, apart
        return value, {name: number.detach() for name, number in metrics.items()}


# The Markov decision process


def random_steps(settings: FlowGRPOSettings, step: int) -> range:
    """The sampling steps that add noise in this step of training (1, 2, ...): all but the last, or MixGRPO's window."""
    s = settings
    if s.window is None:
        return range(s.steps - 1)
    first = (step - 1) // s.window_every % (s.steps - s.window)
    return range(first, first + s.window)


def trained_count(count: int, fraction: float, rounding: str = "up") -> int:
    """fraction times `count` random steps, rounded up or down."""
    exact = fraction * count
    return math.ceil(exact - 1e-9) if rounding == "up" else math.floor(exact + 1e-9)


def trained_steps(count: int, fraction: float, rng: Random, rounding: str = "up") -> list[int]:
    """Which of `count` random steps are trained: `trained_count` of them, ascending, the same for every image and on
    every rank."""
    left, kept = list(range(count)), trained_count(count, fraction, rounding)
    while len(left) > kept:
        del left[rng.shared_integer(f"leave-out-{len(left)}", 0, len(left) - 1)]
    return left


def own_steps(path: list[Transition], kept: int, rng: Random) -> list[Transition]:
    """`kept` transitions in which each image has random steps of its own, without repetition (DanceGRPO)."""
    order = torch.stack([rng.uniform(f"step-order-{i}") for i in range(len(path))]).argsort(0)  # (steps, N)
    rows = torch.arange(order.shape[1], device=path[0].x.device)
    x, x_next, t, t_next, before = (torch.stack(part) for part in list(zip(*path, strict=True))[:5])
    means = [drawn.mean for drawn in path if drawn.mean is not None]

    def chosen(k: int) -> Transition:
        at = order[k].to(rows), rows
        mean = torch.stack(means)[at] if means else None
        return Transition(x[at], x_next[at], t[at], t_next[at], before[at], mean)

    return [chosen(k) for k in range(kept)]


def rollout(
    model: Model, cond: Cond, rng: Random, shared: Random | None, settings: FlowGRPOSettings
) -> tuple[Tensor, list[Transition]]:
    """Clean latents (N, C, h, w) and the random transitions on the way. Run it under no_grad.

    `rng` has one id per image. `shared`, if given, has one id per group, and draws the initial noise of all its images;
    with same_noise "all" one noise is that of every image of the step, on every rank.
    """
    s = settings
    if shared is None:
        noise = rng.normal("rollout", model.latent_shape)
    elif s.same_noise == "all":
        noise = shared.shared_normal("rollout", model.latent_shape).expand(len(rng.ids), -1, -1, -1)
    else:
        noise = shared.normal("rollout", model.latent_shape).repeat_interleave(s.group, 0)
    x = noise.to(**state_kind(model))
    times = time_grid(s.steps, shift=s.shift).to(x)
    path = []
    for i in range(s.steps):
        t, t_next = times[i].expand(len(x)), times[i + 1].expand(len(x))
        following = model.schedule(t_next)
        pred = model.predict(x, t, cond, guidance=s.guidance)
        if i not in random_steps(s, rng.step):
            x = move(pred, *following)
            continue
        mean, std = random_step(pred, model.schedule(t), following, s.eta, s.noise)
        x_next = mean + std * rng.normal(f"sde-{i}", model.latent_shape).to(x)
        kept = mean if s.trust == "kl" or s.ratio == "guard" else None
        path.append(Transition(x, x_next, t, t_next, log_prob(x_next, mean, std), kept))
        x = x_next
    return x, path


def transition(
    model: Model,
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    cond: Cond,
    settings: FlowGRPOSettings,
    *,
    weights: str = "policy",
) -> tuple[Tensor, Tensor]:
    """Mean (N, C, h, w) and standard deviation (N, 1, 1, 1) of p_theta(x_next | x)."""
    pred = model.predict(x, t, cond, guidance=settings.guidance, weights=weights)
    return random_step(pred, model.schedule(t), model.schedule(t_next), settings.eta, settings.noise)


# The equations


def group_advantages(rewards: Tensor, group: int, baseline: str = "group", *, unbiased: bool = False) -> Tensor:
    """(R - mean R) / std R with rewards (B * group,), a group's images in a row; 0 in a group of equal rewards.

    The mean is the group's; the standard deviation is the group's or, with baseline "batch", that of all rewards.
    """
    return standard_scores(rewards, group, baseline=baseline, unbiased=unbiased)


def ratio(log_prob_now: Tensor, log_prob_old: Tensor, elements: int) -> Tensor:
    """rho (N,): exp of the difference of log-densities over `elements` (1 = the joint density)."""
    return ((log_prob_now - log_prob_old) / elements).exp()


def guarded_ratio(log_prob_now: Tensor, log_prob_old: Tensor, moved: Tensor, std: Tensor, elements: int) -> Tensor:
    """rho (N,) of GRPO-Guard: exp(std (log p_theta - log p_old + KL(p_theta | p_old)) / elements).

    With x_next = mean_old + std z the exponent is z . (mean_theta - mean_old) / elements: mean 0 under the old policy
    at every step, where the plain log-ratio has the mean -KL and a standard deviation that grows as std shrinks.
    """
    return (std.flatten() * (log_prob_now - log_prob_old + moved) / elements).exp()


def divergence_mask(rho: Tensor, advantages: Tensor, moved: Tensor, limit: float) -> Tensor:
    """0 where KL(p_theta | p_old) > limit and the update would move further away (rho > 1 with A > 0, rho < 1 with
    A < 0), else 1; (N,), without gradient (Flow-DPPO)."""
    away = (rho - 1) * advantages.to(rho) > 0
    return (~(away & (moved > limit))).to(rho).detach()


def clipped_loss(rho: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-mean min(rho A, clip(rho, 1 - clip, 1 + clip) A): no gradient once rho is past the clip in A's direction."""
    advantages = advantages.to(rho)
    return -torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages).mean()


def kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2 I) | N(reference, std^2 I)) in nats, (N,)."""
    return ((mean - reference) ** 2 / (2 * std**2)).flatten(1).sum(1)


def calls_per_update(settings: FlowGRPOSettings) -> dict[str, int]:
    """Denoiser evaluations of one step (= `minibatches` updates) per prompt of the batch, a guided call counted twice.

    With m = `trained_count` trained steps: backward = group m g,
    forward = group (steps + m (2 with beta, else 1)) g,  decode = reward = group,  g = 2 with guidance, else 1.
    """
    s = settings
    trained = trained_count(len(random_steps(s, 1)), s.fraction, s.fraction_rounding)
    each = s.group * (1 if s.guidance == 1 else 2)
    return {
        "forward": each * (s.steps + trained * (2 if s.beta else 1)),
        "backward": each * trained,
        "decode": s.group,
        "reward": s.group,
    }
