"""An algorithm is a generator of losses; the loop steps, clips, averages, checkpoints and resumes.

    python examples/own_algorithm.py [steps]

This one is reward-weighted regression (Lee et al. 2023, arXiv 2302.12192, eq. 3, without its second term): draw two
images per prompt, and fit the velocity to each of them with the softmax of their rewards as weight. It needs no
gradient of the reward, so that any score can be trained.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import palate
from palate.path import add_noise
from palate.rewards.simple import saturation

PROMPTS = ["a dog on a blue background", "a red apple", "a cat", "a house on a green background"]


@dataclass(frozen=True)
class WeightedRegression:
    """`temperature` is in units of the reward: small ones keep the better image only."""

    temperature: float = 0.02
    sampling_steps: int = 6
    trains = ("policy",)

    def step(self, model, reward, batch, rng):
        images, latents = [], []
        with torch.no_grad():
            for draw in range(2):
                noise = rng.normal(f"draw {draw}", model.latent_shape)
                latents.append(palate.sample(model, batch.cond, noise, self.sampling_steps, guidance=3.0))
                images.append(model.decode(latents[-1]))
            rewards = torch.stack([reward(image, batch.prompts) for image in images])  # (2, B)
            weights = (rewards / self.temperature).softmax(0)

        t = 0.02 + 0.96 * rng.uniform("time").float()
        eps = rng.normal("noise", model.latent_shape)
        alpha, sigma = model.schedule(t)
        error = torch.zeros(len(batch.prompts))
        for x0, weight in zip(latents, weights, strict=True):
            pred = model.predict(add_noise(x0, eps, alpha, sigma), t, batch.cond)
            error = error + weight * ((pred.eps - pred.x0) - (eps - x0)).square().mean((1, 2, 3))
        # outside `no_grad`: never yield inside a context manager
        metrics = {"reward": rewards.mean(), "best_of_two": rewards.max(0).values.mean()}
        yield palate.Loss(error.mean(), metrics, update="policy")


def main(folder: Path, steps: int = 20) -> list[float]:
    """Train towards saturated colours; returns the mean reward of each step."""
    model = palate.EmojiModel.load()
    palate.train(model, WeightedRegression(), saturation, PROMPTS, folder=folder, steps=steps, batch_size=4, lr=1e-3)
    from palate.train import read_metrics

    rewards = [row["reward"] for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "step"]
    print(f"saturation: {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in step {len(rewards)}")
    return rewards


if __name__ == "__main__":
    main(Path("runs/own-algorithm"), *map(int, sys.argv[1:]))
