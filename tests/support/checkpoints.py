"""A small checkpoint of every dtype that a run saves."""

from __future__ import annotations

from pathlib import Path

import torch

from palate.runtime import checkpoint

TENSORS = {
    "weights/a": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "weights/b": torch.randn(3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "step": torch.tensor(4.0),
    "ids": torch.arange(6).reshape(2, 3),
}


STATE = {"algorithm": {"positive": ["3d"], "value": 0.1 + 0.2}, "finished": ""}


def write(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, {k: v + step for k, v in TENSORS.items()}, STATE)
