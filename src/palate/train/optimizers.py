"""AdamW, and AdamW with its moments in a byte each; what either keeps, as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from palate.models.quantised import require_bitsandbytes
from palate.recipe import TrainerSettings
from palate.runtime import sharding
from palate.runtime.errors import CheckpointError

EIGHT_BIT = "adamw8bit"
MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # bitsandbytes' tables, alike for all parameters; not in a checkpoint
Moments = dict[int, dict[str, Tensor]]  # a parameter's number -> its moments and step


def make_optimizer(parameters: Sequence[nn.Parameter], lr: float, settings: TrainerSettings) -> torch.optim.Optimizer:
    """The optimizer of one name's parameters. InputError: bitsandbytes is missing.

    adamw8bit: block-wise quantised moments (Dettmers et al. 2022, arXiv 2110.02861); parameters of fewer than 4096
    numbers keep theirs in float32.
    """
    options: dict[str, Any] = {"lr": lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer != EIGHT_BIT:
        return torch.optim.AdamW(parameters, **options)
    require_bitsandbytes(f"trainer.optimizer={EIGHT_BIT}")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def moments_of(optimizer: torch.optim.Optimizer) -> Moments:
    """What an optimizer has kept so far."""
    found: Moments = {}
    for i, state in optimizer.state_dict()["state"].items():
        nested = [value for value in state.values() if isinstance(value, dict)]  # as bitsandbytes hides its own
        flat = {key: value for part in (state, *nested) for key, value in part.items() if key not in MAPS}
        found[i] = {
            key: torch.as_tensor(value, dtype=torch.float32) if key == "step" else value
            for key, value in flat.items()
            if not isinstance(value, dict)
        }
    return found


def load_moments(
    optimizer: Any, parameters: Sequence[Tensor], tensors: Mapping[str, Tensor], prefix: str, kind: str
) -> None:
    """Give an optimizer what `moments_of` said, stored as PREFIX/0000/KEY. CheckpointError: it does not fit."""
    found: dict[int, dict[str, Any]] = {}
    for i, parameter in enumerate(parameters):
        start = f"{prefix}/{i:04d}/"
        parts = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        if not parts:  # it never had a gradient
            continue
        if not _fits(parts, parameter, kind):
            raise CheckpointError(f"{prefix}/{i:04d} of the checkpoint does not fit the model's parameter")
        found[i] = {k: v if k == "step" else sharding.shard_like(v, parameter) for k, v in parts.items()}
    if sum(map(len, found.values())) != sum(key.startswith(f"{prefix}/") for key in tensors):
        raise CheckpointError(f"the checkpoint holds tensors of {prefix} for which there is no parameter")
    if kind == EIGHT_BIT:
        optimizer.fill_qmap()
        for state in found.values():
            state["step"] = int(state["step"])
            if state["state1"].dtype == torch.uint8:
                state |= {key: optimizer.name2qmap[name] for key, name in MAPS.items()}
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(parts: Mapping[str, Tensor], parameter: Tensor, kind: str) -> bool:
    shapes = {key: value.shape for key, value in parts.items()}
    if kind == EIGHT_BIT:
        whole = shapes.keys() - {"absmax1", "absmax2"} == {"step", "state1", "state2"}
        return whole and shapes["state1"] == shapes["state2"] == parameter.shape
    like = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size()}
    dtypes = {key: torch.float32 if key == "step" else parameter.dtype for key in like}
    return shapes == like and {key: value.dtype for key, value in parts.items()} == dtypes
