"""A folder of samples at a glance: grid.png, a row per prompt, a column per seed, and a page to enlarge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from palate.evaluate import read_index
from palate.evaluate.samples import strength_text
from palate.report.html import render, write_page
from palate.report.pictures import open_picture, picture


def write_sheet(folder: Path) -> tuple[Path, Path]:
    """Write grid.png and index.html of the pictures that index.jsonl lists; return both paths."""
    rows = read_index(folder)
    by_prompt = _by_prompt(rows)
    columns = max(map(len, by_prompt.values()))
    tiles = {row["file"]: open_picture(folder / row["file"]) for row in rows}
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
    strengths = list(dict.fromkeys(row["strength"] for row in rows if "strength" in row))
    columns = max(map(len, by_prompt.values()))
    same = len(rows) == len(by_prompt) * len(seeds)
    heads = [f"seed {seeds[i]}" if same else f"{i + 1}." for i in range(columns)]
    if strengths:
        heads = [f"strength {strength_text(strength)}" for strength in strengths]
    first = heads[0] if strengths else ""  # two seeds are no before and after
    cells = {row["file"]: {"src": picture(folder / row["file"]), "alt": _alt_text(row)} for row in rows}
    table = {
        "heads": [{"name": name, "step": "", "words": ""} for name in heads],
        "rows": [
            {
                "prompt": prompt,
                "seed": seed,
                "cells": [cells[row["file"]] for row in own],
            }
            for (prompt, seed), own in by_prompt.items()
        ],
    }  # fmt: skip
    return write_page(folder / "index.html", render("sheet.html", title=folder.resolve().name, grid=table, first=first))


def _by_prompt(rows: list[dict[str, Any]]) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    """The rows of the grid: of a prompt, or of a prompt and seed where columns are the LoRA's strengths."""
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["seed"] if "strength" in row else None), []).append(row)
    return found


def _alt_text(row: dict[str, Any]) -> str:
    strength = f", strength {strength_text(row['strength'])}" if "strength" in row else ""
    return f"{row['prompt']}, seed {row['seed']}{strength}"
