"""Runs as one self-contained HTML file: pictures before, during and after; curves; the optimised reward beside others.

`write_report` shows one run, or several side by side; `write_evaluation` what was measured on them. No script, no
font, no file is loaded: images are data URIs, charts inline SVG, tables sort by style sheet. All text passes Jinja2's
escaping, so a prompt is shown, never obeyed. A run without evaluation.json is reported without its table.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from palate.evaluate import to_json
from palate.runs import check_same, control_words, read_index, read_recipe, run_names
from palate.runtime.errors import InputError

COLUMNS, ROWS, PAIRS = 6, 12, 4  # previews across, pictures down, worst and best pairs shown
LARGEST = 256  # pixels; larger pictures are embedded at this size


@dataclass(frozen=True)
class Line:
    """One curve. The accent marks what was asked for."""

    name: str
    points: list[tuple[float, float]]  # (step, value)
    accent: bool = False


@dataclass(frozen=True)
class Mark:
    """An event at a step: a vertical line with words."""

    step: float
    text: str
    kind: str  # "steer" or "guard"


# --- reading the run ------------------------------------------------------------------------------------------------


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; none when the run has not begun. A half-written last line is left out."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON: {line[:60]!r}") from error
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); write it again with palate evaluate") from error


def read_rounds(run_folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run; of a black-box optimisation those of its rounds, one after the other."""
    rounds = sorted(run_folder.glob("round-*"))
    if not rounds:
        return read_metrics(run_folder)
    rows: list[dict[str, Any]] = []
    for folder in rounds:
        done = max((row["step"] for row in rows if "step" in row), default=0)
        rows += [{**row, "step": row["step"] + done} if "step" in row else row for row in read_metrics(folder)]
    return rows


def read_questions(run_folder: Path) -> list[dict[str, Any]]:
    """What was asked of the oracle, in order: {"query", "round", "prompt", "file", "score" or "failed"}; none for
    other runs. Nothing is written: the run may be going on."""
    path = run_folder / "queries.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line)
            found.setdefault(row["query"], {}).update(row)
            file = found[row["query"]]["file"]
        except (json.JSONDecodeError, KeyError, TypeError):
            break  # the line that a crash cut short is the last
        if Path(file).parts != ("queries", Path(file).name):
            raise InputError(f"{path} line {number}: expected a file in queries/, got {file[:60]!r}")
    return [found[k] for k in sorted(found) if "file" in found[k]]


def _steps(run_folder: Path) -> list[Path]:
    """The preview folders in the order of their steps."""
    return sorted(path for path in (run_folder / "samples").glob("step-*") if (path / "index.jsonl").is_file())


def picture(path: Path) -> str:
    """A PNG data URI, at most LARGEST pixels wide or high. Raises ValueError naming a file that cannot be read."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"image {path} is missing, though index.jsonl lists it; sample again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read ({error}); sample again") from error
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# --- charts ---------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 290, 46, 98, 42, 28
DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 4", "12 4")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, lines: Sequence[Line], marks: Sequence[Mark] = (), *, share: bool = False) -> Markup:
    """Inline SVG of curves over steps, each named at its end; `share` fixes the range to 0..1. Empty without points."""
    lines = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.accent) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    last = max([x for line in lines for x, _ in line.points] + [mark.step for mark in marks] + [1])
    values = [y for line in lines for _, y in line.points]
    low, high = (0.0, 1.0) if share else (min(values), max(values))
    pad = 0.0 if share else max((high - low) * 0.08, abs(high) * 1e-3, 1e-6)
    low, high = low - pad, high + pad
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def sx(step: float) -> float:
        return round(LEFT + (right - LEFT) * step / last, 1)

    def sy(value: float) -> float:
        return round(bottom - (bottom - TOP) * (value - low) / (high - low), 1)

    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, _spoken(title, lines, marks)
        )
    ]
    for value in ticks(low, high):
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, right, y=sy(value)))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{:g}</text>').format(
                LEFT - 8, sy(value) + 4, value
            )
        )
    for step in ticks(0, last, 5):
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{:g}</text>').format(
                sx(step), bottom + 19, step
            )
        )
    parts.append(Markup('<text class="tick" x="{}" y="{}">step</text>').format(right + 18, bottom + 19))
    for row, mark in enumerate(sorted(marks, key=lambda m: m.step)):
        x, flip = sx(mark.step), mark.step > last * 0.55
        parts.append(
            Markup('<line class="mark {}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(mark.kind, TOP - 6, bottom, x=x)
        )
        parts.append(
            Markup('<text class="mark {}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                mark.kind,
                x + (-5 if flip else 5),
                TOP - 24 if row % 2 else TOP - 10,
                "end" if flip else "start",
                _short(mark.text, 44),
            )
        )
    places = _apart([sy(line.points[-1][1]) + 4 for line in lines], 14, TOP + 4, bottom + 4)
    plain = 0
    for line, place in zip(lines, places, strict=True):
        path = " ".join(f"{sx(x)},{sy(y)}" for x, y in line.points)
        kind, dash = ("accent", "") if line.accent else (f"plain p{plain % 4}", DASHES[plain % len(DASHES)])
        plain += not line.accent
        parts.append(Markup('<polyline class="curve {}" stroke-dasharray="{}" points="{}"/>').format(kind, dash, path))
        x, y = line.points[-1]
        parts.append(Markup('<circle class="end {}" cx="{}" cy="{}" r="3"/>').format(kind, sx(x), sy(y)))
        parts.append(
            Markup('<text class="name {}" x="{}" y="{}">{}</text>').format(
                kind, right + 10, place, _short(line.name, 15)
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])


def _spoken(title: str, lines: Sequence[Line], marks: Sequence[Mark]) -> str:
    """The chart in words, for those who cannot see it."""
    curves = [f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines]
    return _visible(
        "; ".join([f"{title}: {', '.join(curves)}", *(f"step {mark.step:g}: {mark.text}" for mark in marks)])
    )


def _short(text: str, length: int) -> str:
    text = _visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The same places, moved as little as keeps them `gap` apart and, where they fit, inside [low, high]."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    limit = high
    for index in reversed(order):
        moved[index] = max(min(moved[index], limit), low)
        limit = moved[index] - gap
    return [round(place, 1) for place in moved]


def curves(rows: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    """(title, what it shows, svg) of each chart that the run has numbers for."""
    training, checks = _of(rows, "step"), _of(rows, "guard", "evaluate")
    marks = _marks(rows)
    asked = {
        str(word).lower()
        for row in [recipe.get("algorithm") or {}, *_of(rows, "steer")]
        for word in row.get("positive") or ()
    }
    styles = sorted({key for row in checks for key in row if key.startswith("style/")})
    shares = [Line(key[6:], _points(checks, key), key[6:].lower() in asked) for key in styles]
    others = [Line(name, _points(checks, name)) for name in ("concept", "background", "diversity", "saturation")]
    keys = sorted({key for row in training for key in row if key.startswith("reward")})
    objective = [Line(key.removeprefix("reward_"), _points(training, key), i == 0) for i, key in enumerate(keys)]
    found = [
        (
            "Optimised reward",
            "the objective on the training batches, by branch where there are several",
            chart("Optimised reward", objective, marks),
        ),
        (
            "Rewards on fixed prompts",
            "change since step 0; the held-out reward is never optimised",
            chart(
                "Rewards on fixed prompts",
                [
                    _change(Line("reward", _points(checks, "reward"), True)),
                    _change(Line("held-out", _points(checks, "heldout"))),
                ],
                marks,
            ),
        ),
        (
            "Style",
            "share of the fixed prompts that the judge gives each style",
            chart("Style share", shares, marks, share=True),
        ),
        (
            "What should stay",
            "concept and background right, diversity, saturation",
            chart("What should stay", others, marks, share=True),
        ),
    ]
    return [item for item in found if item[2]]


def _of(rows: Sequence[dict[str, Any]], *events: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("event") in events]


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]


def _change(line: Line) -> Line:
    first = line.points[0][1] if line.points else 0.0
    return Line(line.name, [(x, y - first) for x, y in line.points], line.accent)


def _words(row: dict[str, Any]) -> str:
    sides = [(sign, row.get(key)) for sign, key in (("+", "positive"), ("−", "negative"))]
    told = [f"{sign}{', '.join(map(str, words))}" for sign, words in sides if words]
    return " ".join([*told, f"k {row['k']:g}"] if row.get("k") else told) or "no words"


def _marks(rows: Sequence[dict[str, Any]]) -> list[Mark]:
    """Every change of words, and every time that the guard or a skipped update had something to say."""
    marks = [Mark(row["step"], _words(row), "steer") for row in _of(rows, "steer")]
    marks += [
        Mark(row["step"], f"{row['action']}: {row.get('verdict', '')}", "guard")
        for row in _of(rows, "guard")
        if row.get("action")
    ]
    return marks


def question_curves(run_folder: Path, asked: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> list:
    """Charts as `curves` gives them, over the number of questions: what the oracle answered, without its noise where it
    is built in, and how much of the answers the surrogate explained before the policy climbed it."""
    answered = [row for row in asked if "score" in row]
    if not answered:
        return []
    size = max(1, len(answered) // 40)
    ends = [min(k + size, len(answered)) for k in range(0, len(answered), size)]
    true = _true_scores(run_folder, answered, recipe)
    best = np.maximum.accumulate([row["score"] for row in answered])

    def line(name: str, values: Sequence[float], accent: bool = False) -> Line:
        parts = [float(np.mean(values[max(0, end - size) : end])) for end in ends]
        return Line(name, [(answered[end - 1]["query"] + 1, y) for end, y in zip(ends, parts, strict=True)], accent)

    lines = [
        line("answers", [row["score"] for row in answered], True),
        Line("best so far", [(answered[end - 1]["query"] + 1, float(best[end - 1])) for end in ends]),
    ]
    if true is not None:
        lines.append(line("without noise", true))
    rounds = [row for row in _rounds(run_folder) if "explained" in row]
    fit = [Line("explained", [(row["spent"], float(row["explained"])) for row in rounds], True)]
    marks = [Mark(row["spent"], f"round {row['round']}", "steer") for row in rounds]
    found = [
        ("The oracle's answers", f"over questions, means of {size}", chart("The oracle's answers", lines, marks)),
        (
            "The surrogate",
            "share of the answers' variance that it explains, leave-one-out, after each round",
            chart("The surrogate", fit, share=True),
        ),
    ]
    return [item for item in found if item[2]]


def _true_scores(run_folder: Path, answered: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> list[float] | None:
    """What a built-in oracle with noise would have said without it; None for any other."""
    oracle = recipe["optimize"]["oracle"]
    if not oracle.get("name") or not oracle.get("noise"):
        return None
    from palate.optimize import exact_reward

    reward, scores = exact_reward(oracle["name"]), []
    for start in range(0, len(answered), 64):
        part = answered[start : start + 64]
        pixels = []
        for row in part:
            try:
                with Image.open(run_folder / row["file"]) as image:
                    pixels.append(np.asarray(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(f"image {run_folder / row['file']} cannot be read ({error})") from error
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        scores += reward(images, [row["prompt"] for row in part]).tolist()
    return scores


def _rounds(run_folder: Path) -> list[dict[str, Any]]:
    path = run_folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def question_grid(run_folder: Path, asked: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best answered pictures of each round, one row a round."""
    rows = []
    for number in sorted({row["round"] for row in asked}):
        own = [row for row in asked if row["round"] == number and "score" in row]
        own.sort(key=lambda row: -row["score"])
        cells = [
            {"src": picture(run_folder / row["file"]), "alt": f"{row['prompt']}, answer {row['score']:.4g}"}
            for row in own[:COLUMNS]
        ]
        mean = f", mean answer {np.mean([row['score'] for row in own]):.4g}" if own else ""
        rows.append({"prompt": f"round {number}: {len(own)} answered{mean}", "seed": None, "cells": cells})
    heads = [("Best", "") if k == 0 else (f"{k + 1}.", "") for k in range(COLUMNS)]
    return {"heads": heads, "rows": rows} if any(row["cells"] for row in rows) else None


def question_summary(
    run_folder: Path, asked: Sequence[dict[str, Any]], recipe: dict[str, Any]
) -> list[tuple[str, str]]:
    """Who was asked, how often, and how far the surrogate could follow."""
    settings = recipe.get("optimize") or {}
    oracle = settings.get("oracle") or {}
    who = next((f"{key} {oracle[key]}" for key in ("name", "function", "command", "url") if oracle.get(key)), "unknown")
    failed, told = (sum(key in row for row in asked) for key in ("failed", "score"))
    pairs = [
        ("Oracle", who.removeprefix("name ")),
        ("Questions", f"{len(asked)} of {settings.get('budget')}: {told} answered, {failed} failed"),
    ]
    if rounds := _rounds(run_folder):
        explained = f"explains {rounds[-1]['explained']:.0%} of the answers"
        pairs.append(("Surrogate", f"{settings.get('surrogate')}, {explained}"))
    return pairs


# --- the parts of the page ------------------------------------------------------------------------------------------


def grid(run_folder: Path) -> dict[str, Any] | None:
    """Pictures of the first prompts x seeds at up to COLUMNS previews, the first and the last among them."""
    folders = _steps(run_folder)
    if not folders:
        return None
    count = min(COLUMNS, len(folders))
    chosen = [folders[round(i * (len(folders) - 1) / max(1, count - 1))] for i in range(count)]
    rows = read_index(chosen[0])[:ROWS]
    indices = [read_index(folder)[:ROWS] for folder in chosen]
    for folder, index in zip(chosen, indices, strict=True):
        check_same(rows, index, str(chosen[0]), str(folder))
    heads = [_step_name(folder, i, count) for i, folder in enumerate(chosen)]
    return {"heads": heads, "rows": _grid_rows(rows, heads, list(zip(chosen, indices, strict=True)))}


def _step_name(folder: Path, i: int, count: int) -> tuple[str, str]:
    step = folder.name.removeprefix("step-").lstrip("0") or "0"
    return ("Before" if i == 0 else "After" if i == count - 1 else "During", f"step {step}")


def _grid_rows(rows, heads, columns) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row["prompt"],
            "seed": row["seed"],
            "cells": [
                {
                    "src": picture(folder / index[i]["file"]),
                    "alt": f"{row['prompt']}, seed {row['seed']}, {' '.join(head)}",
                }
                for (folder, index), head in zip(columns, heads, strict=True)
            ],
        }
        for i, row in enumerate(rows)
    ]


def compare_grid(runs: Sequence[Path]) -> dict[str, Any]:
    """The base model and each run's last preview, on the same prompts and seeds; ValueError where they differ."""
    columns, heads = [], []
    for run in runs:
        folders = _steps(run)
        if not folders:
            raise InputError(f"{run} has no samples/step-* folder to compare; train with trainer.preview_every > 0")
        if not columns:
            columns.append((folders[0], read_index(folders[0])))
            heads.append(("Base", _step_name(folders[0], 0, 2)[1]))
        index = read_index(folders[-1])
        check_same(columns[0][1], index, str(runs[0]), str(run))
        columns.append((folders[-1], index))
        heads.append((run.resolve().name, _step_name(folders[-1], 1, 2)[1]))
    return {"heads": heads, "rows": _grid_rows(columns[0][1][:ROWS], heads, columns)}


NAMES = {
    "concept": "object right",
    "background": "background colour right",
    "position": "position right",
    "style_named": "named style right",
    "correct": "all that was named right",
    "diversity": "diversity inside a prompt",
    "diversity_same_style": "diversity inside a prompt, same style",
    "vendi": "Vendi score inside a prompt",
    "copy": "same picture for another prompt",
    "high_frequency": "high-frequency energy",
    "jpeg_size": "JPEG size, bytes",
}
NAMED = ("concept", "style_named", "background", "position", "correct")  # what a prompt can ask for
SPREAD = ("diversity", "diversity_same_style", "vendi", "copy")
MAIN = NAMED + SPREAD


def table(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the before/after table: what was optimised first, then the held-out reward, then the rest."""
    optimised, heldout = evaluation.get("optimised", []), evaluation.get("heldout")
    rows = []
    for key, metric in evaluation["metrics"].items():
        name = key.removeprefix("reward/")
        is_reward = key.startswith("reward/")
        tag = "optimised" if is_reward and name in optimised else "held out" if is_reward and name == heldout else ""
        label = f"share of {key[6:]}" if key.startswith("style/") else NAMES.get(name, name.replace("_", " "))
        order = (
            optimised.index(name) - len(optimised)
            if tag == "optimised"
            else 1
            if tag
            else 2
            if is_reward
            else 3 + MAIN.index(key) / len(MAIN)
            if key in MAIN
            else 4
        )
        rows.append((order, key, {"name": label, "key": key, "tag": tag, **metric}))
    return [row for _, _, row in sorted(rows, key=lambda item: item[:2])]


DRIFT = {
    "feature_distance": ("feature distance", "cosine, 0 = unchanged"),
    "saturation_ratio": ("saturation", "1 = unchanged"),
    "colour_cast": ("colour cast", "shift of the mean colour, 0 = none"),
    "red_ratio": ("mean red", "1 = unchanged"), "green_ratio": ("mean green", "1 = unchanged"),
    "blue_ratio": ("mean blue", "1 = unchanged"),
    "high_frequency_ratio": ("high frequencies", "1 = unchanged"),
}  # fmt: skip


def extremes(run_folder: Path, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs whose held-out reward fell and rose most, with their pictures."""
    key, folder = f"reward/{evaluation.get('heldout')}", run_folder / "evaluation"
    rows = [row for row in evaluation.get("rows", []) if "base" in row and "file" in row and key in row]
    if not rows or not (folder / "base").is_dir():
        return []
    rows.sort(key=lambda row: row[key] - row["base"][key])
    count = min(PAIRS, len(rows) // 2)
    groups = [
        ("Worst", "held-out reward fell most", rows[:count]),
        ("Best", "held-out reward rose most", rows[::-1][:count]),
    ]
    return [
        {
            "name": name,
            "what": what,
            "pairs": [
                {
                    "prompt": row["prompt"],
                    "seed": row["seed"],
                    "change": row[key] - row["base"][key],
                    "base": picture(folder / "base" / Path(row["file"]).name),
                    "result": picture(folder / "result" / Path(row["file"]).name),
                }
                for row in chosen
            ],
        }
        for name, what, chosen in groups
        if chosen
    ]


def summary(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, in a few (name, value) pairs."""

    def get(section: str) -> dict[str, Any]:
        return recipe.get(section) or {}

    algorithm, reward, trainer = get("algorithm"), get("reward"), get("trainer")
    words = {**control_words(recipe), "k": (reward.get("relative") or {}).get("k")}
    weighted = ", ".join(f"{weight:g} × {name}" for name, weight in (reward.get("weights") or {}).items())
    pairs = [
        ("Algorithm", algorithm.get("name")),
        ("Model", get("model").get("name")),
        ("Reward", reward.get("name") or weighted),
        ("Words", _words(words) if words["positive"] or words["negative"] else None),
        ("Steps", trainer.get("steps")),
        ("Batch", trainer.get("batch_size")),
        ("Learning rate", trainer.get("lr")),
        ("Seed", trainer.get("seed")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def command(run_folder: Path, recipe: dict[str, Any]) -> str:
    """The command that repeats the run, from its own recipe into a new folder."""
    again = f"{(recipe.get('run') or {}).get('folder') or run_folder}-again"
    verb = "train" if recipe.get("optimize") is None else "optimize"
    return f"palate {verb} {shlex.quote(str(run_folder / 'recipe.yaml'))} {shlex.quote('run.folder=' + again)}"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted (key, value) pairs."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _number(value: float | None) -> str:
    """Three significant digits or two decimals, with a true minus sign."""
    if value is None:
        return "–"
    size = abs(value)
    places = 0 if size >= 1000 or not size else 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 5e-4 else 5
    return f"{value:,.{places}f}".replace("-", "−")


def _signed(value: float) -> str:
    return _number(value) if value <= 0 else "+" + _number(value)


def _visible(text: Any) -> str:
    """Control characters (NUL, ANSI escapes, bidirectional overrides) as their code points, so that they cannot act."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(text))


def write_report(run_folder: str | Path, *, compare: Sequence[str | Path] = ()) -> Path:
    """Write report.html into the run folder, or with other runs in `compare`, compare.html; return its path.

    Raises ValueError when a folder is not a run, a picture cannot be read, or compared runs differ in prompts or seeds.
    """
    runs = [Path(run_folder), *map(Path, compare)]
    pages = [_page(run) for run in runs]
    shared = None
    if compare:
        shared = {"grid": compare_grid(runs), "table": _compare_table(runs, [page["evaluation"] for page in pages])}
    title = " · ".join(page["name"] for page in pages)
    text = render("report_template.html", title=title, pages=pages, shared=shared, run=pages[0])
    path = runs[0] / ("compare.html" if compare else "report.html")
    _write(path, text)
    return path


def render(template: str, **values: Any) -> str:
    """A page from a template of the package: everything is escaped, control characters are made visible."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize,
        loader=FunctionLoader(lambda name: (files("palate") / name).read_text(encoding="utf-8")),
    )  # fmt: skip
    environment.filters |= {"number": _number, "signed": _signed}
    return environment.get_template(template).render(**values)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else _visible(value) if isinstance(value, str) else value


def _page(run: Path) -> dict[str, Any]:
    recipe, rows, evaluation = read_recipe(run), read_rounds(run), _read_json(run / "evaluation.json")
    asked = read_questions(run) if recipe.get("optimize") else []
    environment = _read_json(run / "environment.json") or {}
    drift = (evaluation or {}).get("drift") or {}
    last = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=0)
    return {
        "name": run.resolve().name,
        "summary": summary(recipe) + (question_summary(run, asked, recipe) if recipe.get("optimize") else []),
        "asked": question_grid(run, asked),
        "last_step": last,
        "evaluation": evaluation,
        "verdict": (evaluation or {}).get("verdict"),
        "grid": grid(run),
        "charts": (question_curves(run, asked, recipe) if asked else []) + curves(rows, recipe),
        "notes": [
            f"step {mark.step}: {'words ' if mark.kind == 'steer' else 'guard '}{mark.text}" for mark in _marks(rows)
        ],
        "table": table(evaluation) if evaluation else [],
        "drift": [(*DRIFT[key], drift[key]) for key in DRIFT if key in drift],
        "extremes": extremes(run, evaluation) if evaluation else [],
        "environment": _flat(environment),
        "recipe": _flat(recipe),
        "command": command(run, recipe),
    }


def _compare_table(runs: Sequence[Path], evaluations: Sequence[dict | None]) -> list[dict[str, Any]]:
    """Base and every run's value of each metric; empty unless all runs were evaluated."""
    if any(evaluation is None for evaluation in evaluations):
        return []
    for run, evaluation in zip(runs[1:], evaluations[1:], strict=True):
        check_same(evaluations[0]["rows"], evaluation["rows"], f"the evaluations of {runs[0]}", str(run))
    found = [{row["name"]: row for row in table(evaluation)} for evaluation in evaluations]
    names = [name for name in found[0] if all(name in rows for rows in found)]
    return [
        {"name": name, "base": found[0][name].get("base"), "values": [rows[name] for rows in found]} for name in names
    ]


# --- the page of an evaluation --------------------------------------------------------------------------------------

GROUPS = {
    "Rewards": lambda key: key.startswith("reward/"),
    "What the prompt names": lambda key: key in NAMED,
    "Style, where the prompt leaves it open": lambda key: key.startswith("style/"),
    "Diversity": lambda key: key in SPREAD,
    "The pictures themselves": lambda key: True,
}


def write_evaluation(run_folders: Sequence[str | Path], found: dict[str, Any], path: str | Path | None = None) -> Path:
    """One page of what `runs.evaluate_runs` found, with the pictures that lie in the run folders; returns its path
    (None = evaluation.html in the first run). Of several runs the numbers are written too: beside a given path as
    .json, else evaluations.json in the first run. ValueError names a picture that cannot be read."""
    runs = [Path(folder) for folder in run_folders]
    evaluations = list(found["runs"].values())
    text = render(
        "evaluation_template.html",
        title=" · ".join(found["runs"]),
        runs=[_judged(run, name, found["runs"][name]) for run, name in zip(runs, run_names(runs), strict=True)],
        prompts=evaluations[0]["prompts"],
        seeds=evaluations[0]["seeds"],
        tables=metric_tables(found["runs"]),
        between=_between(found),
        drift=_drift(evaluations),
        rows=prompt_table(evaluations),
        command="palate evaluate " + " ".join(shlex.quote(str(run)) for run in runs) + " --stored",
    )
    page = runs[0] / "evaluation.html" if path is None else Path(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    _write(page, text)
    if len(runs) > 1:
        _write(runs[0] / "evaluations.json" if path is None else page.with_suffix(".json"), to_json(found))
    return page


def _judged(run: Path, name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    how = read_index(run / "evaluation" / "result")[0]
    words = evaluation.get("words") or {}
    facts = [
        ("Optimised", ", ".join(evaluation.get("optimised") or ["nothing"])),
        ("Held out", evaluation.get("heldout")),
        ("Words", _words(words) if words.get("positive") or words.get("negative") else None),
        ("Sampling", f"{how.get('steps')} steps, guidance {how.get('guidance')}"),
    ]
    return {
        "name": name,
        "summary": [(key, value) for key, value in facts if value],
        "verdict": evaluation["verdict"],
        "failed": evaluation["failed"],
        "extremes": extremes(run, evaluation),
    }


def metric_tables(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """[{"name", "rows"}], a row a metric with one cell a run (None where it was not measured), in the order of `table`.
    Relative rewards are told apart by their control words where the runs' words differ."""
    several = len({json.dumps(evaluation.get("words"), sort_keys=True) for evaluation in evaluations.values()}) > 1
    rows: dict[str, dict[str, Any]] = {}
    for i, evaluation in enumerate(evaluations.values()):
        keys = {key.removeprefix("reward/"): key for key in evaluation["metrics"] if key.startswith("reward/")}
        for row in table(evaluation):
            key = row["key"]
            label = row["name"]
            if several and key.endswith("-relative") and row["name"] in keys:
                label = f"{label} ({_words(evaluation['words'])})"
            entry = rows.setdefault(label, {"name": label, "key": key, "cells": [None] * len(evaluations)})
            entry["cells"][i] = row
    left = list(rows.values())
    tables = []
    for name, belongs in GROUPS.items():
        chosen = [row for row in left if belongs(row["key"])]
        left = [row for row in left if row not in chosen]
        if chosen:
            tables.append({"name": name, "rows": chosen})
    return tables


def _between(found: dict[str, Any]) -> dict[str, Any] | None:
    """Every further run against the first, where there are several."""
    if not found["between"]:
        return None
    first = found["runs"][found["first"]]
    rows = [
        {"name": row["name"], "cells": [changes.get(row["key"]) for changes in found["between"].values()]}
        for row in table(first)
    ]
    return {
        "first": found["first"],
        "others": list(found["between"]),
        "rows": [row for row in rows if any(row["cells"])],
    }


def _drift(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the drift panel, a value a run; copies as a share."""
    rows = [
        {"name": name, "what": what, "cells": [evaluation["drift"].get(key) for evaluation in evaluations]}
        for key, (name, what) in DRIFT.items()
    ]
    copied = [evaluation["metrics"].get("copy") for evaluation in evaluations]
    if any(copied):
        before = ", ".join(_number(metric["base"]) if metric else "–" for metric in copied)
        what = f"share of images that another prompt has too; base {before}"
        rows.append({"name": "duplicate images", "what": what, "cells": [m and m["value"] for m in copied]})
    return rows


def prompt_table(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row a prompt: the mean change over its seeds of the first optimised reward, the held-out reward and the object,
    run by run. {"heads": [(run index, name)], "rows": [{"prompt", "changes", "up", "down"}]}, up and down being the
    row's place when sorted by each column; what was not measured comes last in both."""
    heads, columns = [], []
    prompts = list(dict.fromkeys(row["prompt"] for row in evaluations[0]["rows"]))
    for i, evaluation in enumerate(evaluations):
        optimised = [(f"reward/{name}", "optimised") for name in (evaluation.get("optimised") or [])[:1]]
        for key, name in [*optimised, (f"reward/{evaluation['heldout']}", "held out"), ("concept", "object right")]:
            changes: dict[str, list[float]] = {}
            for row in evaluation["rows"]:
                now, before = row.get(key), row.get("base", {}).get(key)
                if now is not None and before is not None:
                    changes.setdefault(row["prompt"], []).append(now - before)
            if changes:
                heads.append((i, name))
                columns.append([sum(c) / len(c) if (c := changes.get(p)) else None for p in prompts])
    return {
        "heads": heads,
        "rows": [
            {"prompt": prompt, "changes": changes, "up": up, "down": down}
            for prompt, changes, up, down in zip(
                prompts,
                zip(*columns, strict=False),
                zip(*map(_places, columns), strict=False),
                zip(*(_places(c, True) for c in columns), strict=False),
                strict=True,
            )
        ],
    }


def _places(values: Sequence[float | None], falling: bool = False) -> list[int]:
    """Each value's place from 0 when sorted; equal values keep their order, None comes last."""

    def size(i: int) -> tuple[bool, float]:
        value = values[i]
        return value is None, 0.0 if value is None else -value if falling else value

    places = [0] * len(values)
    for place, i in enumerate(sorted(range(len(values)), key=size)):
        places[i] = place
    return places
