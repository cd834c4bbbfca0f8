"""Loads rewards by the names of `palate.rewards.table`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from os.path import expanduser
from typing import Any

import torch

from palate.core import Reward, TwoTower
from palate.rewards.combine import as_tensor_reward
from palate.rewards.table import Entry, find
from palate.runtime.code import imported, load_object, names_a_file, refused_call, short_name
from palate.runtime.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_reward(name: str, source: str | None = None, dtype: str | None = None) -> Reward:
    """A reward by name. source: where its weights or its server are; dtype: of a published one's weights.

    InputError: there is no such reward, or its weights cannot be found or read.
    """
    entry = find(name)
    if entry.kind == "external":
        return _external(entry, source)
    found = imported(*entry.place.split(":"))
    if entry.kind == "function":
        return found
    if entry.kind == "embedded":
        return found(name)
    if entry.kind in ("service", "taste"):
        return found(source)
    source = source and expanduser(source)
    if dtype is None:
        return found(source)
    if dtype not in DTYPES:
        raise InputError(f"reward.dtype got {dtype!r}; expected one of {', '.join(map(repr, DTYPES))}")
    return found(source, dtype=DTYPES[dtype])


def _external(entry: Entry, source: str | None) -> Reward:
    """A reward that is not Palate's: the object, or one object of the class; its numbers as a float tensor."""
    if names_a_file(entry.place):
        found = load_object(entry.place, key="reward.name")
    else:
        try:
            found = imported(*entry.place.split(":"))
        except (ModuleNotFoundError, AttributeError, TypeError) as error:
            raise InputError(f"reward.name {entry.name}: cannot load {entry.place} ({error})") from error
    if inspect.isclass(found):
        make: Callable[..., Any] = found
        found = make(source) if inspect.signature(make).parameters else make()
    if not callable(found):
        kind = type(found).__name__
        raise InputError(f"reward.name: {entry.name} is a {kind}; expected a function of images and prompts")
    if problem := refused_call(found, None, []):
        raise InputError(f"reward.name: {short_name(entry.name)} is called as (images, prompts): {problem}")
    return found if isinstance(found, TwoTower) else as_tensor_reward(found)
