"""Earlier weights of the policy that speak in its place: old policies and moving references of any algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palate.runtime.sharding import shard_like


def taken(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters as they are."""
    return [p.detach().clone() for p in parameters]


def sharded_like(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The values, which in a checkpoint are whole, cut as the parameters are."""
    return [shard_like(value, p) for value, p in zip(values, parameters, strict=True)]


@contextmanager
def using(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the policy speaks with `values`. Only for calls without gradient, and never across a yield of `step`."""
    kept = taken(parameters)
    with torch.no_grad():
        try:
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
            yield
        finally:
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
