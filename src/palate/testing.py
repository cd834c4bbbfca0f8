"""Small models, rewards and algorithms whose truth is known, for Palate's tests and for yours.

    from palate.testing import TinyFlow, tiny_reward
    palate.train(TinyFlow(), my_algorithm, tiny_reward, ["a red fox"], folder="run", steps=2)

`GaussianModel` predicts exactly, so that a method's gradient has a closed form; `CountingGaussian` counts what a method
asks of it; `TinyFlow` is a network of a few hundred parameters that a step trains in milliseconds.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palate.models.gaussian import GaussianModel
from palate.path import Prediction, flow_schedule, from_velocity, vp_schedule
from palate.runtime.errors import InputError

__all__ = ["PROMPTS", "VP_SCHEDULE", "CountingGaussian", "GaussianModel", "TinyFlow", "text_vector", "tiny_reward"]

PROMPTS = ["a red fox", "a blue whale", "a green frog", "an old tree", "a tiny house"]
VP_SCHEDULE = vp_schedule(  # Stable Diffusion's "scaled linear" betas, in float64
    torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
)


class CountingGaussian(GaussianModel):
    """A `GaussianModel` that counts rows: `forward` and `backward` network evaluations, `decoded` images.

    A guided call evaluates each row twice; a call counts as `backward` when gradients are enabled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forward = self.backward = self.decoded = 0

    def predict(
        self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        rows = len(xt) * (1 if guidance == 1 else 2)
        self.forward += rows
        self.backward += rows * torch.is_grad_enabled()
        return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded += len(latents)
        return super().decode(latents)


def text_vector(prompt: str, size: int) -> Tensor:
    """A vector (size,) in [-1, 1] that is the mean of its words' hashes: equal prompts have equal vectors. The empty
    prompt has one too."""
    digests = [hashlib.sha256(word.encode()).digest() for word in prompt.split() or [""]]
    return torch.stack([torch.tensor([digest[i] / 127.5 - 1 for i in range(size)]) for digest in digests]).mean(0)


class TinyFlow:
    """A flow model of a few hundred parameters: latents (3, 4, 4), images (3, 8, 8), prompts as `text_vector`.

    A prompt that holds "unknownword" is refused, as a model of a closed vocabulary refuses it.
    """

    schedule = staticmethod(flow_schedule)
    latent_shape = (3, 4, 4)
    image_size = 8
    default_steps = 3
    default_guidance = 1.0
    device = torch.device("cpu")

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
        self.reference = copy.deepcopy(self.net).requires_grad_(False)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        if bad := [p for p in prompts if "unknownword" in p]:
            raise InputError(f"{bad[0]!r} holds an unknown word")
        return torch.stack([text_vector(p, 4) for p in prompts])

    def encode(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 2) * 2 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(torch.sigmoid(latents), scale_factor=2)

    def predict(
        self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        net = self.net if weights == "policy" else self.reference
        planes = torch.cat([t.to(xt).view(-1, 1), cond.to(xt)], 1)[..., None, None].expand(-1, -1, *xt.shape[2:])
        return from_velocity(xt, net(torch.cat([xt, planes], 1)), *self.schedule(t.to(xt)))

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        return list(self.net.parameters())

    def fingerprint(self) -> str:
        """SHA-256 of the frozen weights."""
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in self.reference.parameters())).hexdigest()

    def save_adapter(self, folder: Path) -> None:
        """Write the trained parameters to `folder/tiny.safetensors`."""
        from safetensors.torch import save_file

        tensors = {str(i): p.detach().clone() for i, p in enumerate(self.parameters())}
        save_file(tensors, str(folder / "tiny.safetensors"))


def tiny_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The mean colour of each image along its prompt's `text_vector`, (B,): differentiable, and it hears every word."""
    colours = torch.stack([text_vector(p, 3) for p in prompts]).to(images)
    return (images.mean((2, 3)) * colours).sum(1)
