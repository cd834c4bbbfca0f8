"""What a recipe names as its taste, looked at without loading a reward: which folders, on what, learnt or not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from palate.runtime.code import names_a_file
from palate.runtime.errors import InputError

FILE, CARD = "taste.safetensors", "card.json"


class Part(NamedTuple):
    """A saved taste with its weight in a sum."""

    folder: str
    weight: float


def parts_of(source: str | None) -> list[Part]:
    """The tastes of "FOLDER", or of several that add up, "FOLDER:WEIGHT, FOLDER:WEIGHT".

    InputError: none is named, or a weight is no number.
    """
    parts = [part.strip() for part in (source or "").split(",") if part.strip()]
    if not parts:
        raise InputError("reward.source.taste: name the folder of a taste, as tastes/mine (palate taste fit makes one)")
    found = []
    for part in parts:
        folder, colon, weight = part.rpartition(":")
        if not colon or Path(part).is_dir():
            found.append(Part(part, 1.0))
            continue
        try:
            found.append(Part(folder, float(weight)))
            if not math.isfinite(found[-1].weight):
                raise ValueError("a sum of tastes needs finite weights")
        except ValueError as error:
            raise InputError(f"reward.source.taste: {part!r}: expected FOLDER or FOLDER:WEIGHT") from error
    return found


def about(folder: str | Path) -> dict[str, Any]:
    """What is written beside a taste's tensors: source, card and more. InputError: there is no taste."""
    try:
        with safe_open(Path(folder) / FILE, "pt") as file:
            tree: dict[str, Any] = json.loads((file.metadata() or {})["taste"])
            found = {**tree, "source": str(tree["source"]), "card": dict(tree["card"])}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no taste ({FILE}); make one with palate taste fit VOTES") from error
    if names_a_file(found["source"]):
        raise InputError(f"{folder} stands on {found['source']}, and a taste brings no code along; fit it anew")
    return found


def source_of(folder: str | Path) -> str:
    """The name of the reward that a saved taste stands on. InputError: there is no taste."""
    return str(about(folder)["source"])
