"""The prompt sets that papers report on: where they are published, under which licence, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from palate.data.prompts import prompt_rows
from palate.data.tables import TABLES, RecipeError

CATEGORY = ("Category", "category")


class PromptSet(NamedTuple):
    """`place` is a dataset of the hub, or an https address for a single file; "" where none may be fetched."""

    title: str
    place: str
    files: tuple[str, ...]
    licence: str
    size: int


PROMPT_SETS = {
    "drawbench": PromptSet("DrawBench (Imagen, arXiv 2205.11487)", "", (), "none stated by its authors", 200),
    "hpdv2": PromptSet(
        "HPDv2 benchmark (arXiv 2306.09341)",
        "ymhao/HPDv2",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        "Apache-2.0",
        3200,
    ),
    "parti": PromptSet(
        "PartiPrompts (arXiv 2206.10789)",
        "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv",
        ("PartiPrompts.tsv",),
        "Apache-2.0",
        1632,
    ),
}


def find_prompt_set(name: str) -> list[Path] | None:
    """The files of a set where `palate fetch` left them; None where one is missing."""
    known = PROMPT_SETS[name]
    if not known.place:
        return None
    if known.place.startswith("https://"):
        file = beside_the_cache(known.place)
        return [file] if file.is_file() else None
    found = [try_to_load_from_cache(known.place, file, repo_type="dataset") for file in known.files]
    return [Path(file) for file in found if isinstance(file, str)] if all(isinstance(f, str) for f in found) else None


def beside_the_cache(address: str) -> Path:
    """Where a file that is not on the hub is kept: in the folder `palate` beside the hub's cache."""
    return Path(HF_HUB_CACHE).parent / "palate" / address.rsplit("/", 1)[1]


def read_prompt_set(files: Sequence[Path]) -> dict[str, str]:
    """Prompt -> its category ("" without one), each prompt once: the column Category, or of several files their names.

    A folder stands for the tables in it."""
    paths = [path for file in files for path in (_tables(file) if file.is_dir() else [file])]
    found: dict[str, str] = {}
    for path in paths:
        for row, prompt in prompt_rows(str(path)):
            category = next((str(row[name]) for name in CATEGORY if row.get(name)), path.stem if len(paths) > 1 else "")
            found.setdefault(prompt, category)
    if not found:
        raise RecipeError(f"{', '.join(map(str, files))}: no prompt in it")
    return found


def _tables(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
    if not found:
        raise RecipeError(f"{folder} holds no table of prompts ({', '.join(TABLES)})")
    return found
