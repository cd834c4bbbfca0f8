"""Palate aligns text-to-image diffusion and flow models with a preference."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Looked up on first use, because `import palate` and `palate --help` must not wait for torch.
_HOME = {
    "Algorithm": "palate.core",
    "Batch": "palate.core",
    "Loss": "palate.core",
    "Model": "palate.core",
    "Prediction": "palate.path",
    "Random": "palate.core",
    "Reward": "palate.core",
    "SRPO": "palate.algorithms.srpo",
    "SRPOSettings": "palate.algorithms.srpo",
    "EmojiModel": "palate.models.emoji",
    "GuardSettings": "palate.recipe",
    "Taste": "palate.taste.taste",
    "fit_taste": "palate.taste.taste",
    "sample": "palate.sampling",
    "semantic_relative": "palate.rewards.combine",
    "steer": "palate.train",
    "weighted": "palate.rewards.combine",
}
__all__ = [*_HOME, "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        # a module that can be called: palate.train(...) is palate.train.train(...)
        return import_module("palate.train")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'palate' has no attribute {name!r}")
