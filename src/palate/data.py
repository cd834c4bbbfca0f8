"""What a recipe reads from disk: prompts, captioned images, preference pairs. Local files only.

Prompts come from .txt (one a line), .jsonl, .json, .csv, .tsv or .parquet. The public sets are read as published:

    HPDv2 benchmark   anime.json, photo.json, ...        a list of prompts
    HPDv2 pairs       train.json                         prompt, image_path [a, b], human_preference [1, 0]
    PartiPrompts      PartiPrompts.tsv                   Prompt, Category, Challenge
    DrawBench         .csv or .parquet                   Prompts, Category
    GenEval           evaluation_metadata.jsonl          prompt, tag, include, exclude
    Pick-a-Pic        .parquet                           caption, jpg_0, jpg_1, label_0, label_1, has_label
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from palate.runtime.deprecated import old_names
from palate.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from palate.core import Model

TEXT_LIMIT = 64 * 1024 * 1024  # bytes of a prompt file
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")  # case does not matter; the first that is there
ENCODED_TOGETHER = 32  # images
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class RecipeError(InputError):
    """Everything that is wrong with a recipe or with a file that it names, a line each."""


class Pair(NamedTuple):
    """Two images of one prompt and which one people chose. An image is a file or its encoded bytes."""

    prompt: str
    first: Path | bytes
    second: Path | bytes
    preference: float  # share of votes for the first: 1, 0, or 0.5 for a tie


# ------------------------------------------------------------------------------------------------------ prompts


def read_prompts(source: str) -> list[str]:
    """Prompts of a file: a path, or the name of a .txt in the package. Blank lines and # lines of .txt do not count."""
    path = Path(source)
    packaged = importlib.resources.files("palate") / "assets" / "prompts" / f"{source.removesuffix('.txt')}.txt"
    if not path.is_file() and path.name == source and packaged.is_file():
        prompts = _lines(packaged.read_text("utf-8"))
    elif not path.is_file():
        raise RecipeError(f"prompt file {source!r} does not exist; give a text file with one prompt a line")
    elif path.suffix.lower() in _TABLES:
        prompts = [prompt for _, prompt in prompt_rows(source)]
    else:
        prompts = _lines(read_text(path, limit=TEXT_LIMIT))
    if not prompts:
        raise RecipeError(f"prompt file {source!r} holds no prompt; write one a line")
    return prompts


def prompt_rows(source: str) -> list[tuple[dict[str, Any], str]]:
    """(row, prompt) of a table: the row keeps what else is published beside the prompt (Category, tag, ...)."""
    path, found = Path(source), []
    for number, row in enumerate(read_rows(path), 1):
        column = _prompt_column(row)
        if column is None:
            raise RecipeError(
                f"{path}, row {number}: no prompt in it; expected a column named {', '.join(PROMPT_COLUMNS)}, "
                f"got {', '.join(map(str, row)) or 'nothing'}"[:300]
            )
        prompt = row[column]
        if not isinstance(prompt, str):
            raise RecipeError(f"{path}, row {number}: {column} is {type(prompt).__name__}; expected text")
        if prompt.strip():
            found.append((row, " ".join(prompt.split())))
    return found


def geneval(source: str) -> list[dict[str, Any]]:
    """The rows of GenEval's metadata: {"tag", "include": [{"class", "count", ...}], "prompt", perhaps "exclude"}."""
    rows = []
    for number, (row, prompt) in enumerate(prompt_rows(source), 1):
        wanted = row.get("include")
        if (
            not isinstance(row.get("tag"), str)
            or not isinstance(wanted, list)
            or not all(
                isinstance(item, dict) and isinstance(item.get("class"), str) and isinstance(item.get("count"), int)
                for item in wanted
            )
        ):
            raise RecipeError(
                f"{source}, row {number}: expected GenEval metadata, "
                '{"tag", "include": [{"class", "count"}], "prompt"}'
            )
        rows.append({**row, "prompt": prompt})
    return rows


def evenly_spaced(prompts: Sequence[str], count: int = 256) -> list[str]:
    """At most `count` different prompts, evenly spaced over the list."""
    different = list(dict.fromkeys(prompts))
    count = min(count, len(different))
    return [different[i * len(different) // count] for i in range(count)]


# ------------------------------------------------------------------------------------------------------- pairs


def preference_pairs(source: str) -> Iterator[Pair]:
    """Pairs of Pick-a-Pic (.parquet) or HPDv2 (train.json beside its images), in the file's order.

    Rows without a label are left out. Pick-a-Pic is read row group by row group: its files are large.
    """
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"pairs file {source!r} does not exist; give a Pick-a-Pic .parquet or HPDv2's train.json")
    for number, row in enumerate(_parquet(path) if path.suffix.lower() == ".parquet" else read_rows(path), 1):
        if {"caption", "jpg_0", "jpg_1", "label_0"} <= row.keys():
            if row.get("has_label", True) and row["jpg_0"] and row["jpg_1"]:
                yield Pair(row["caption"], row["jpg_0"], row["jpg_1"], _share(path, number, row["label_0"]))
        elif {"prompt", "image_path", "human_preference"} <= row.keys():
            if len(row["image_path"]) != 2 or len(row["human_preference"]) != 2:
                raise RecipeError(f"{path}, row {number}: expected two images and two votes, as in HPDv2's train.json")
            first, second = (_inside(path.parent, name) for name in row["image_path"])
            votes = [float(vote) for vote in row["human_preference"]]
            yield Pair(row["prompt"], first, second, _share(path, number, votes[0] / sum(votes) if sum(votes) else 0.5))
        else:
            raise RecipeError(
                f"{path}, row {number}: neither Pick-a-Pic (caption, jpg_0, jpg_1, label_0) nor HPDv2 "
                f"(prompt, image_path, human_preference); got {', '.join(map(str, row))}"[:300]
            )


def _share(path: Path, number: int, value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RecipeError(f"{path}, row {number}: a preference of {value!r}; expected a number from 0 to 1")
    return float(value)


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise RecipeError(f"{folder}: the image path {name!r} leaves the folder of its list")
    return path


# ------------------------------------------------------------------------------------------------------ images


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) pairs of a folder, sorted by name.

    Captions come from metadata.jsonl ({"file_name", "text"} a line), captions.txt (`name<TAB>caption` a line), or a
    text file of the image's own stem.
    """
    if not folder.is_dir():
        raise RecipeError(f"prompts.images: {folder} is not a folder")
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
    if not images:
        raise RecipeError(f"prompts.images: {folder} holds no .png, .jpg, .webp or .bmp image")
    captions = _captions(folder, images)
    missing = [path.name for path in images if not captions.get(path.name)]
    if missing:
        raise RecipeError(
            f"prompts.images: {len(missing)} of {len(images)} images have no caption, {missing[0]} for one; "
            f"write {Path(missing[0]).stem}.txt, or a line in captions.txt (name<TAB>caption) or metadata.jsonl"
        )
    return [(path, captions[path.name]) for path in images]


def _captions(folder: Path, images: list[Path]) -> dict[str, str]:
    rows: dict[str, str] = {}
    if (file := folder / "metadata.jsonl").is_file():
        for number, line in enumerate(read_text(file, limit=TEXT_LIMIT).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows[str(row["file_name"])] = str(row["text"]).strip()
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(f'{file}, line {number}: expected {{"file_name": ..., "text": ...}}') from error
    elif (file := folder / "captions.txt").is_file():
        for number, line in enumerate(read_text(file, limit=TEXT_LIMIT).splitlines(), 1):
            if not line.strip():
                continue
            image, tab, caption = line.partition("\t")
            if not tab:
                raise RecipeError(f"{file}, line {number}: expected the image's name, a tab, the caption")
            rows[image.strip()] = caption.strip()
    else:
        for path in images:
            if (own := path.with_suffix(".txt")).is_file():
                rows[path.name] = " ".join(read_text(own, limit=TEXT_LIMIT).split())
    return rows


def check_images(images: Sequence[Path | bytes]) -> None:
    """RecipeError naming the first image that is missing, cut short or something else; decodes none of them."""
    for image in images:
        with _opened(image) as opened:
            opened.verify()


def load_images(paths: Sequence[Path | bytes], *, size: int | tuple[int, int]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of files or encoded bytes, scaled to cover `size` (a side, or height and width) and cut
    around the middle."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    height, width = (size, size) if isinstance(size, int) else size
    rows = []
    for path in paths:
        with _opened(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        rows.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255)
    return torch.stack(rows)


@contextmanager
def _opened(image: Path | bytes) -> Iterator[Any]:
    """The picture of a file or of encoded bytes; what goes wrong while it is used is an error that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            yield opened
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = f"{len(image)} bytes of a table" if isinstance(image, bytes) else image
        raise RecipeError(f"cannot read the image {what} ({error}); repair or remove it") from error


def encode_images(model: Model, images: Sequence[Path | bytes]) -> Tensor:
    """Latents of all images, once, so that training never runs the encoder; a few pictures in memory at a time."""
    import torch

    chunks = (images[k : k + ENCODED_TOGETHER] for k in range(0, len(images), ENCODED_TOGETHER))
    with torch.no_grad():
        return torch.cat([model.encode(load_images(chunk, size=model.image_size)) for chunk in chunks])


# ------------------------------------------------------------------------------------------------------- files


def read_text(path: Path, *, limit: int) -> str:
    """A file of UTF-8 text of at most `limit` bytes; InputError names the file and what is wrong with it."""
    try:
        if path.stat().st_size > limit:
            raise RecipeError(f"{path} is larger than {limit // 1024} KiB")
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file; a plain text in a list counts as {"prompt": text}."""
    reader = _TABLES.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"{path}: expected a file ending in {', '.join(_TABLES)}")
    rows = []
    for number, row in enumerate(reader(path), 1):
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise RecipeError(f"{path}, row {number}: expected a prompt or a mapping, got {type(row).__name__}")
        rows.append(row)
    return rows


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(read_text(path, limit=TEXT_LIMIT).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{path}, line {number}: not JSON ({str(error)[:80]})") from error


def _json(path: Path) -> list[Any]:
    try:
        tree = json.loads(read_text(path, limit=TEXT_LIMIT * 16))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path}: not JSON ({str(error)[:80]})") from error
    if not isinstance(tree, list):
        raise RecipeError(f"{path}: expected a list of prompts or of mappings, got {type(tree).__name__}")
    return tree


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    text = read_text(path, limit=TEXT_LIMIT).removeprefix("\ufeff")
    try:
        yield from csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", restkey="more"
        )
    except csv.Error as error:
        raise RecipeError(f"{path}: not a table ({error})") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError(
            f"{path}: reading .parquet needs pyarrow; install it with pip install 'palate[data]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"{path}: not a readable parquet file ({str(error)[:120]})") from error


def _prompt_column(row: dict[str, Any]) -> str | None:
    names = {str(name).strip().lower(): name for name in row}
    return next((names[column] for column in PROMPT_COLUMNS if column in names), None)


_TABLES = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}

__getattr__ = old_names(__name__, {"spread": evenly_spaced})
