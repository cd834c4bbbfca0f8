"""Prompts of text files and tables, and GenEval's metadata."""

from __future__ import annotations

import importlib.resources
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.data.checklists import is_checklist, read_checklists
from palate.data.tables import TABLES, TEXT_LIMIT, RecipeError, read_rows, read_text
from palate.runtime.errors import InputError
from palate.runtime.files import split_lines

OPTIONS = re.compile(r" --(?:n|w|h|d|l|s|ar|no|v|niji|seed|stylize|chaos) \S")  # of sd-scripts and Midjourney
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")  # case does not matter; the first that is there


def read_prompts(source: str) -> list[str]:
    """Prompts of a file: a path, or the name of a .txt in the package. Blank lines and # lines of .txt do not count."""
    path = Path(source)
    packaged = importlib.resources.files("palate") / "assets" / "prompts" / f"{source.removesuffix('.txt')}.txt"
    if not path.is_file() and path.name == source and packaged.is_file():
        prompts = _lines(packaged.read_text("utf-8"))
    elif path.is_dir():
        raise RecipeError(f"prompt file {source!r} is a folder; pictures with captions are prompts.images")
    elif not path.is_file():
        raise RecipeError(f"prompt file {source!r} does not exist; give a text file with one prompt per line")
    elif is_checklist(path):
        prompts = [item.prompt for item in read_checklists(path)]
    elif path.suffix.lower() in TABLES:
        prompts = [prompt for _, prompt in prompt_rows(source)]
    elif path.suffix.lower() in (".yaml", ".yml"):
        raise RecipeError(f"prompt file {source!r} is YAML; write the prompts one per line, or as .jsonl or .csv")
    else:
        prompts = _lines(read_text(path, limit=TEXT_LIMIT))
        if all(prompt.startswith("{") and prompt.endswith("}") for prompt in prompts[:3]) and prompts:
            raise RecipeError(f"prompt file {source!r} holds JSON lines; give it a name that ends in .jsonl")
    if options := [prompt for prompt in prompts if OPTIONS.search(prompt)]:
        logging.getLogger("palate").warning(
            "%s: %d prompts hold options of another program, as %r, which are read as words; take them out",
            source, len(options), options[0][-80:],
        )  # fmt: skip
    if not prompts:
        raise RecipeError(f"prompt file {source!r} holds no prompt; write one per line")
    return prompts


def prompts_at(key: str, file: str) -> list[str]:
    """The prompts of the file that this key of a recipe names. RecipeError, which names the key: it cannot be read."""
    try:
        return read_prompts(file)
    except InputError as error:
        raise RecipeError(f"{key}: {error}") from error


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
            or not wanted
            or not all(map(_is_geneval_thing, wanted))
        ):
            raise RecipeError(
                f"{source}, row {number}: expected GenEval metadata, "
                '{"tag", "include": [{"class", "count", perhaps "position": ["left of", 0]}], "prompt"}'
            )
        rows.append({**row, "prompt": prompt})
    return rows


def _is_geneval_thing(item: Any) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("class"), str) or not isinstance(item.get("count"), int):
        return False
    place = item.get("position", [""])  # ["left of", the number of the other thing]
    return isinstance(place, list) and bool(place) and isinstance(place[0], str)


def listed(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. InputError: a single text, of which Python would make a list of letters."""
    if isinstance(prompts, str):
        raise InputError(f"prompts: expected a list of prompts, got the text {prompts!r}; write [{prompts!r}]")
    if isinstance(prompts, Path):
        raise InputError(f"prompts: expected a list of prompts, got a path; palate.data.read_prompts reads {prompts}")
    return list(prompts)


def evenly_spaced(prompts: Sequence[str], count: int = 256) -> list[str]:
    """At most `count` different prompts, evenly spaced over the list."""
    different = list(dict.fromkeys(prompts))
    count = min(count, len(different))
    return [different[i * len(different) // count] for i in range(count)]


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in split_lines(text)]
    return [line for line in lines if line and not line.startswith("#")]


def _prompt_column(row: dict[str, Any]) -> str | None:
    names = {str(name).strip().lower(): name for name in row}
    return next((names[column] for column in PROMPT_COLUMNS if column in names), None)
