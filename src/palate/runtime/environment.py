"""What the machine was when something was computed: versions, threads, cores."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("torch", "numpy", "diffusers", "transformers", "peft")}


def environment(base: str) -> dict[str, Any]:
    """The content of environment.json; `base` is the fingerprint of the base weights."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "base_fingerprint": base,
    }
