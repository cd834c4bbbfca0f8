"""Pictures of a run as they stand in a page: previews by step, the pairs that open the page, the best and the worst."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from palate.evaluate import read_index
from palate.report.tables import change
from palate.report.words import WordChange, words_at
from palate.runs.comparison import common_to_all
from palate.runtime.errors import InputError
from palate.runtime.images import UNREADABLE, as_rgb, open_image

COLUMNS, ROWS, PAIRS = 6, 12, 4  # previews across, pictures down, pairs of each kind
LARGEST = 512  # pixels; larger pictures are embedded at this size
CRISP = 128  # pixels up to which a picture is embedded without loss and scaled up by whole pixels


def open_picture(path: Path) -> Image.Image:
    """The picture in RGB. InputError names a broken file."""
    try:
        with open_image(path) as stored:
            return as_rgb(stored)
    except FileNotFoundError as error:
        raise InputError(f"image {path} is missing, though index.jsonl lists it; draw it again") from error
    except UNREADABLE as error:
        raise InputError(f"image {path} cannot be read ({error}); draw it again") from error


def picture(path: Path, largest: int = LARGEST) -> str:
    """A data URI of at most `largest` pixels a side: PNG up to CRISP, JPEG above. InputError names a broken file."""
    image = open_picture(path)
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(image.size) <= CRISP:
        image.save(stream, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    image.save(stream, "JPEG", quality=88, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def preview_folders(run_folder: Path) -> list[Path]:
    """The preview folders in the order of their steps."""
    return sorted(path for path in (run_folder / "samples").glob("step-*") if (path / "index.jsonl").is_file())


def step_of(folder: Path) -> int:
    """The number in the name of a preview folder."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def grid(run_folder: Path, changes: Sequence[WordChange], metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Pictures of the first prompts and seeds at up to COLUMNS previews, the first and the last among them. Where the
    words changed during the run, each column says under which it was made."""
    folders = preview_folders(run_folder)
    if not folders:
        return None
    count = min(COLUMNS, len(folders))
    chosen = [folders[round(i * (len(folders) - 1) / max(1, count - 1))] for i in range(count)]
    # a resumed run may draw more prompts than before, or fewer
    indices = _shared([read_index(folder) for folder in chosen], chosen)
    rows = indices[0][:ROWS]
    names = ["Before", *["During"] * (count - 2), "After"][:count]
    heads = []
    for name, folder in zip(names, chosen, strict=True):
        step = step_of(folder)
        words = words_at(changes, metrics, step) if len(changes) > 1 and step > 0 else ""
        heads.append({"name": name, "step": f"step {step}", "words": words})
    return {"heads": heads, "rows": grid_rows(rows, heads, list(zip(chosen, indices, strict=True)))}


def _shared(indices: Sequence[list[dict[str, Any]]], places: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """The rows of each index whose prompt and seed all have, in the first one's order. InputError: there are none."""
    shared = common_to_all(indices, [f"the pictures of {place}" for place in places])
    return [[index[each[column]] for each in shared] for column, index in enumerate(indices)]


def grid_rows(
    rows: Sequence[dict[str, Any]],
    heads: Sequence[dict[str, str]],
    columns: Sequence[tuple[Path, Sequence[dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """Rows of a table of pictures: {"prompt", "seed", "cells": [{"src", "alt"}]}, a cell per (folder, index) column."""
    return [
        {
            "prompt": row["prompt"],
            "seed": row["seed"],
            "cells": [
                {
                    "src": picture(folder / index[i]["file"]),
                    "alt": f"{row['prompt']}, seed {row['seed']}, {head['name']} {head['step']}",
                }
                for (folder, index), head in zip(columns, heads, strict=True)
            ],
        }
        for i, row in enumerate(rows)
    ]


def compare_grid(runs: Sequence[Path], words: Sequence[str]) -> dict[str, Any]:
    """The base model and each run's last preview, on the prompts and seeds that all have; `words` stand over the runs'
    columns. InputError where they share none."""
    columns: list[tuple[Path, list[dict[str, Any]]]] = []
    heads: list[dict[str, str]] = []
    for run, run_words in zip(runs, words, strict=True):
        folders = preview_folders(run)
        if not folders:
            raise InputError(f"{run} has no samples/step-* folder to compare; train with trainer.preview_every > 0")
        if not columns:
            columns.append((folders[0], read_index(folders[0])))
            heads.append({"name": "Base", "step": f"step {step_of(folders[0])}", "words": ""})
        columns.append((folders[-1], read_index(folders[-1])))
        heads.append({"name": run.resolve().name, "step": f"step {step_of(folders[-1])}", "words": run_words})
    folders = [folder for folder, _ in columns]
    shared = _shared([index for _, index in columns], [runs[0], *runs])
    columns = [(folder, index[:ROWS]) for folder, index in zip(folders, shared, strict=True)]
    return {"heads": heads, "rows": grid_rows(columns[0][1], heads, columns)}


# --- pairs of an evaluation -------------------------------------------------------------------------------------------


def judged_rows(run_folder: Path, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation that have a base's picture; none where the pictures were taken away."""
    if not (run_folder / "evaluation" / "base").is_dir():
        return []
    return [row for row in evaluation.get("rows", []) if "base" in row and "file" in row]


def preference(evaluation: dict[str, Any]) -> str | None:
    """The measurement that ranks pictures: the held-out reward's preference for the run's words where there is one,
    else the held-out reward."""
    heldout = evaluation.get("heldout")
    for key in (f"reward/{heldout}-relative", f"reward/{heldout}"):
        if key in evaluation["metrics"]:
            return key
    return None


def clearest_pairs(run_folder: Path, evaluation: dict[str, Any], styles: Sequence[str]) -> list[dict[str, Any]]:
    """Up to PAIRS pairs, a prompt each, that changed as was asked and still show what the prompt names.

    With `styles` that the judge knows: first those that turned to one of them. The rest by `preference`; a taste is no
    change that the held-out reward would see, so the pairs of one are those that it likes better now."""
    key = "reward/taste" if (evaluation.get("optimised") or [""])[0] == "taste" else preference(evaluation)

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
        right = row.get("correct", row.get("concept", 1.0)) > 0 and row["base"].get("concept", 1.0) > 0
        turned = bool(styles) and row.get("style") in styles and row["base"].get("style") not in styles
        return right, turned, change(row, key) or 0.0

    found: dict[str, dict[str, Any]] = {}
    for row in sorted(judged_rows(run_folder, evaluation), key=rank, reverse=True):
        found.setdefault(row["prompt"], row)
        if len(found) == PAIRS:
            break
    return [_pair(run_folder, row, key) for row in found.values()]


def ranked_pairs(run_folder: Path, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Typical, best and worst pairs: [{"name", "what", "pairs"}], by `preference`."""
    key = preference(evaluation)
    rows = [(c, row) for row in judged_rows(run_folder, evaluation) if (c := change(row, key)) is not None]
    if not rows:
        return []
    rows.sort(key=lambda item: item[0])
    count = min(PAIRS, max(1, len(rows) // 3))
    middle = (len(rows) - count) // 2
    what = "the held-out reward" + ("'s preference for the words" if key and key.endswith("-relative") else "")
    groups = [
        ("Typical", f"where {what} changed as much as in half of the pictures", rows[middle : middle + count]),
        ("Best", f"where {what} rose most", rows[::-1][:count]),
        ("Worst", f"where {what} fell most or rose least", rows[:count]),
    ]
    return [
        {"name": name, "what": text, "pairs": [_pair(run_folder, row, key) for _, row in chosen]}
        for name, text, chosen in groups
    ]


def preview_pairs(run_folder: Path) -> list[dict[str, Any]]:
    """Pairs of the first and the last preview, for a run without an evaluation: a prompt each, most changed first."""
    folders = preview_folders(run_folder)
    if len(folders) < 2:
        return []
    ends = [folders[0], folders[-1]]
    before, after = _shared([read_index(folder) for folder in ends], ends)
    first: dict[str, tuple[Path, Path, int]] = {}
    for old, new in zip(before, after, strict=True):
        first.setdefault(old["prompt"], (folders[0] / old["file"], folders[-1] / new["file"], old["seed"]))
    most = sorted(first, key=lambda prompt: _distance(*first[prompt][:2]), reverse=True)[:PAIRS]
    return [
        {"prompt": prompt, "seed": seed, "change": None, "base": picture(old), "result": picture(new)}
        for prompt, (old, new, seed) in ((prompt, first[prompt]) for prompt in most)
    ]


def _distance(one: Path, two: Path) -> float:
    """How far two pictures are apart, looked at coarsely; 0 where one cannot be read, which `picture` says."""
    try:
        a, b = (np.asarray(open_picture(path).resize((32, 32)), dtype=np.float32) for path in (one, two))
    except InputError:
        return 0.0
    return float(np.abs(a - b).mean())


def _pair(run_folder: Path, row: dict[str, Any], key: str | None) -> dict[str, Any]:
    file = Path(row["file"]).name
    return {
        "prompt": row["prompt"],
        "seed": row["seed"],
        "change": change(row, key),
        "base": picture(run_folder / "evaluation/base" / file),
        "result": picture(run_folder / "evaluation/result" / file),
    }
