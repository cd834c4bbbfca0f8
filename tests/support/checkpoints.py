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


class Killed(BaseException):
    """Like SIGKILL, nothing of the program catches it."""


def kill_at(patch, point: int, names: tuple[str, ...]) -> list[int]:
    """From now on, the call number `point` (from 0) of those functions of the checkpoints' module is the last thing
    that the process does; the list holds how many calls are left until then."""
    left = [point]
    for name in names:
        original = getattr(checkpoint, name)

        def crash(*arguments, original=original):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*arguments)

        patch.setattr(checkpoint, name, crash)
    return left


def write(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, {k: v + step for k, v in TENSORS.items()}, STATE)
