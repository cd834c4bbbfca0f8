"""A network stored as its difference from one that is there anyway: eight bits a weight, one scale a row.

The embedded one-step generator is kept so, in half the bytes of its float16 weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palate.runtime.errors import InputError
from palate.runtime.tensors import writing_tensors

FILE = "delta.safetensors"
SCALE = ".scale"  # ends the name of the scales that belong to a tensor


def pack(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """int8 tensors with a float32 scale for each row (the largest difference in it is 127); vectors in float16."""
    packed = {}
    for name, tensor in weights.items():
        difference = tensor.float() - base[name].float()
        if difference.ndim < 2:
            packed[name] = difference.half()
            continue
        rows = difference.flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        packed[name] = (rows / scale.clamp_min(1e-30)).round().to(torch.int8).view_as(difference)
        packed[name + SCALE] = scale[:, 0]
    return packed


def unpack(packed: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, float32 on the CPU: no further from those packed than half a scale, the row's largest / 254."""
    weights = {}
    for name, tensor in base.items():
        difference = packed[name].float()
        if name + SCALE in packed:
            difference = difference * packed[name + SCALE].view(-1, *[1] * (tensor.ndim - 1))
        weights[name] = tensor.cpu().float() + difference
    return weights


def save(folder: Path, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Write `weights` to `folder` as their difference from `base`, which `load` needs again."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing_tensors(folder / FILE):
        save_file(pack(weights, base), folder / FILE, metadata={"base": _digest(base)})


def load(folder: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `save` packed. ValueError: not such a file, or the difference from another base."""
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            packed, of = (
                {name: file.get_tensor(name) for name in list(file.keys())},
                (file.metadata() or {}).get("base"),
            )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be read: {error}") from error
    if of != _digest(base):
        raise InputError(
            f"{path} is the difference from another base model; train and pack the generator again, or "
            "give the weights themselves"
        )
    return unpack(packed, base)


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
