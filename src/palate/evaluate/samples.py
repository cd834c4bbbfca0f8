"""Prompts x seeds -> images -> a folder of PNGs, and back.

A sample folder holds 0000.png ... and index.jsonl, one row per image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.core import Model, Random, Sampleable, Sampler, TextCached
from palate.data.prompts import listed
from palate.data.tables import TEXT_LIMIT, read_text
from palate.evaluate.metrics import Images
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json, split_lines, write_atomically, write_file
from palate.runtime.images import UNREADABLE, encode_png, from_pixels, read_pixels, to_pixels
from palate.runtime.phases import tell
from palate.runtime.progress import counted
from palate.sampling import sample

AT_ONCE = 32 * 512**2  # pixels of the images that are drawn together at most
ROOM = 2 << 30  # bytes of the images that are drawn before they are written
DEFAULT_STEPS = 25  # of a model that names none of its own


class Drawing(NamedTuple):
    """How images are drawn. None = the model's default; a `sampler` takes the place of steps and guidance."""

    steps: int | None = None
    guidance: float | None = None
    weights: str = "policy"
    batch_size: int = 32
    sampler: Sampler | None = None


# --- drawing --------------------------------------------------------------------------------------------------------


def steps_and_guidance(model: Model, how: Drawing) -> tuple[int, float]:
    """What `how` comes to: the sampler's steps without guidance; else what is given, else the model's own."""
    if how.sampler is not None:
        return how.sampler.steps, 1.0
    own = (model.default_steps, model.default_guidance) if isinstance(model, Sampleable) else (DEFAULT_STEPS, 1.0)
    return own[0] if how.steps is None else how.steps, own[1] if how.guidance is None else how.guidance


def pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """The rows of prompts x seeds, all seeds of the first prompt first, as `generate` draws them. InputError: none."""
    if not len(prompts) or not len(seeds):
        got = f"{counted(len(prompts), 'prompt')} and {counted(len(seeds), 'seed')}"
        raise InputError(f"got {got}; give at least one of each")
    return [p for p in prompts for _ in seeds], [int(s) for _ in prompts for s in seeds]


def generate(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    weights: str = "policy",
    batch_size: int = 32,
    sampler: Sampler | None = None,
) -> Tensor:
    """Images (len(prompts) * len(seeds), 3, H, W) on the CPU, in the order of `pairs`. The noise is a function of
    (seed, index of the prompt) alone: every model and batch size starts from the same. None = the model's default;
    a `sampler` takes the place of steps and guidance."""
    repeated, _ = pairs(listed(prompts), seeds)
    rows = [Random(int(s), 0, [i]) for i in range(len(prompts)) for s in seeds]
    noises = noises_of(rows, "evaluate", model.latent_shape, sampler)
    return draw(model, repeated, noises, Drawing(steps, guidance, weights, batch_size, sampler))


def generate_parts(
    model: Sampleable, prompts: Sequence[str], seeds: Sequence[int], how: Drawing, *, room: int = ROOM
) -> Iterator[Tensor]:
    """The images of `generate`, bit for bit, in parts of at most `room` bytes: so that long lists of prompts at
    high resolution need not be in memory at once."""
    repeated, _ = pairs(prompts, seeds)
    rows = [Random(int(s), 0, [i]) for i in range(len(prompts)) for s in seeds]
    together = at_once(model, how)
    part = max(1, room // (12 * pixels_of(model)) // together) * together  # float32 in three channels
    for start in range(0, len(rows), part):
        noises = noises_of(rows[start : start + part], "evaluate", model.latent_shape, how.sampler)
        yield draw(model, repeated[start : start + part], noises, how)


def pixels_of(model: Sampleable) -> int:
    """Of one image of the model."""
    size = model.image_size
    return size * size if isinstance(size, int) else size[0] * size[1]


def at_once(model: Model, how: Drawing) -> int:
    """Images that are drawn together: the batch, or as many as a card of 24 GB takes beside a large model."""
    return min(how.batch_size, max(1, AT_ONCE // pixels_of(model))) if isinstance(model, Sampleable) else how.batch_size


def noises_of(rows: Sequence[Random], purpose: str, shape: Sequence[int], sampler: Sampler | None) -> list[Tensor]:
    """What sampling starts from, and for a sampler that needs more than one noise the others; each (B, *shape)."""
    purposes = [purpose, *(f"{purpose}-{k}" for k in range(1, sampler.steps if sampler else 1))]
    return [torch.cat([row.normal(name, shape) for row in rows]) for name in purposes]


def draw(model: Model, prompts: Sequence[str], noises: Sequence[Tensor], how: Drawing) -> Tensor:
    """Images (B, 3, H, W) on the CPU, one for each prompt, from the noises (B, C, h, w)."""
    return torch.cat([images for images, _ in drawn(model, prompts, noises, how)])


@torch.no_grad()
def drawn(model: Model, prompts: Sequence[str], noises: Sequence[Tensor], how: Drawing) -> list[tuple[Tensor, Tensor]]:
    """Images (b, 3, H, W) and the latents (b, C, h, w) that they are of, both on the CPU, batch by batch."""
    if isinstance(model, Sampleable):
        device = model.device
    else:
        device = next((p.device for p in model.parameters("policy")), torch.device("cpu"))
    steps, guidance = steps_and_guidance(model, how)
    if not math.isfinite(guidance):
        raise InputError(f"guidance is {guidance}; expected a finite number, 1 = off")
    if steps < 1:
        raise InputError(f"steps is {steps}; expected 1 or more")
    if isinstance(model, TextCached):
        model.cache_prompts(prompts)  # so that no text encoder is in memory while the network runs
    found = []
    together = at_once(model, how)
    for start in range(0, len(prompts), together):
        tell("drawing", start, len(prompts))
        cond = model.encode_prompts(list(prompts[start : start + together]))
        parts = [noise[start : start + together].to(device) for noise in noises]
        if how.sampler is None:
            latents = sample(model, cond, parts[0], steps, guidance=guidance, weights=how.weights)
        else:
            latents = how.sampler(model, cond, parts, weights=how.weights)
        found.append((model.decode(latents).float().cpu(), latents.float().cpu()))
    tell("drawing", len(prompts), len(prompts))
    return found


# --- folders --------------------------------------------------------------------------------------------------------


def write_samples(
    folder: str | Path,
    images: Tensor | Iterable[Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float,
    steps: int,
    strengths: Sequence[float] | None = None,
) -> None:
    """PNGs 0000.png ... and index.jsonl, one row per image: {"file", "prompt", "seed", "guidance", "steps"}. `images`
    (N, 3, H, W) may come in parts.

    strengths: of the LoRA, one per image, where they differ; a row then has "strength".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.jsonl").unlink(missing_ok=True)  # of a set that is cut short nothing is taken for whole
    parts = [images] if isinstance(images, Tensor) else images
    pixels = (array for part in parts for array in to_pixels(part))
    rows = []
    for i, (array, prompt, seed) in enumerate(zip(pixels, prompts, seeds, strict=True)):
        write_file(folder / f"{i:04d}.png", encode_png(array))
        rows.append({"file": f"{i:04d}.png", "prompt": prompt, "seed": int(seed), "guidance": guidance, "steps": steps})
        if strengths is not None:
            rows[-1]["strength"] = strengths[i]
    write_atomically(folder / "index.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())


def write_strengths(
    folder: str | Path,
    drawn: Sequence[Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    *,
    guidance: float,
    steps: int,
) -> None:
    """`write_samples` of what a LoRA drew for prompts x seeds at each strength: of one prompt and seed, every strength
    side by side."""
    asked, noises = pairs(prompts, seeds)
    repeated, again = [prompt for prompt in asked for _ in strengths], [seed for seed in noises for _ in strengths]
    images, each = torch.stack(list(drawn), 1).flatten(0, 1), [*strengths] * len(asked)
    write_samples(folder, images, repeated, again, guidance=guidance, steps=steps, strengths=each)


def strength_text(strength: float) -> str:
    """The number in the fewest digits that tell it from every other: 0.5, 1."""
    return repr(float(strength)).removesuffix(".0")


def read_index(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of folder/index.jsonl, checked. Raises ValueError naming the file, line and remedy."""
    index = Path(folder) / "index.jsonl"
    if not index.is_file():
        raise InputError(f"{index} is missing; expected a sample folder such as runs/NAME/samples/step-000000")
    rows = []
    for number, line in enumerate(split_lines(read_text(index, limit=TEXT_LIMIT)), 1):
        try:
            row = parse_json(line)
            file, prompt, seed = row["file"], row["prompt"], row["seed"]
            good = isinstance(file, str) and isinstance(prompt, str) and type(seed) is int
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{index} line {number}: expected {{"file", "prompt", "seed", ...}}; got {line[:80]!r}'
            ) from error
        if not good or file != Path(file).name or file in ("", ".", ".."):
            raise InputError(
                f"{index} line {number}: file must be a plain name, prompt a string, seed an integer; got {line[:80]!r}"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{index} is empty; expected one row per image")
    return rows


class StoredImages:
    """The images (N, 3, H, W) in [0, 1] of a sample folder, read from their files a slice at a time. A missing or
    broken image, or one of another size than the first, is an InputError that names it."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        self.folder, self.files = folder, [row["file"] for row in rows]
        height, width = self._pixels(self.files[0]).shape[:2]
        self.shape = (len(rows), 3, height, width)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice, /) -> Tensor:
        height, width = self.shape[2:]
        images = []
        for file in self.files[rows]:
            array = self._pixels(file)
            if array.shape[:2] != (height, width):
                raise InputError(
                    f"image {self.folder / file} is {array.shape[1]}x{array.shape[0]}; "
                    f"expected {width}x{height} as the first"
                )
            images.append(array)
        return from_pixels(images)

    def _pixels(self, file: str) -> np.ndarray:
        path = self.folder / file
        try:
            return read_pixels(path)
        except FileNotFoundError as error:
            raise InputError(f"image {path} is missing, though index.jsonl lists it; sample again") from error
        except UNREADABLE as error:
            raise InputError(
                f"image {path} cannot be read ({error}); sample again or remove its row from index.jsonl"
            ) from error


def read_samples(folder: str | Path) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images (N, 3, H, W) in [0, 1] and the rows of index.jsonl. A missing or broken image: a ValueError names it."""
    rows = read_index(folder)
    return StoredImages(Path(folder), rows)[:], rows


def open_samples(folder: str | Path, room: int = ROOM) -> tuple[Images, list[dict[str, Any]]]:
    """As `read_samples`; images that take more than `room` bytes stay in their files until they are asked for."""
    rows = read_index(folder)
    images = StoredImages(Path(folder), rows)
    return (images if 4 * math.prod(images.shape) > room else images[:]), rows


def check_same(rows: Sequence[dict], others: Sequence[dict], name: str, other_name: str) -> None:
    """Raise ValueError unless both hold the same (prompt, seed) in the same order; the message says which differ."""
    for i, (row, other) in enumerate(zip(rows, others, strict=False)):
        for key in ("prompt", "seed"):
            if row[key] != other[key]:
                raise InputError(
                    f"{name} and {other_name} cannot be paired: {key} of row {i} is {row[key]!r} in the "
                    f"first, {other[key]!r} in the second; sample both with the same prompts and seeds"
                )
    if len(rows) != len(others):
        extra = next(iter(islice((rows if len(rows) > len(others) else others), min(len(rows), len(others)), None)))
        raise InputError(
            f"{name} and {other_name} cannot be paired: they hold {len(rows)} and {counted(len(others), 'image')}; the "
            f"first without a partner is prompt {extra['prompt']!r} seed {extra['seed']}; sample both with the same "
            "prompts and seeds"
        )
