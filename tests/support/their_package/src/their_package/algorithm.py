"""Reward-weighted regression: predict the clean latents of one's own samples, the better the more."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palate.core import Loss
from palate.path import add_noise
from palate.sampling import sample


@dataclass(frozen=True)
class TheirSettings:
    temperature: float = 0.1
    words: tuple[str, ...] = ("one",)

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


class TheirAlgorithm:
    trains = ("policy",)

    def __init__(self, settings: TheirSettings):
        self.settings = settings

    def step(self, model, reward, batch, rng):
        with torch.no_grad():
            x0 = sample(model, batch.cond, rng.normal("noise", model.latent_shape), 2)
            weights = (reward(model.decode(x0), batch.prompts) / self.settings.temperature).softmax(0)
        t, eps = rng.uniform("time").clamp_min(0.1).float(), rng.normal("eps", model.latent_shape)
        alpha, sigma = model.schedule(t)
        found = model.predict(add_noise(x0, eps, alpha, sigma), t, batch.cond)
        loss = (weights * (found.x0 - x0).square().mean((1, 2, 3))).sum()
        yield Loss(loss, {"weight": weights.max()}, "policy")
