"""What a run logged, as charts: the objective, what was asked for, what should stay, the rewards of plain prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from palate.report.chart import Line, Mark, chart
from palate.report.words import spell
from palate.runtime import runlog
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json

STATISTICS = ("reward_std", "reward_gap", "reward_share")  # of rewards or of gradients: no objectives
KEPT = ("concept", "background", "diversity", "saturation")  # shown as ratios to the base


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none when the run has not begun. A half-written last line is left out."""
    return runlog.read_metrics(run_folder / runlog.METRICS)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file of a run folder; None where it is missing. InputError where it is not JSON."""
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); delete it") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}, where an object is expected; delete it")
    return found


def curves(rows: Sequence[dict[str, Any]], wanted: Sequence[str] = ()) -> list[tuple[str, str, Markup]]:
    """(title, what it shows, svg) of each chart that the run has numbers for. `wanted`: the styles asked for."""
    training, checks, marks = events(rows, "step"), events(rows, "guard", "evaluate"), event_marks(rows)
    lowered = {word.lower() for word in wanted}
    styles = sorted({key for row in checks for key in row if key.startswith("style/")})
    shares = [Line(key[6:], points(checks, key), key[6:].lower() in lowered) for key in styles]
    found = [
        (
            "The objective",
            "what the updates maximise, on the training batches: a mean over neighbouring steps, each step faint",
            chart("The objective", _objective(training), marks),
        ),
        (
            "What was asked for",
            "fraction of the fixed prompts that the judge gives each style",
            chart("What was asked for", shares, marks, unit_range=True),
        ),
        (
            "What should stay",
            "on fixed prompts, as a ratio to the base model: 1 is unchanged",
            chart("What should stay", _ratios(checks), marks, reference=1.0),
        ),
        (
            "Rewards of the plain prompts",
            "change since step 0; neither knows the control words, and the held-out one is never optimised",
            chart(
                "Rewards of the plain prompts",
                [_since_start("held-out", points(checks, "heldout")), _since_start("reward", points(checks, "reward"))],
                marks,
                reference=0.0,
            ),
        ),
    ]
    return [item for item in found if item[2]]


def _objective(training: Sequence[dict[str, Any]]) -> list[Line]:
    """Every reward that the steps log, smoothed; the first is the objective."""
    lines = []
    keys = {key for row in training for key in row if key.startswith("reward") and key not in STATISTICS}
    for i, key in enumerate(sorted(keys)):
        raw = points(training, key)
        width = len(raw) // 20
        if width:
            lines.append(Line(key, raw, i == 0, faint=True))
        lines.append(Line(key.removeprefix("reward_"), smoothed(raw, width), i == 0))
    return lines


def smoothed(raw: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Each point as the mean of itself and up to `width` neighbours on both sides, equally many."""
    found = []
    for i, (step, _) in enumerate(raw):
        reach = min(width, i, len(raw) - 1 - i)
        part = [value for _, value in raw[i - reach : i + reach + 1]]
        found.append((step, sum(part) / len(part)))
    return found


def _ratios(checks: Sequence[dict[str, Any]]) -> list[Line]:
    lines = []
    for name in KEPT:
        own = points(checks, name)
        if own and own[0][1] > 0:
            lines.append(Line(name, [(step, value / own[0][1]) for step, value in own]))
    return lines


def events(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows of these events."""
    return [row for row in rows if row.get("event") in names]


def points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that hold a number under the key."""
    return [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]


def _since_start(name: str, own: list[tuple[float, float]]) -> Line:
    first = own[0][1] if own else 0.0
    return Line(name, [(step, value - first) for step, value in own])


def event_marks(rows: Sequence[dict[str, Any]]) -> list[Mark]:
    """Every change of words, and every time that the guard acted."""
    marks = [Mark(row["step"], spell(row), "steer") for row in events(rows, "steer")]
    marks += [
        Mark(row["step"], f"{row['action']}: {row.get('verdict', '')}", "guard")
        for row in events(rows, "guard")
        if row.get("action")
    ]
    return marks
