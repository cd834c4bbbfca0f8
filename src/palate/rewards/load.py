"""Loads rewards by the names of `palate.rewards.table`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from palate.core import Reward, TwoTower
from palate.rewards.table import Entry, find
from palate.runtime.code import load_object, names_a_file
from palate.runtime.errors import InputError


def load_reward(name: str, source: str | None = None, dtype: str | None = None) -> Reward:
    """A reward by name. source: where its weights or its server are; dtype: of a published one's weights.

    InputError: there is no such reward, or its weights cannot be found or read.
    """
    entry = find(name)
    if entry.kind == "own":
        return _somebody_elses(entry, source)
    module, _, attribute = entry.place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if entry.kind == "function":
        return found
    if entry.kind == "embedded":
        return found(name)
    if dtype is None or entry.kind in ("service", "taste"):
        return found(source)
    return found(source, dtype=getattr(torch, dtype))


def as_reward(function: Callable[..., Any]) -> Reward:
    """The function, with numbers in a list, an array or integers returned as a float tensor; two towers as they are."""
    if isinstance(function, TwoTower):
        return function

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        values = function(images, prompts)
        if isinstance(values, torch.Tensor) and values.is_floating_point():
            return values
        try:
            return torch.as_tensor(values, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError):
            return values  # the loop says what it expected

    return reward


def _made(kind: Callable[..., Any], source: str | None) -> Any:
    return kind(source) if inspect.signature(kind).parameters else kind()


def _somebody_elses(entry: Entry, source: str | None) -> Reward:
    if names_a_file(entry.place):
        found = load_object(entry.place, key="reward.name")
    else:
        module, _, attribute = entry.place.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            raise InputError(f"reward.name {entry.name}: cannot load {entry.place} ({error})") from error
    if inspect.isclass(found):
        found = _made(found, source)
    if not callable(found):
        kind = type(found).__name__
        raise InputError(f"reward.name: {entry.name} is a {kind}; expected a function of images and prompts")
    return as_reward(found)
