"""A model is an object with the members of `palate.core.Model`; here a flow over 8 x 8 images, written from scratch.

    python examples/own_model.py [steps]

`predict` is the whole adapter: call the network, then say what its output means (`from_velocity`, `from_v`, `from_eps`
or `from_x0`). The four members of `palate.core.Sampleable` are what previews and the guard need besides.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import palate
from palate.algorithms.draft import DRaFT, DRaFTSettings
from palate.path import flow_schedule, from_velocity

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ColourFlow:
    """Latents are images in [-1, 1]; a prompt is the name of a colour."""

    schedule = staticmethod(flow_schedule)
    latent_shape = (3, 8, 8)
    default_steps, default_guidance, image_size = 4, 1.0, 8
    device = torch.device("cpu")

    def __init__(self):
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Conv2d(7, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def encode_prompts(self, prompts):
        return torch.tensor([COLOURS[prompt] for prompt in prompts])

    def encode(self, images):
        return 2 * images - 1

    def decode(self, latents):
        return ((latents + 1) / 2).clamp(0, 1)

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        network = self.policy if weights == "policy" else self.reference
        known = torch.cat([t.to(xt)[:, None], cond], 1)[..., None, None].expand(-1, -1, 8, 8)
        return from_velocity(xt, network(torch.cat([xt, known], 1)), *self.schedule(t.to(xt)))

    def parameters(self, weights="policy"):
        return list(self.policy.parameters())


def colour(images, prompts):
    """How much of the named colour there is, less the others: (B,) in [-1, 1]."""
    wanted = torch.tensor([COLOURS[prompt] for prompt in prompts])[..., None, None]
    return (images * (1.5 * wanted - 0.5)).sum(1).mean((1, 2))


def main(folder: Path, steps: int = 60) -> float:
    """Train the last two of four sampling steps on the colour; returns the gain of the reward."""
    model, prompts = ColourFlow(), list(COLOURS)
    draft = DRaFT(DRaFTSettings(steps=4, K=2, guidance=1.0))
    palate.train(model, draft, colour, prompts, folder=folder, steps=steps, batch_size=6, lr=1e-2, preview_every=steps)

    rewards = []
    for weights in ("reference", "policy"):
        noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            latents = palate.sample(model, model.encode_prompts(prompts), noise, 4, weights=weights)
            rewards.append(colour(model.decode(latents), prompts).mean().item())
    print(f"reward: {rewards[0]:+.3f} before, {rewards[1]:+.3f} after {steps} steps")
    return rewards[1] - rewards[0]


if __name__ == "__main__":
    main(Path("runs/own-model"), *map(int, sys.argv[1:]))
