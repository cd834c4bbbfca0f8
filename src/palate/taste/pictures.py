"""Choices as a taste reads them: pictures of any form, and the features of each, looked at once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palate.runtime.errors import InputError
from palate.runtime.files import parse_json, split_lines
from palate.runtime.images import UNREADABLE, as_rgb, from_pixels, read_pixels
from palate.taste.features import Features
from palate.taste.learner import Array
from palate.taste.votes import VoteStore, choice_of

BATCH = 64
PIXELS = BATCH * 512 * 512  # that are looked at together at most: photographs of a phone come one by one
POOL = 240  # pictures of the studio's pool that are looked at


class Choice(NamedTuple):
    """Two pictures of one prompt and what was chosen. A picture is (3, H, W) in [0, 1], a PIL image, or a file."""

    prompt: str
    left: Any
    right: Any
    choice: str = "tie"  # one of votes.CHOICES
    rater: str = ""
    name: str = ""


def read_choices(votes: str | Path | VoteStore | Sequence[Any]) -> list[Choice]:
    """The votes as `Choice`s with files for pictures; those whose pictures are gone are left out."""
    if isinstance(votes, (str, Path)):
        votes = VoteStore(votes)
    if isinstance(votes, VoteStore):
        found, missing = votes.with_pictures()
        if not found and missing:
            raise InputError(f"the pictures of all {missing} votes are gone from {votes.pictures}; copy them back")
        opens = functools.cache(lambda picture: _opens(votes.path_of(picture)))
        there = [vote for vote in found if opens(vote.left) and opens(vote.right)]
        if lost := missing + len(found) - len(there):
            logging.getLogger("palate").warning(
                "%s: %d of %d votes do not count: a picture of them is gone or damaged",
                votes.file, lost, missing + len(found),
            )  # fmt: skip
        if not there and found:
            raise InputError(f"the pictures of all votes in {votes.pictures} are damaged; copy them back")
        paths = [(votes.path_of(v.left), votes.path_of(v.right)) for v in there]
        return [
            Choice(v.prompt, left, right, v.choice, v.rater, f"{left.name}{right.name}")
            for v, (left, right) in zip(there, paths, strict=True)
        ]
    return [as_choice(vote) for vote in votes]


def pool_beside(votes: str | Path | VoteStore | Sequence[Any]) -> tuple[Tensor, list[str]] | None:
    """At most POOL pictures that the studio drew to be voted on, evenly over its list beside the votes, and what each
    was shown for; None where there is no such list, or its pictures are of several sizes."""
    if not isinstance(votes, (str, Path, VoteStore)):
        return None
    store = votes if isinstance(votes, VoteStore) else VoteStore(votes)
    found: list[tuple[Path, str]] = []
    path = store.folder / "pool.jsonl"
    for line in split_lines(path.read_text("utf-8", "replace")) if path.is_file() else ():
        try:
            row = parse_json(line)
            found.append((store.pictures / str(row["file"]), str(row["shown"])))
        except (ValueError, TypeError, KeyError):
            continue  # a line that was cut short
    found = [(file, shown) for file, shown in found if file.is_file()]
    found = found[:: -(-len(found) // POOL) if found else 1]
    images = [as_image(file) for file, _ in found]
    if len(images) < 2 or len({image.shape for image in images}) > 1:
        return None
    return torch.stack(images), [shown for _, shown in found]


def as_choice(pair: Any) -> Choice:
    """A `Choice` from what a caller may give instead of one."""
    if isinstance(pair, Choice):
        return pair
    if isinstance(pair, Mapping):
        if not {"left", "right"} <= pair.keys():
            raise InputError(f"a pair needs left and right, got {', '.join(map(str, pair))}")
        choice = choice_of(pair.get("choice", "tie"))
        return Choice(str(pair.get("prompt", "")), pair["left"], pair["right"], choice, str(pair.get("rater") or ""))
    if isinstance(pair, (tuple, list)) and len(pair) in (2, 3):
        return Choice(str(pair[2]) if len(pair) == 3 else "", pair[0], pair[1])
    raise InputError(f"expected pairs as (left, right, prompt) or mappings, got {type(pair).__name__}")


def as_image(picture: Any) -> Tensor:
    """(3, H, W) in [0, 1] of a tensor, a PIL image or a file."""
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
            raise InputError(f"a picture of shape {tuple(picture.shape)}; expected (3, H, W) floats in [0, 1]")
        return picture.detach().float().cpu()
    if isinstance(picture, Image.Image):
        return from_pixels(np.asarray(as_rgb(picture)))
    if isinstance(picture, (str, Path)):
        try:
            return from_pixels(read_pixels(Path(picture)))
        except UNREADABLE as error:
            raise InputError(f"cannot read the picture {picture}: {error}") from error
    raise InputError(f"expected a picture as a tensor, a PIL image or a file, got {type(picture).__name__}")


def _opens(file: Path) -> bool:
    """Whether the picture is whole."""
    try:
        read_pixels(file)
    except UNREADABLE:
        return False
    return True


def raw_features(features: Features, images: Tensor, prompts: Sequence[str]) -> Array:
    """(N, D) in batches, without gradient."""
    size = _at_once(images)
    with torch.no_grad():
        parts = [features(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
    return torch.cat(parts).double().cpu().numpy()


def _at_once(image: Tensor) -> int:
    """How many pictures (..., H, W) of that size are looked at together."""
    return max(1, min(BATCH, PIXELS // (image.shape[-2] * image.shape[-1])))


def features_of_choices(features: Features, choices: Sequence[Choice]) -> tuple[Array, Array]:
    """Features (n, D) of the left and of the right pictures; one that occurs in several votes is looked at once."""
    index: dict[tuple[Any, str], int] = {}
    wanted: list[tuple[Any, str]] = []
    places = []
    for choice in choices:
        for picture in (choice.left, choice.right):
            key = (str(picture) if isinstance(picture, (str, Path)) else id(picture), choice.prompt)
            if key not in index:
                index[key] = len(wanted)
                wanted.append((picture, choice.prompt))
            places.append(index[key])
    rows: list[Array | None] = [None] * len(wanted)
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}  # by size, of which at most a batch is in memory

    def look(members: list[tuple[int, Tensor]]) -> None:
        places, images = zip(*members, strict=True)
        found = raw_features(features, torch.stack(images), [wanted[i][1] for i in places])
        for i, row in zip(places, found, strict=True):
            if not np.isfinite(row).all():
                picture, shape = wanted[i][0], images[0].shape
                name = picture if isinstance(picture, (str, Path)) else "a picture"
                raise InputError(
                    f"{name} of {shape[2]} x {shape[1]} pixels has no finite features; give one of 2 x 2 or more"
                )
            rows[i] = row

    for i, (picture, _) in enumerate(wanted):
        image = as_image(picture)
        own = waiting.setdefault(tuple(image.shape), [])
        own.append((i, image))
        if len(own) == _at_once(image):
            look(waiting.pop(tuple(image.shape)))
    for members in waiting.values():
        look(members)
    table = np.stack([row for row in rows if row is not None])[places].reshape(len(choices), 2, -1)
    return table[:, 0], table[:, 1]
