"""Which published rewards can be loaded here without a download."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from palate.rewards.published import PUBLISHED, Download, PublishedReward

FETCHED = Path("weights")  # where `palate fetch` puts what it converts, a folder per reward
HPSV3 = ("HPSv3.safetensors", "config.json", "prompt.txt")  # of its folder; the last is the user's to add


class Standing(NamedTuple):
    """Of one published reward: the value of reward.source.NAME that loads it ("" = its default), None where its weights
    are not here; and the command that fetches them."""

    name: str
    source: str | None
    command: str

    @property
    def found(self) -> bool:
        """Whether it can be loaded."""
        return self.source is not None


def standings(sources: Mapping[str, str]) -> list[Standing]:
    """Every published reward: at `sources`[name] where that is a local path, in FETCHED, or in the hub's cache."""
    return [Standing(name, located(name, sources.get(name)), f"palate fetch {name}") for name in PUBLISHED]


def located(name: str, source: str | None = None) -> str | None:
    """The source that loads the reward without a download, None where there is none."""
    reward = PUBLISHED[name]
    if source is not None:
        source = expanduser(source)
        there = Path(source).exists() or _hub_cached(Download(source, reward.weights.files, 0.0))
        return source if there else None
    if reward.converted is not None:
        converted = FETCHED / name / reward.converted
        return str(converted) if converted.is_file() else None
    needed = HPSV3 if name == "hpsv3" else reward.weights.files[:1]
    if all((FETCHED / name / file).is_file() for file in needed):  # a folder of its own, as hpsv3 has
        return str(FETCHED / name)
    return "" if name != "hpsv3" and cached(reward) else None


def cached(reward: PublishedReward) -> bool:
    """Whether the hub's cache holds the reward's weights and their configuration."""
    return _hub_cached(reward.weights)


def _hub_cached(what: Download) -> bool:
    if what.place.count("/") != 1:
        return False
    files = [file for file in what.files if file.endswith((".safetensors", "config.json"))]
    return bool(files) and all(isinstance(try_to_load_from_cache(what.place, file), str) for file in files)
