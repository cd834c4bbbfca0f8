"""Flow-GRPO: group-relative policy optimisation of flow and diffusion models. DanceGRPO and MixGRPO are settings of it.

"Flow-GRPO: Training Flow Matching Models via Online RL", 2025, arXiv 2505.05470, by Jie Liu, Gongye Liu, Jiajun Liang,
Yangguang Li, Jiaheng Liu, Xintao Wang, Pengfei Wan, Di Zhang and Wanli Ouyang.
"DanceGRPO: Unleashing GRPO on Visual Generation", 2025, arXiv 2505.07818, by Zeyue Xue and others: recipe
dance-grpo-emoji (one initial noise a group, a random share of the steps trained, no KL).
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

Deviations from the papers and their programs:
- The transition is `sampling.stochastic_step`, which keeps the marginals at any step length. For short steps its eta
  is the paper's noise level a through eta = a / sqrt(2): a = .7 is eta = .5. (Flow-GRPO and DanceGRPO take
  Euler-Maruyama steps with noise a sqrt(t / (1 - t)) sqrt(dt) and a sqrt(dt): the marginals hold only for dt -> 0.)
- The step to t = 0 adds no noise, so it has no density and is not trained.
- density = "per_element" divides log-densities and KL by the number of latent elements, as the programs do, and
  the small clip and beta belong to that; "joint" is what the papers write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from palate.core import Batch, Cond, Loss, Model, Random, Reward
from palate.path import move
from palate.runtime.errors import InputError
from palate.sampling import Transition, log_prob, state_kind, stochastic_step, time_grid, transition_std


@dataclass(frozen=True)
class FlowGRPOSettings:
    group: int = 24  # images per prompt
    steps: int = 10  # of sampling while training
    eta: float = 0.5  # the paper's a = .7
    guidance: float = 4.5
    shift: float = 3.0
    same_noise: bool = False  # one initial noise for a group (DanceGRPO)
    fraction: float = 1.0  # share of the random steps that is trained, drawn anew each step (DanceGRPO: .6)
    window: int | None = None  # steps with noise; the others are deterministic (MixGRPO: 4). None = all
    window_every: int = 25  # training steps until the window moves one towards low noise; at the end it starts again
    baseline: Literal["group", "batch"] = "group"  # whose standard deviation divides; the mean is always the group's
    advantage_clip: float = 5.0
    clip: float = 1e-4
    beta: float = 0.04  # weight of the KL to the reference; 0 skips its network calls
    density: Literal["per_element", "joint"] = "per_element"
    minibatches: int = 1  # updates per batch of samples

    def __post_init__(self) -> None:
        for problem, wrong in (
            ("group: at least 2, because its images are compared with each other", self.group < 2),
            ("steps: at least 2, because the last one adds no noise", self.steps < 2),
            ("eta: above 0 and at most 1", not 0 < self.eta <= 1),
            ("shift: above 0", not self.shift > 0),
            ("fraction: above 0 and at most 1", not 0 < self.fraction <= 1),
            (
                "window: between 1 and steps - 1, or null for all steps",
                self.window is not None and not 1 <= self.window < self.steps,
            ),
            ("window_every: at least 1", self.window_every < 1),
            ("baseline: 'group' or 'batch'", self.baseline not in ("group", "batch")),
            ("advantage_clip: above 0", not self.advantage_clip > 0),
            ("clip: above 0", not self.clip > 0),
            ("beta: at least 0", not self.beta >= 0),
            ("density: 'per_element' or 'joint'", self.density not in ("per_element", "joint")),
            ("minibatches: between 1 and group", not 1 <= self.minibatches <= self.group),
        ):
            if wrong:
                name = problem.split(":")[0]
                raise InputError(f"FlowGRPOSettings expected {problem}; got {name} = {getattr(self, name)!r}")


class FlowGRPO:
    trains = ("policy",)

    def __init__(self, settings: FlowGRPOSettings):
        self.settings = settings

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """Draw a group for each prompt, then one update a minibatch; each trained step is its own backward."""
        s = self.settings
        prompts = [prompt for prompt in batch.prompts for _ in range(s.group)]
        images_rng = Random(rng.seed, rng.step, [i * s.group + k for i in rng.ids for k in range(s.group)])
        shared = rng if s.same_noise else None
        with torch.no_grad():
            x0, path = rollout(model, model.encode_prompts(prompts), images_rng, shared, s)
            rewards = reward(model.decode(x0), prompts).detach()
        advantages = group_advantages(rewards, s.group, s.baseline).clamp(-s.advantage_clip, s.advantage_clip)
        path = [path[i] for i in trained_steps(len(path), s.fraction, rng)]
        spread = rewards.view(-1, s.group).std(1, correction=0).mean()
        for part in range(s.minibatches):
            chosen = torch.arange(part, len(rewards), s.minibatches, device=x0.device)
            with torch.no_grad():
                cond = model.encode_prompts([prompts[int(i)] for i in chosen])
            for number, drawn in enumerate(path):
                now = drawn.rows(chosen)
                value, metrics = self._loss(model, now, cond, advantages[chosen])
                metrics |= {"reward": rewards.mean(), "reward_std": spread}
                yield Loss(value / len(path), metrics, "policy" if number == len(path) - 1 else None)

    def _loss(self, model: Model, now: Transition, cond: Cond, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        elements = now.x[0].numel() if s.density == "per_element" else 1
        if s.beta:
            with torch.no_grad():  # before the policy's call: a switch of adapters after it would lose its gradient
                reference, _ = transition(model, now.x, now.t, now.t_next, cond, s, weights="reference")
        mean, std = transition(model, now.x, now.t, now.t_next, cond, s)
        rho = ratio(log_prob(now.x_next, mean, std), now.log_prob, elements)
        value = clipped_loss(rho, advantages, s.clip)
        metrics = {"ratio": rho.mean(), "clipped": ((rho - 1).abs() > s.clip).double().mean()}
        if s.beta:
            apart = kl(mean, reference, std).mean() / elements
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


def trained_steps(count: int, fraction: float, rng: Random) -> list[int]:
    """Which of `count` random steps are trained: ceil(fraction count) of them, ascending, the same on every rank."""
    left = list(range(count))
    while len(left) > math.ceil(fraction * count - 1e-9):
        del left[rng.shared_integer(f"leave-out-{len(left)}", 0, len(left) - 1)]
    return left


def rollout(
    model: Model, cond: Cond, rng: Random, shared: Random | None, settings: FlowGRPOSettings
) -> tuple[Tensor, list[Transition]]:
    """Clean latents (N, C, h, w) and the random transitions on the way. Run it under no_grad.

    `rng` has one id an image. `shared`, if given, has one id a group, and draws the initial noise of all its images.
    """
    s = settings
    if shared is None:
        noise = rng.normal("rollout", model.latent_shape)
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
        std = transition_std(*model.schedule(t), *following, s.eta)
        x_next = stochastic_step(pred, *following, std, rng.normal(f"sde-{i}", model.latent_shape).to(x))
        path.append(Transition(x, x_next, t, t_next, log_prob(x_next, move(pred, *following, std), std)))
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
    following = model.schedule(t_next)
    std = transition_std(*model.schedule(t), *following, settings.eta)
    pred = model.predict(x, t, cond, guidance=settings.guidance, weights=weights)
    return move(pred, *following, std), std


# The equations


def group_advantages(rewards: Tensor, group: int, baseline: str = "group") -> Tensor:
    """(R - mean R) / std R with rewards (B * group,), a group's images in a row; 0 in a group of equal rewards.

    The mean is the group's; the standard deviation is the group's or, with baseline "batch", that of all rewards.
    """
    grouped = rewards.view(-1, group)
    grouped = grouped - grouped[:, :1]  # equal rewards become exact zeros; their mean would be rounded
    centred = grouped - grouped.mean(1, keepdim=True)
    scale = grouped.std(1, correction=0, keepdim=True) if baseline == "group" else rewards.std(correction=0)
    return (centred / (scale + 1e-8)).flatten()


def ratio(log_prob_now: Tensor, log_prob_old: Tensor, elements: int) -> Tensor:
    """rho (N,): exp of the difference of log-densities over `elements` (1 = the joint density)."""
    return ((log_prob_now - log_prob_old) / elements).exp()


def clipped_loss(rho: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-mean min(rho A, clip(rho, 1 - clip, 1 + clip) A): no gradient once rho is past the clip in A's direction."""
    advantages = advantages.to(rho)
    return -torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages).mean()


def kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2 I) | N(reference, std^2 I)) in nats, (N,)."""
    return ((mean - reference) ** 2 / (2 * std**2)).flatten(1).sum(1)


def calls_per_update(settings: FlowGRPOSettings) -> dict[str, int]:
    """Denoiser evaluations of one step (= `minibatches` updates) per prompt of the batch, a guided call counted twice.

    With r random steps of which m = ceil(fraction r) are trained: backward = group m g,
    forward = group (steps + m (2 with beta, else 1)) g,  decode = reward = group,  g = 2 with guidance, else 1.
    """
    s = settings
    trained = math.ceil(s.fraction * len(random_steps(s, 1)) - 1e-9)
    each = s.group * (1 if s.guidance == 1 else 2)
    return {
        "forward": each * (s.steps + trained * (2 if s.beta else 1)),
        "backward": each * trained,
        "decode": s.group,
        "reward": s.group,
    }
