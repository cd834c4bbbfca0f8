"""A folder of samples at a glance: grid.png, a row per prompt and a column per seed, and a page to enlarge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from palate.evaluate import read_index
from palate.report.html import render, write_page
from palate.report.pictures import picture
from palate.runtime.errors import InputError
from palate.runtime.images import UNREADABLE, as_rgb


def write_sheet(folder: Path) -> tuple[Path, Path]:
    """Write grid.png and index.html of the pictures that index.jsonl lists; return both paths."""
    rows = read_index(folder)
    by_prompt = _by_prompt(rows)
    columns = max(map(len, by_prompt.values()))
    tiles = {row["file"]: _open(folder / row["file"]) for row in rows}
    width, height = (max(size) for size in zip(*(tile.size for tile in tiles.values()), strict=True))
    grid = Image.new("RGB", (columns * width, len(by_prompt) * height), "white")
    for y, own in enumerate(by_prompt.values()):
        for x, row in enumerate(own):
            grid.paste(tiles[row["file"]], (x * width, y * height))
    grid.save(folder / "grid.png", optimize=True)
    return folder / "grid.png", write_page_of(folder)


def write_page_of(folder: Path) -> Path:
    """Write index.html: a row per prompt, every picture to enlarge."""
    rows = read_index(folder)
    by_prompt = _by_prompt(rows)
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    columns = max(map(len, by_prompt.values()))
    same = len(rows) == len(by_prompt) * len(seeds)
    cells = {
        row["file"]: {"src": picture(folder / row["file"]), "alt": f"{row['prompt']}, seed {row['seed']}"}
        for row in rows
    }
    table = {
        "heads": [{"name": f"seed {seeds[i]}" if same else f"{i + 1}.", "step": "", "words": ""}
                  for i in range(columns)],
        "rows": [
            {
                "prompt": prompt,
                "seed": None,
                "cells": [cells[row["file"]] for row in own],
            }
            for prompt, own in by_prompt.items()
        ],
    }  # fmt: skip
    return write_page(folder / "index.html", render("sheet.html", title=folder.resolve().name, grid=table))


def _by_prompt(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row)
    return found


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except UNREADABLE as error:
        raise InputError(f"image {path} cannot be read ({error}); sample again") from error
