"""What the machine was when something was computed: versions, threads, cores."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from palate.runtime.files import split_lines


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


def host_memory() -> float:
    """Bytes that this process may use of the machine's memory and swap: a container's limit, if it has one."""
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits = [_number(path) for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    allowed = min([physical, *(limit for limit in limits if limit is not None)])
    return allowed + (_swap() if allowed == physical else 0.0)


def _number(path: str) -> float | None:
    """The number in a file of the kernel; None without one, as "max"."""
    try:
        return float(Path(path).read_text("ascii"))
    except (OSError, ValueError):
        return None


def _swap() -> float:
    try:
        lines = split_lines(Path("/proc/meminfo").read_text("ascii"))
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")), 0.0)
