"""Preference pairs as they are published, Pick-a-Pic and HPDv2; and single likes, a picture and a yes or no a row."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from palate.data.tables import RecipeError, parquet_rows, read_rows


class Pair(NamedTuple):
    """Two images of one prompt and which one people chose. An image is a file or its encoded bytes."""

    prompt: str
    first: Path | bytes
    second: Path | bytes
    preference: float  # share of votes for the first: 1, 0, or 0.5 for a tie


class Like(NamedTuple):
    """An image, a file or its encoded bytes, and whether somebody likes it for the prompt."""

    prompt: str
    image: Path | bytes
    like: bool


LIKES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # as text, in lower case


def preference_pairs(source: str) -> Iterator[Pair]:
    """Pairs of Pick-a-Pic (.parquet) or HPDv2 (train.json, its images beside it or in train/), in the file's order.

    Rows without a label are left out, and so are those that lack a picture, which are counted in a warning. Pick-a-Pic
    is read row group by row group: its files are large.
    """
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"pairs file {source!r} does not exist; give a Pick-a-Pic .parquet or HPDv2's train.json")
    lacking = 0
    for number, row in enumerate(parquet_rows(path) if path.suffix.lower() == ".parquet" else read_rows(path), 1):
        if {"caption", "jpg_0", "jpg_1", "label_0"} <= row.keys():
            labelled, whole = row.get("has_label", True), row["jpg_0"] and row["jpg_1"]
            lacking += bool(labelled and not whole)
            if labelled and whole:
                first, second = (image["bytes"] if isinstance(image, dict) and "bytes" in image else image
                                 for image in (row["jpg_0"], row["jpg_1"]))  # fmt: skip
                _check(path, number, row["caption"], [first, second], bytes, [])
                yield Pair(" ".join(row["caption"].split()), first, second, _share(path, number, row["label_0"]))
        elif {"prompt", "human_preference"} <= row.keys() and (names := row.get("file_path") or row.get("image_path")):
            _check(path, number, row["prompt"], names, str, row["human_preference"])
            first, second = (_picture_of(path, name) for name in names)
            votes = [float(vote) for vote in row["human_preference"]]
            yield Pair(
                " ".join(row["prompt"].split()),
                first,
                second,
                _share(path, number, votes[0] / sum(votes) if sum(votes) else 0.5),
            )
        elif {"image", "like"} <= row.keys():
            raise RecipeError(
                f"{path}, row {number}: one picture and a like, where a pair is expected; give the file as "
                "prompts.likes, with algorithm.loss=kto"
            )
        else:
            raise RecipeError(
                f"{path}, row {number}: neither Pick-a-Pic (caption, jpg_0, jpg_1, label_0) nor HPDv2 "
                f"(prompt, file_path, human_preference); got {', '.join(map(str, row))}"[:300]
            )
    if lacking:
        logging.getLogger("palate").warning(
            "prompts.pairs: %d rows of %s lack a picture and are left out", lacking, path
        )


def single_likes(source: str) -> Iterator[Like]:
    """Rows {"prompt", "image", "like"} of a .jsonl, .json, .csv, .tsv or .parquet, in the file's order.

    image: a file beside the list, or of .parquet its bytes. like: true or false, also 1 or 0, and as text yes or no.
    """
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f'likes file {source!r} does not exist; give rows {{"prompt", "image", "like"}}, as .jsonl')
    for number, row in enumerate(parquet_rows(path) if path.suffix.lower() == ".parquet" else read_rows(path), 1):
        if row.keys() & {"jpg_0", "human_preference", "left"}:
            raise RecipeError(
                f"{path}, row {number}: a pair of pictures, where single likes are expected; give the file as "
                "prompts.pairs"
            )
        if lacking := [key for key in ("prompt", "image", "like") if row.get(key) is None]:
            raise RecipeError(
                f'{path}, row {number}: expected {{"prompt": text, "image": FILE, "like": true or false}}; '
                f"it lacks {lacking[0]}"
            )
        like = LIKES.get(str(row["like"]).strip().lower().removesuffix(".0"))
        if like is None:
            raise RecipeError(f"{path}, row {number}: a like of {str(row['like'])[:40]!r}; expected true or false")
        image = row["image"]["bytes"] if isinstance(row["image"], dict) and "bytes" in row["image"] else row["image"]
        if not isinstance(image, (str, bytes)) or not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise RecipeError(f"{path}, row {number}: expected a prompt in words, and an image as the name of its file")
        yield Like(" ".join(row["prompt"].split()), _picture_of(path, image) if isinstance(image, str) else image, like)


def _check(path: Path, number: int, prompt: Any, images: Any, kind: type, votes: Any) -> None:
    """RecipeError unless a pair is two images of the kind for a prompt in words, with two numbers or none as votes."""
    good = isinstance(images, list) and len(images) == 2 and all(isinstance(image, kind) for image in images)
    good = good and isinstance(votes, list) and len(votes) == (0 if kind is bytes else 2)
    if (
        not good
        or not isinstance(prompt, str)
        or not prompt.strip()
        or not all(isinstance(vote, (int, float)) for vote in votes)
    ):
        what = "two images as bytes" if kind is bytes else "two images by name and two votes, as in HPDv2's train.json"
        raise RecipeError(f"{path}, row {number}: expected {what}, and a prompt in words")


def _share(path: Path, number: int, value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RecipeError(f"{path}, row {number}: a preference of {value!r}; expected a number from 0 to 1")
    return float(value)


def _picture_of(listed: Path, name: str) -> Path:
    """The picture that a list names: beside the list, or in the folder of the list's own name (train.json: train/).

    A name never leads out of that folder; links that lie in it are followed, wherever they lead.
    """
    folder, given = listed.parent, Path(name)
    if given.is_absolute() and given.is_relative_to(folder.absolute()):
        name = str(given.relative_to(folder.absolute()))
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise RecipeError(
            f"{listed}: the image path {name!r} leaves the folder of its list; put the pictures there and write their "
            "names as they are seen from it"
        )
    inner = folder / listed.stem / name
    return inner if inner.is_file() and not (folder / name).is_file() else folder / name
