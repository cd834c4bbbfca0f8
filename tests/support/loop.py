"""A short run of SRPO on the tiny model, and what it leaves behind."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

import palate
from palate.algorithms.srpo import SRPO, SRPOSettings
from palate.core import Loss
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.testing import PROMPTS, TinyFlow
from palate.testing import tiny_reward as reward
from palate.train import read_metrics

STEPS = 8


def srpo(**settings) -> SRPO:
    return SRPO(SRPOSettings(**{
        "positive": ("warm",), "negative": ("cold", "dull"), "rollout_steps": 2, "window": (0.3, 0.9), "step": 0.2,
        **settings
    }))  # fmt: skip


def run(folder: Path, *, algorithm=None, model=None, reward=reward, **options):
    options = {"steps": STEPS, "batch_size": 3, "lr": 1e-2, "seed": 5, "checkpoint_every": 1, "keep_checkpoints": 99,
               "progress": False, **options}  # fmt: skip
    model = model or TinyFlow()
    outcome = palate.train(
        model, algorithm or srpo(), reward, options.pop("prompts", PROMPTS), folder=folder, **options
    )
    return model, outcome


def rows(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.endswith("_seconds")} for row in read_metrics(folder / "metrics.jsonl")
    ]


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / checkpoint.name(step)).tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


class Steering:
    """SRPO that has the run's words changed from outside during given steps, so from the step after each."""

    def __init__(self, folder: Path, changes: dict[int, tuple]):
        self.inner, self.folder, self.changes = srpo(), folder, changes
        self.trains, self.steer, self.control_texts = self.inner.trains, self.inner.steer, self.inner.control_texts
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    def step(self, model, reward, batch, rng):
        if rng.step in self.changes:
            palate.steer(self.folder, *self.changes.pop(rng.step))
        yield from self.inner.step(model, reward, batch, rng)


class Quadratic:
    """loss = sum |p|^2 / 2 in `parts` equal losses: its gradient is p."""

    trains = ("policy",)

    def __init__(self, parts: int = 1):
        self.parts = parts

    def step(self, model, reward, batch, rng):
        for part in range(self.parts):
            value = sum((p**2).sum() for p in model.parameters()) / 2 / self.parts
            yield Loss(value, {"half": value.detach()}, "policy" if part == self.parts - 1 else None)


class Elastic(TinyFlow):
    """TinyFlow, which draws any size: two pixels per latent."""

    @contextlib.contextmanager
    def at_size(self, image_size):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % 2 or width % 2:
            raise InputError(f"model.image_size got {image_size}; needs a multiple of 2")
        before = self.latent_shape, self.image_size
        self.latent_shape, self.image_size = (before[0][0], height // 2, width // 2), (height, width)
        try:
            yield
        finally:
            self.latent_shape, self.image_size = before
