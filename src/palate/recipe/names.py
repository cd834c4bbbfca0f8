"""The names of parts that a recipe may hold: published ones, those of installed packages, and files by path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from palate.models import families
from palate.rewards import table as rewards
from palate.runtime.code import names_a_file

PYTHON = "python:"  # begins the name of a part that was an object: recipe.yaml of a run that Python began


def near(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean X?" for the nearest of the known words, or "" where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def _one_of(name: str, known: tuple[str, ...], example: str) -> str:
    if names_a_file(name) or name in known:
        return name
    hint = near(name, known) or f"; expected one of {', '.join(known)}, or {example}"
    raise ValueError(f"there is no {name!r}{hint}")


def _model_name(name: str) -> str:
    return _one_of(name, families.names(), "FILE.py:CLASS")


def _reward_name(name: str) -> str:
    return _one_of(name, rewards.names(), "FILE.py:FUNCTION")


def _source_name(name: str) -> str:
    known = tuple(each for each in rewards.names() if rewards.find(each).takes_source)
    if name in rewards.names() and name not in known:
        raise ValueError(f"{name} comes with the package and has no source; leave it out")
    return _one_of(name, known, "FILE.py:CLASS")


RewardName = Annotated[str, AfterValidator(_reward_name)]
SourceName = Annotated[str, AfterValidator(_source_name)]
ModelName = Annotated[str, AfterValidator(_model_name)]
