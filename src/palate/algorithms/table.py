"""Algorithms by name, `algorithm.name` of a recipe: Palate's own, those of installed packages, and files by path.

An installed package adds an algorithm by an entry point, whose object is the class:

    [project.entry-points."palate.algorithms"]
    my-algorithm = "my_package.my_algorithm:Mine"

The class has `trains`, `step` and `__init__(self, settings: MineSettings)`, where MineSettings is a frozen dataclass:
its fields are the keys of the recipe's `algorithm` section. Without settings it takes no argument. It may also say, as
class attributes, `needs_reward_gradient` and `reads_pairs` (False where they are missing), and `reads_images` (true).

Nothing here imports an algorithm, or torch, before `Entry.load_class` is called.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from palate.runtime.code import imported, load_object, names_a_file
from palate.runtime.errors import InputError

GROUP = "palate.algorithms"
OWN = {  # name -> module:class
    "srpo": "palate.algorithms.srpo:SRPO",
    "sqdf": "palate.algorithms.sqdf:SQDF",
    "refl": "palate.algorithms.refl:ReFL",
    "draft": "palate.algorithms.draft:DRaFT",
    "ddpo": "palate.algorithms.ddpo:DDPO",
    "flow_grpo": "palate.algorithms.flow_grpo:FlowGRPO",
    "nft": "palate.algorithms.nft:NFT",
    "dpo": "palate.algorithms.dpo:DPO",
    "distar": "palate.algorithms.distar:Distar",
    "direct": "palate.algorithms.direct:Direct",
    "leap_align": "palate.algorithms.leap_align:LeapAlign",
    "dgpo": "palate.algorithms.dgpo:DGPO",
    "opd": "palate.algorithms.opd:OPD",
}


@dataclass(frozen=True)
class _NoSettings:
    """The settings of an algorithm that takes none."""


@dataclass(frozen=True)
class Entry:
    """One algorithm, not yet imported; `place` is module:class, or a file by path."""

    name: str
    place: str

    def load_class(self) -> Any:
        """The class, after importing its module. InputError: the package or file that names it does not have it."""
        if names_a_file(self.place):
            return load_object(self.place, key="algorithm.name")
        module, _, kind = self.place.partition(":")
        try:
            return imported(module, kind)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not (error.name and module.startswith(error.name)):
                raise
            raise InputError(
                f"algorithm.name {self.name}: there is no {kind} in {module}; reinstall its package"
            ) from error

    def settings_class(self) -> type:
        """The dataclass of its settings: the annotation of the class's one argument."""
        kind = self.load_class()
        hints = get_type_hints(kind.__init__) if inspect.isclass(kind) else {}
        named = [hint for key, hint in hints.items() if key != "return"]
        if not named:
            return _NoSettings
        if len(named) != 1 or not (isinstance(named[0], type) and dataclasses.is_dataclass(named[0])):
            raise InputError(
                f"algorithm.name {self.name}: expected a class with __init__(self, settings: S), S a dataclass"
            )
        return named[0]

    def make(self, settings: Any) -> Any:
        """The algorithm with these settings."""
        kind = self.load_class()
        return kind() if isinstance(settings, _NoSettings) else kind(settings)


def names() -> tuple[str, ...]:
    """Every algorithm's name: Palate's own first, then those of installed packages."""
    return (*OWN, *sorted(point.name for point in _installed() if point.name not in OWN))


def find(name: str) -> Entry:
    """The algorithm of that name, or of that file. InputError: there is none."""
    if names_a_file(name):
        return Entry(name, name)
    places = {point.name: point.value for point in _installed()} | OWN
    if name not in places:
        raise InputError(f"algorithm.name got {name!r}; expected one of {', '.join(names())}, or FILE.py:CLASS")
    return Entry(name, places[name])


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))
