"""SQDF: Soft Q-based Diffusion Finetuning.

"Diffusion Fine-Tuning via Reparameterized Policy Gradient of the Soft Q-Function", ICLR 2026, arXiv 2512.04559.

Idea: the sampler is a policy that chooses x_{t-1} given x_t. Its soft Q-function has a training-free, differentiable
guess, the reward of a one-step estimate of the clean image; so one step of the policy at a time is pushed up that guess
and held, by an exact KL, near the step of the pretrained model.

    p_theta(x_{t-1} | x_t) = N(mean_theta, std^2 I)      one stochastic sampler step, std > 0      `transition`
    x_{t-1} = mean_theta + std e,  e ~ N(0, I)           the reparameterised action                (eq. 12)
    Q(x_t, x_{t-1}) = gamma^{t-1} r(x0hat(x_{t-1}))      discounted soft Q                         (eq. 9, 13-15)
    KL = |mean_theta - mean_ref|^2 / (2 std^2)           in nats: a sum over dimensions            `kl`
    loss = mean of -Q + alpha_kl KL                                                       (eq. 16) `soft_q_loss`

x0hat is an estimator of the FROZEN model: its posterior mean ("tweedie"), a consistency model ("consistency"), or n
steps of its ODE ("rollout-n"). x_t is data: drawn from a replay buffer, or the end of a rollout that stops where the
update happens. Q does not depend on theta, so the optimum of a state is the same under any distribution of states.
t = T .. 1 counts the steps that are left; the sampler's index is i = T - t. At i = T-1 the action is the image and Q is
exact.

Deviations from the paper and from the released program (numbers as in the table of docs/algorithms/sqdf.md):
- alpha_kl is per nat. The program's KL is a mean over the D dimensions without the 1/2: `alpha_in_nats` converts.
- Any schedule. Levels run from t = 1 to `final_time` > 0, so that std > 0 in the last step too (SD's own table ends the
  same way); for a flow this is the stochastic sampler with the same marginals.
- Negative rewards are not masked (5), prioritised drawing has a fallback when no reward is positive (7) and optional
  importance weights (6), the consistency model is called at the true time (9), rollout-n leaves the last step
  alone (10).
- "tweedie" is the posterior mean, guidance 1; `estimator_guidance` gives the program's guided variant.
- One rollout may serve several updates (`rollout_every`); without a buffer the index is drawn first and the rollout
  ends there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from palate.algorithms.replay_buffer import Draw, ReplayBuffer
from palate.core import Batch, Cond, Loss, Model, Random, Reward, require
from palate.path import Prediction, move
from palate.runtime.errors import InputError
from palate.runtime.sharding import max_over_ranks
from palate.sampling import shift_time, state_kind, transition_std

_ROLLOUT = re.compile(r"rollout-([1-9][0-9]?)")


@dataclass(frozen=True)
class SQDFSettings:
    """Defaults are those of the paper's small experiment (SD1.5, D = 16384)."""

    rollout_steps: int = 50  # T
    grid: Literal["even", "released"] = "even"  # released: the program's training steps 981, ..., 1 of 1000, then 0
    shift: float = 1.0  # of the sampler's grid
    final_time: float = 0.001  # the last level; sigma there is the floor of std. About 0.02 for a flow of 20 steps
    eta: float = 1.0  # noise of a step as a share of the ancestral sampler's
    guidance: float = 5.0  # of policy and reference, in rollouts and in the update
    alpha_kl: float = 2.44e-4  # KL temperature per nat; the program's 2 at D = 16384
    gamma: float = 0.9  # discount of the reward for each step that is left

    estimator: str = "consistency"  # tweedie | consistency | rollout-n, as rollout-2
    estimator_guidance: float = 1.0  # of tweedie and rollout-n

    buffer: Literal["none", "uniform", "prioritised", "importance"] = "uniform"  # see replay_buffer.py
    buffer_size: int = 1024  # trajectories, of each image size
    buffer_memory: int = 1024  # MiB held in memory, of each image size; older trajectories go to disk
    rollout_every: int = 1  # updates a rollout serves

    def __post_init__(self) -> None:
        steps_of(self.estimator)
        require(
            self,
            (
                "rollout_steps, rollout_every and buffer_size: at least 1",
                min(self.rollout_steps, self.rollout_every, self.buffer_size) < 1,
            ),
            ("grid: 'even' or 'released'", self.grid not in ("even", "released")),
            (
                "shift, final_time: 1 and 0.001 with grid = 'released', which has its own",
                self.grid == "released" and (self.shift != 1 or self.final_time != 0.001),
            ),
            (
                "rollout_steps: at most 500 with grid = 'released', which takes whole training steps of 1000",
                self.grid == "released" and self.rollout_steps > 500,
            ),
            ("shift: above 0", not self.shift > 0),
            (
                "final_time: above 0 and below 1; at 0 the last step has std = 0 and its KL is infinite",
                not 0 < self.final_time < 1,
            ),
            (
                "eta: above 0 and at most 1; with eta = 0 the sampler is deterministic, std = 0, and the KL between "
                "two different steps is infinite: set eta = 1",
                not 0 < self.eta <= 1,
            ),
            ("alpha_kl: at least 0", not self.alpha_kl >= 0),
            ("gamma: 0 to 1", not 0 <= self.gamma <= 1),
            (
                "buffer: none, uniform, prioritised or importance",
                self.buffer not in ("none", "uniform", "prioritised", "importance"),
            ),
            ("buffer_memory: at least 0 MiB", self.buffer_memory < 0),
            (
                "rollout_every: 1 with buffer = 'none', where every update needs its own rollout",
                self.buffer == "none" and self.rollout_every != 1,
            ),
            (
                "estimator_guidance: 1 with estimator = 'consistency', whose guidance was fixed when it was distilled",
                self.estimator == "consistency" and self.estimator_guidance != 1,
            ),
        )

    def check_batch(self, size: int) -> None:
        """ValueError for a batch that is too large."""
        if self.buffer != "none" and self.buffer_size < size:
            raise InputError(
                f"algorithm.buffer_size = {self.buffer_size} is smaller than a batch of {size}, trainer.batch_size "
                f"over the ranks and trainer.micro_batches; expected at least {size}"
            )


class SQDF:
    """The algorithm object; its state are the replay buffers, one for each shape of latents that a step has drawn."""

    trains = ("policy",)
    needs_reward_gradient = True
    injects_noise = True  # between the steps of a rollout
    any_size = True
    compares_calls = True  # with a gradient, of trained weights, and without, of old or frozen ones
    reads_images = False

    def __init__(self, settings: SQDFSettings):
        self.settings = settings
        self.buffers: dict[tuple[int, ...], ReplayBuffer] = {}

    def state_dict(self) -> dict[str, Any]:
        if self.settings.buffer == "none":
            return {}
        if len(self.buffers) > 1:
            return {"buffers": {"x".join(map(str, shape)): own.state_dict() for shape, own in self.buffers.items()}}
        return {"buffer": next(iter(self.buffers.values()), self._empty()).state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffers = {}
        for kept in [state["buffer"]] if "buffer" in state else state.get("buffers", {}).values():
            if kept["trajectories"]:  # each (T, C, h, w)
                self._buffer_of(tuple(kept["trajectories"][0].shape[1:])).load_state_dict(kept)

    def _buffer_of(self, shape: tuple[int, ...]) -> ReplayBuffer:
        return self.buffers.setdefault(shape, self._empty())

    def _empty(self) -> ReplayBuffer:
        return ReplayBuffer(self.settings.buffer_size, memory=self.settings.buffer_memory << 20)

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: states (a rollout, the buffer, or both), then one differentiated step of the policy."""
        s = self.settings
        if s.grid == "released":
            times = released_levels(s.rollout_steps)
        else:
            times = levels(s.rollout_steps, shift=s.shift, final_time=s.final_time)
        buffer = None if s.buffer == "none" else self._buffer_of(tuple(model.latent_shape))
        if buffer is None:
            index = rng.integers("index", 0, s.rollout_steps - 1)
            states = self._rollout_until(model, batch, rng, times, stop=index)
            prompts, cond = batch.prompts, batch.cond
            draw = Draw(states[-1], index, torch.ones(len(index)), prompts, torch.zeros(len(index)))
        else:
            draw = self._replay(buffer, model, reward, batch, rng, times)
            prompts = draw.prompts
            with torch.no_grad():
                cond = model.encode_prompts(prompts)
        value, metrics = self._loss(model, reward, draw, cond, rng, times)
        if buffer is not None:
            metrics["buffer"] = torch.tensor(float(len(buffer)))
            metrics["buffer_reward"] = torch.tensor(sum(buffer.rewards) / len(buffer))
            metrics["age"] = draw.age.double().mean()
        yield Loss(value, metrics, "policy")

    def _replay(
        self, buffer: ReplayBuffer, model: Model, reward: Reward, batch: Batch, rng: Random, times: Tensor
    ) -> Draw:
        """Fresh trajectories into the buffer when they are due, then a draw from all of it."""
        s, count = self.settings, len(batch.prompts)
        assert s.buffer != "none", "there is a buffer"
        s.check_batch(count)
        if (rng.step - 1) % s.rollout_every == 0 or not len(buffer):
            states = self._rollout_until(model, batch, rng, times, stop=torch.full((count,), s.rollout_steps))
            with torch.no_grad():
                scores = reward(model.decode(states[-1]), batch.prompts)
            buffer.insert(states[:-1].transpose(0, 1), batch.prompts, scores.tolist())
        return buffer.draw(s.buffer, rng.uniform("row"), rng.uniform("index"), gamma=s.gamma)

    @torch.no_grad()
    def _rollout_until(self, model: Model, batch: Batch, rng: Random, times: Tensor, *, stop: Tensor) -> Tensor:
        """States (max stop + 1, B, C, h, w) of the policy's own sampler; sample k stops at index stop[k].

        Samples that are done leave the batch, so the network is called on sum(stop) samples in all. A network that
        is cut over several ranks is called on one sample more for each step that another rank still takes.
        """
        s, ids = self.settings, torch.as_tensor(rng.ids)
        x = rng.normal("start", model.latent_shape).to(**state_kind(model))
        states = x.expand(int(stop.max()) + 1, *x.shape).clone()
        active, cond = torch.arange(len(stop)), batch.cond
        calls = max_over_ranks(len(states) - 1, model.parameters("policy")[0])
        for i in range(len(states) - 1):
            remaining = (stop > i).nonzero().flatten()
            if len(remaining) < len(active):
                active, cond = remaining, model.encode_prompts([batch.prompts[k] for k in remaining])
            x, t, t_next = states[i, active], times[i].expand(len(active)), times[i + 1].expand(len(active))
            t, t_next = t.to(x), t_next.to(x)
            pred = model.predict(x, t, cond, guidance=s.guidance)
            mean, std = transition(pred, *model.schedule(t), *model.schedule(t_next), s.eta)
            noise = Random(rng.seed, rng.step, ids[active]).normal(f"walk-{i}", model.latent_shape).to(x)
            states[i + 1] = states[i]
            states[i + 1, active] = mean + std * noise
        for _ in range(len(states) - 1, calls):
            model.predict(x[:1], times[:1].to(x), model.encode_prompts(batch.prompts[:1]), guidance=s.guidance)
        return states

    def _loss(
        self, model: Model, reward: Reward, draw: Draw, cond: Cond, rng: Random, times: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        xt = draw.states.to(**state_kind(model))
        t, t_next = times[draw.step].to(xt), times[draw.step + 1].to(xt)
        between = (*model.schedule(t), *model.schedule(t_next))
        with torch.no_grad():  # before the policy's call: a switch of adapters after it would lose its gradient
            reference = model.predict(xt, t, cond, guidance=s.guidance, weights="reference")
            mean_ref, _ = transition(reference, *between, s.eta)
        mean, std = transition(model.predict(xt, t, cond, guidance=s.guidance), *between, s.eta)
        action = mean + std * rng.normal("action", model.latent_shape).to(xt)

        last = (draw.step == s.rollout_steps - 1).to(xt.device).view(-1, 1, 1, 1)
        x0 = estimate(model, action, t_next, cond, s.estimator, guidance=s.estimator_guidance)
        x0 = torch.where(last, action, x0)
        r = reward(model.decode(x0), draw.prompts)
        left = (s.rollout_steps - 1 - draw.step).to(r)
        discount = torch.tensor(s.gamma, dtype=r.dtype, device=r.device) ** left
        divergence = kl(mean, mean_ref, std).to(r)
        value = soft_q_loss(r, divergence, discount, s.alpha_kl, draw.weight.to(r))
        metrics = {
            "reward": r.mean(),
            "soft_q": (discount * r).mean(),
            "kl": divergence.mean(),
            "moved": (mean - mean_ref).square().mean().sqrt(),
            "std": std.mean(),
            "index": draw.step.double().mean(),
        }
        if s.buffer == "importance":
            metrics["weight_max"] = draw.weight.max()
        return value, {name: value.detach() for name, value in metrics.items()}


# The equations


def transition(
    pred: Prediction, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and std (B, 1, 1, 1) of p(x_{t-1} | x_t), from level (alpha, sigma) to the next.

    std is eta times the forward posterior's (DDIM, arXiv 2010.02502, eq. 16, for any schedule): marginals are kept.
    ValueError where std = 0: two deterministic steps that differ are infinitely far apart.
    """
    std = transition_std(alpha, sigma, alpha_next, sigma_next, eta)
    if bool((std <= 0).any()):
        why = "eta = 0" if eta == 0 else "a step to sigma = 0" if bool((sigma_next <= 0).any()) else "equal levels"
        raise InputError(
            f"transition got std = 0 ({why}), where the KL is infinite; expected eta in (0, 1] and a last "
            "level with sigma > 0 (final_time)"
        )
    return move(pred, alpha_next, sigma_next, std), std


def kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2 I) || N(mean_ref, std^2 I)) = |mean - mean_ref|^2 / (2 std^2), (B,) in nats."""
    return ((mean - mean_ref) / std).square().flatten(1).sum(1) / 2


def soft_q_loss(reward: Tensor, divergence: Tensor, discount: Tensor, alpha_kl: float, weight: Tensor) -> Tensor:
    """mean of weight (-discount r + alpha_kl KL) over the batch; all (B,), discount = gamma^{t-1}. 0^0 = 1."""
    return (weight * (alpha_kl * divergence - discount * reward)).mean()


def alpha_in_nats(alpha: float, size: int) -> float:
    """alpha_kl that equals the released program's alpha for latents of `size` = C h w numbers.

    Its KL is mean((mean - mean_ref)^2) / std^2 = (2 / size) KL, so alpha_kl = 2 alpha / size: 2.44e-4 for its 2 at
    4 x 64 x 64.
    """
    return 2 * alpha / size


def estimate(model: Model, x: Tensor, t: Tensor, cond: Cond, estimator: str, *, guidance: float = 1.0) -> Tensor:
    """x0hat of x at times t (B,), differentiable in x, by frozen weights.

    rollout-n: n equal DDIM or Euler steps of the reference from t to 0; rollout-1 is tweedie.
    """
    if estimator == "consistency":
        return model.predict(x, t, cond, weights="consistency").x0
    n = steps_of(estimator)
    for k in range(n):
        pred = model.predict(x, t * (1 - k / n), cond, guidance=guidance, weights="reference")
        x = move(pred, *model.schedule(t * (1 - (k + 1) / n)))
    return x


def steps_of(estimator: str) -> int:
    """Calls of a network that the estimator makes."""
    if estimator in ("tweedie", "consistency"):
        return 1
    if found := _ROLLOUT.fullmatch(estimator):
        return int(found[1])
    raise InputError(
        f"estimator: got {estimator!r}; expected tweedie, consistency or rollout-n with n in 1..99, as rollout-2"
    )


def levels(steps: int, *, shift: float, final_time: float) -> Tensor:
    """Times (steps + 1,) from 1 down to final_time, float64, equal steps before the shift."""
    last = final_time / (shift - (shift - 1) * final_time)  # shift_time(last) == final_time
    return shift_time(torch.linspace(1.0, last, steps + 1, dtype=torch.float64), shift)


def released_levels(steps: int) -> Tensor:
    """The released program's times (steps + 1,), float64: training steps 981, 961, ..., 1 of 1000 for 50 steps, then 0.

    Training step k is the time (k + 1) / 1000 (`path.vp_schedule`). The last step is short, 1 to 0 where the others are
    20 long: its std is small, and so the same change of the network costs about twenty times less KL there than on
    `levels`, whose steps are equal.
    """
    length = 1000 // steps
    labels = [length * i + 1 for i in reversed(range(steps))]
    return (torch.tensor([*labels, 0], dtype=torch.float64) + 1) / 1000


# Cost


def calls_per_update(settings: SQDFSettings, walked: int | None = None) -> dict[str, float]:
    """Denoiser evaluations of one update for each sample, a guided call counted twice.

    forward = (walked + policy + reference) g + E h,  backward = g,  with g, h = 2 where `guidance`,
    `estimator_guidance` are not 1, and E calls of the estimator. `walked` are the rollout's steps: T when trajectories
    are made for the buffer, 0 when the update only draws from it, and without a buffer the drawn index i. None gives
    the mean.
    """
    s = settings
    guided, of_estimate = (1 if guidance == 1 else 2 for guidance in (s.guidance, s.estimator_guidance))
    collected = float(s.buffer != "none" and walked != 0) / (s.rollout_every if walked is None else 1)
    mean = (s.rollout_steps - 1) / 2 if s.buffer == "none" else s.rollout_steps / s.rollout_every
    return {
        "forward": ((mean if walked is None else walked) + 2) * guided + steps_of(s.estimator) * of_estimate,
        "backward": guided,
        "decode": 1 + collected,
        "reward": 1 + collected,
    }
