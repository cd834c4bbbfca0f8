"""A stand-in for tests of the loop: a flow model of a few hundred parameters, and a reward that listens to words."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from palate.algorithms.srpo import SRPO, SRPOSettings
from palate.path import Prediction, flow_schedule, from_velocity
from palate.runtime.errors import InputError

PROMPTS = ["a red fox", "a blue whale", "a green frog", "an old tree", "a tiny house"]


def word_vector(word: str, size: int) -> Tensor:
    digest = hashlib.sha256(word.encode()).digest()
    return torch.tensor([digest[i] / 127.5 - 1 for i in range(size)])


def text_vector(prompt: str, size: int) -> Tensor:
    return torch.stack([word_vector(word, size) for word in prompt.split()]).mean(0)


class TinyFlow:
    schedule = staticmethod(flow_schedule)
    latent_shape = (3, 4, 4)
    image_size = 8
    default_steps = 3
    default_guidance = 1.0

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

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy") -> Prediction:
        net = self.net if weights == "policy" else self.reference
        planes = torch.cat([t.to(xt).view(-1, 1), cond.to(xt)], 1)[..., None, None].expand(-1, -1, *xt.shape[2:])
        return from_velocity(xt, net(torch.cat([xt, planes], 1)), *self.schedule(t.to(xt)))

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        return list(self.net.parameters())

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in self.reference.parameters())).hexdigest()

    def save_adapter(self, folder) -> None:
        from safetensors.torch import save_file

        save_file(
            {str(i): p.detach().clone() for i, p in enumerate(self.parameters())}, str(folder / "tiny.safetensors")
        )


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    colours = torch.stack([text_vector(p, 3) for p in prompts]).to(images)
    return (images.mean((2, 3)) * colours).sum(1)


def srpo(**settings) -> SRPO:
    return SRPO(SRPOSettings(**{
        "positive": ("warm",), "negative": ("cold", "dull"), "rollout_steps": 2, "window": (0.3, 0.9), "step": 0.2,
        **settings
    }))  # fmt: skip
