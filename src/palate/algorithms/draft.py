"""DRaFT-K and DRaFT-LV, Direct Reward Fine-Tuning.

"Directly Fine-Tuning Diffusion Models on Differentiable Rewards", 2023, arXiv 2309.17400, by Kevin Clark, Paul Vicol,
Kevin Swersky and David J. Fleet: Algorithm 1.

Idea: sampling is a differentiable program, so follow the reward's gradient through it: through all steps, or, cheaper
and more stable, through the last K only.

    x0           = sample(theta, c, x_T), gradient through the last K steps            `sampling.sample(grad_steps=K)`
    loss         = -E[R(x0, c)]
DRaFT-LV (K = 1) averages the last step over n fresh noises, a lower-variance estimate of the same gradient:
    x_1^i        = alpha_1 stop_grad(x0) + sigma_1 eps_i                               `path.add_noise`
    x0hat^i      = E_theta[x0 | x_1^i]                                                 `Model.predict(...).x0`
    loss         = -1/(n + 1) [R(x0, c) + sum_i R(x0hat^i, c)]

Deviations from the paper: the n + 1 terms are averaged, where Algorithm 1 adds them up, so that n does not change the
size of the gradient. Each term is its own backward, so memory does not grow with n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from palate.core import Batch, Loss, Model, Random, Reward
from palate.path import add_noise
from palate.runtime.errors import InputError
from palate.sampling import sample, state_kind, time_grid


@dataclass(frozen=True)
class DRaFTSettings:
    """Hyperparameters of DRaFT, DRaFT-K and DRaFT-LV."""

    steps: int = 50
    K: int = 1  # steps from the end that carry gradient; K = steps is DRaFT
    n: int = 0  # DRaFT-LV's noises, 2 in the paper; needs K = 1. 0 = DRaFT-K
    guidance: float = 7.5
    shift: float = 1.0  # of the sampling grid

    def __post_init__(self) -> None:
        if not 1 <= self.K <= self.steps:
            raise InputError(f"DRaFTSettings expected 1 <= K <= steps; got K = {self.K}, steps = {self.steps}")
        if self.n < 0 or (self.n and self.K != 1):
            raise InputError(
                f"DRaFTSettings expected n >= 0, and K = 1 when n > 0 (DRaFT-LV); got n = {self.n}, K = {self.K}"
            )
        if not self.shift > 0:
            raise InputError(f"DRaFTSettings expected shift > 0; got shift = {self.shift}")


class DRaFT:
    """Differentiates the reward through the last K steps of sampling; `core.Algorithm`."""

    trains = ("policy",)
    needs_reward_gradient = True
    any_size = True
    reads_images = False

    def __init__(self, settings: DRaFTSettings):
        self.settings = settings

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        """One update: the reward of a sample through its last K steps, then of n re-noised copies of it."""
        s = self.settings
        noise = rng.normal("rollout", model.latent_shape).to(**state_kind(model))
        x0 = sample(model, batch.cond, noise, s.steps, guidance=s.guidance, shift=s.shift, grad_steps=s.K)
        r = reward(model.decode(x0), batch.prompts)
        yield Loss(-r.mean() / (s.n + 1), {"reward": r.mean().detach()}, None if s.n else "policy")
        x0 = x0.detach()
        t = time_grid(s.steps, shift=s.shift)[-2].to(noise).expand(len(x0))  # where the last step starts
        for i in range(s.n):
            eps = rng.normal(f"renoise-{i}", model.latent_shape).to(x0)
            x1 = add_noise(x0, eps, *model.schedule(t))
            r = reward(model.decode(model.predict(x1, t, batch.cond, guidance=s.guidance).x0), batch.prompts)
            last = i == s.n - 1
            yield Loss(-r.mean() / (s.n + 1), {"reward_renoised": r.mean().detach()}, "policy" if last else None)


def calls_per_update(settings: DRaFTSettings) -> dict[str, int]:
    """Denoiser evaluations of one update per prompt of the batch, a guided call counted twice.

    forward = (steps + n) g,  backward = (K + n) g,  decode = reward = n + 1,  g = 2 with guidance, else 1.
    """
    guided = 1 if settings.guidance == 1 else 2
    return {
        "forward": (settings.steps + settings.n) * guided,
        "backward": (settings.K + settings.n) * guided,
        "decode": settings.n + 1,
        "reward": settings.n + 1,
    }
