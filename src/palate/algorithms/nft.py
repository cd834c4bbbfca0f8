"""DiffusionNFT, Negative-aware Fine-Tuning on the forward process.

"DiffusionNFT: Online Diffusion Reinforcement with Forward Process", 2025, arXiv 2509.16117, by Kaiwen Zheng, Huayu
Chen, Haotian Ye, Haoxiang Wang, Qinsheng Zhang, Kai Jiang, Hang Su, Stefano Ermon, Jun Zhu and Ming-Yu Liu.

Idea: no likelihoods and no trajectories. Noise the policy's own clean samples as in pre-training; pull the network
towards the good ones, and an implicit mirror image of it (about the old policy) towards the bad ones.

    r            = 1/2 + 1/2 clip((R - mean R) / z, -1, 1)    optimality probability   `optimality`
    x_t          = alpha x0 + sigma eps,  v = eps - x0        x0 drawn by v_old, any solver
    v+           = (1 - beta) v_old + beta v_theta            implicit positive        `mirrored`
    v-           = (1 + beta) v_old - beta v_theta            implicit negative
    loss         = E[r |v+ - v|^2 + (1 - r) |v- - v|^2] + kl |v_theta - v_ref|^2
    theta_old   <- eta_i theta_old + (1 - eta_i) theta        after i updates in all   `old_decay`

Where the loss is smallest, v_theta = v_old + (1 / beta) E[(2 r - 1)(v - v_old) | x_t], a guidance towards the good
samples; equal rewards (r = 1/2) change nothing.

Groups: the loop gives B prompts; `step` repeats each `group` times. Image k of sample id i has the id i * group + k.
A batch of samples serves `minibatches` updates, each of an equal part of every group. theta_old, which drew it and
which the policies are mirrored about, stays until the last of them.

Deviations from the paper:
- adaptive = True is its self-normalised x0 form of the square error, |x0+ - x0|^2 / stop_grad(mean |x0+ - x0|);
  False is the loss above. `velocity` is eps - x0 for every schedule, so it works for variance-preserving models.
- z is in units of the group's standard deviation of R, and the mean is the group's. The program: z = 5, and the
  standard deviation of all rewards (baseline = "batch": of a rank's own).
- Its policy loss is 5 / beta times ours, so its KL weight is ours times 5 / beta: `kl_of_released` converts.
- Times are uniform (then shifted), n for each image, where the program takes the sampler's own.
- The program draws the parts of its `minibatches` at random; here image k of a group is of part k mod minibatches.
- shared_noise, shared_time and stratified (Palate's) change the variance of the gradient and not its mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from palate.algorithms.snapshot import sharded_like, taken, using
from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.path import Prediction, add_noise, from_velocity
from palate.rewards.groups import differences, divided
from palate.sampling import sample, shift_time, state_kind


@dataclass(frozen=True)
class NFTSettings:
    """Hyperparameters of DiffusionNFT, with the paper's symbols and defaults."""

    group: int = 24  # images per prompt
    steps: int = 10  # of sampling while training
    guidance: float = 1.0  # of sampling; the trained forward has none
    shift: float = 3.0  # of the sampling grid and of the trained times
    n: int = 4  # trained times per image
    beta: float = 1.0  # how far the implicit policies are from the old one, for a given change: smaller = larger steps
    z: float = 1.0  # Z_c, in standard deviations of the rewards (the program: 5)
    baseline: Literal["group", "batch"] = "group"  # whose standard deviation that is (the program: batch)
    kl: float = 1e-4  # weight of |v_theta - v_ref|^2; 0 skips its network calls
    adaptive: bool = True
    old_rate: float = 0.001  # eta_i = min(old_rate * i, old_most); 0 = theta_old is the current policy
    old_most: float = 0.5
    old_from: int = 0  # updates before i begins to count; until then theta_old is the policy (the program's OCR: 75)
    minibatches: int = 1  # updates per batch of samples (the program's OCR run: 2)
    shared_noise: bool = False  # a group's images are noised alike
    shared_time: bool = False  # and at the same times
    stratified: bool = False  # times from equal parts of their distribution: no two images of a group in the same part

    later_keys: ClassVar[Mapping[str, int]] = {"minibatches": 1}  # than the first runs, and what those were

    def __post_init__(self) -> None:
        require(
            self,
            ("group: at least 2, because its images are compared with each other", self.group < 2),
            ("steps: at least 1", self.steps < 1),
            ("shift: above 0", not self.shift > 0),
            ("n: at least 1", self.n < 1),
            ("beta: above 0", not self.beta > 0),
            ("z: above 0", not self.z > 0),
            ("kl: at least 0", not self.kl >= 0),
            ("old_rate: at least 0", not self.old_rate >= 0),
            ("old_most: at least 0 and below 1", not 0 <= self.old_most < 1),
            ("old_from: at least 0", self.old_from < 0),
            (
                "minibatches: at least 1, and a divisor of group",
                self.minibatches < 1 or self.group % self.minibatches > 0,
            ),
            ("baseline: 'group' or 'batch'", self.baseline not in ("group", "batch")),
        )


class NFT:
    """Its state is theta_old, the weights that draw the samples: a copy of the policy's trainable parameters."""

    trains = ("policy",)
    injects_noise = True  # into finished images, for the trained forward
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: NFTSettings):
        self.settings = settings
        self.old: list[Tensor] | None = None  # None = still the policy

    def state_dict(self) -> dict[str, Any]:
        return {"old": self.old}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old = None if state["old"] is None else [tensor.clone() for tensor in state["old"]]

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """Draw a group for each prompt with theta_old; an update over n times per image for each minibatch; then move
        theta_old."""
        s = self.settings
        parameters = model.parameters("policy")
        if self.old is None:
            self.old = taken(parameters)
        self.old = sharded_like(self.old, parameters)
        prompts = [prompt for prompt in batch.prompts for _ in range(s.group)]
        of_groups = rng
        rng = rng.grouped(s.group)
        noise = rng.normal("rollout", model.latent_shape).to(**state_kind(model))
        with torch.no_grad():
            cond = model.encode_prompts(prompts)
            with using(parameters, self.old):
                x0 = sample(model, cond, noise, s.steps, guidance=s.guidance, shift=s.shift)
            rewards = reward(model.decode(x0), prompts).detach()
        r = optimality(rewards, s.group, s.z, s.baseline)
        for part in range(s.minibatches):
            chosen = list(range(part, len(prompts), s.minibatches))
            if s.minibatches > 1:
                with torch.no_grad():
                    cond = model.encode_prompts([prompts[i] for i in chosen])
            for j in range(s.n):
                t = shift_time(1 - self._uniform(rng, of_groups, j), s.shift).to(x0)  # in (0, 1]
                eps = self._noise(model, rng, of_groups, j, chosen).to(x0)
                value, metrics = self._loss(model, x0[chosen], eps, t[chosen], cond, r.to(x0)[chosen])
                yield Loss(value / s.n, metrics | {"reward": rewards.mean()}, "policy" if j == s.n - 1 else None)
        decay = old_decay(rng.step * s.minibatches, s.old_rate, s.old_most, s.old_from)
        with torch.no_grad():
            self.old = [p + decay * (old.to(p) - p) for old, p in zip(self.old, parameters, strict=True)]

    def _noise(self, model: Model, rng: Random, of_groups: Random, j: int, chosen: list[int]) -> Tensor:
        """The j-th noise of each chosen image, (len(chosen), C, h, w)."""
        if self.settings.shared_noise:
            of_each = of_groups.normal(f"inject-{j}", model.latent_shape)
            return of_each[[i // self.settings.group for i in chosen]]
        return Random(rng.seed, rng.step, [rng.ids[i] for i in chosen]).normal(f"inject-{j}", model.latent_shape)

    def _uniform(self, rng: Random, of_groups: Random, j: int) -> Tensor:
        """The j-th of n uniform numbers in [0, 1) of each image, (B * group,)."""
        s = self.settings
        if s.shared_time:
            u = of_groups.uniform(f"level-{j}")
            return ((j + u) / s.n if s.stratified else u).repeat_interleave(s.group)
        u = rng.uniform(f"level-{j}")
        return stratified(u, rng.uniform(f"cell-{j}"), s.group, j, s.n) if s.stratified else u

    def _loss(
        self, model: Model, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, r: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        assert self.old is not None, "set at the beginning of the step"
        alpha, sigma = model.schedule(t)
        xt = add_noise(x0, eps, alpha, sigma)
        with torch.no_grad():  # before the policy's call: the graph must not see weights change
            with using(model.parameters("policy"), self.old):
                v_old = velocity(model.predict(xt, t, cond))
            v_ref = velocity(model.predict(xt, t, cond, weights="reference")) if s.kl else v_old
        v_theta = velocity(model.predict(xt, t, cond))
        errors = []
        for v in mirrored(v_theta, v_old, s.beta):
            if s.adaptive:
                errors.append(self_normalised(from_velocity(xt, v, alpha, sigma).x0, x0))
            else:
                errors.append((v - (eps - x0)).square().flatten(1).mean(1))
        value = (r * errors[0] + (1 - r) * errors[1]).mean()
        metrics = {
            "positive": errors[0].mean(),
            "negative": errors[1].mean(),
            "from_old": (v_theta - v_old).square().mean(),
        }
        if s.kl:
            metrics["kl"] = apart = (v_theta - v_ref).square().mean()
            value = value + s.kl * apart
        return value, {name: number.detach() for name, number in metrics.items()}


# The equations


def optimality(rewards: Tensor, group: int, z: float, baseline: str = "group") -> Tensor:
    """r = 1/2 + 1/2 clip((R - mean R) / (z std R), -1, 1), (B * group,) in [0, 1]; 1/2 in a group of equal rewards.

    std R is the group's or, with baseline "batch", that of all rewards, as in the program.
    """
    apart = differences(rewards, group)
    centred = apart - apart.mean(1, keepdim=True)
    scale = apart.std(1, correction=0, keepdim=True) if baseline == "group" else rewards.std(correction=0)
    return (0.5 + 0.5 * divided(centred, z * scale).clamp(-1, 1)).flatten()


def velocity(pred: Prediction) -> Tensor:
    """eps - x0."""
    return pred.eps - pred.x0


def mirrored(v_theta: Tensor, v_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The implicit positive and negative velocities, v_old +- beta (v_theta - v_old)."""
    change = beta * (v_theta - v_old)
    return v_old + change, v_old - change


def self_normalised(x0hat: Tensor, x0: Tensor) -> Tensor:
    """mean |x0hat - x0|^2 / stop_grad(mean |x0hat - x0|), (B,): errors of every noise level weigh alike."""
    error = (x0hat - x0).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp_min(1e-5)


def old_decay(step: int, rate: float, most: float, start: int = 0) -> float:
    """eta_i = min(rate (i - start), most), and 0 up to `start`."""
    return min(rate * max(step - start, 0), most)


def stratified(u: Tensor, order: Tensor, group: int, j: int, n: int) -> Tensor:
    """Uniform numbers, one in each of group n equal cells of [0, 1) over j = 0..n-1; (B * group,).

    The j-th numbers of a group lie in [j / n, (j + 1) / n), each image in a cell of its own there, in the order of the
    independent uniform numbers `order`: so every image's cell is equally likely, and each number is uniform there.
    """
    rank = order.view(-1, group).argsort(1).argsort(1).flatten()
    return (j + (rank + u) / group) / n


def kl_of_released(kl: float, beta: float) -> float:
    """The `kl` here that equals the released program's KL weight: its policy loss is multiplied by 5 / beta."""
    return kl * beta / 5


def calls_per_update(settings: NFTSettings) -> dict[str, int]:
    """Denoiser evaluations of one step (= `minibatches` updates) per prompt of the batch, a guided call counted twice.

    forward = group (steps g + n (3 with kl, else 2)),  backward = group n,  decode = reward = group,  g = 2 with
    guidance, else 1.
    """
    s = settings
    forward = s.steps * (1 if s.guidance == 1 else 2) + s.n * (3 if s.kl else 2)
    return {"forward": s.group * forward, "backward": s.group * s.n, "decode": s.group, "reward": s.group}
