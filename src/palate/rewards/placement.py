"""Where a reward computes: on the device that its images are on."""

from __future__ import annotations

import torch
from torch import nn


def follow(module: nn.Module, device: torch.device) -> None:
    """Bring the module's weights to the device. One that does not fit there is on the CPU again when OutOfMemoryError
    is raised: the next call would take a module of which a part has moved for one that is there."""
    if next(module.parameters()).device == device:
        return
    try:
        module.to(device)
    except torch.OutOfMemoryError:
        module.to(torch.device("cpu"))
        raise
