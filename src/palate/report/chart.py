"""Curves over steps as inline SVG: the numbers are laid out here, `templates/chart.html` draws them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from palate.report.html import environment, escape_controls, shorten

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 40, 100, 42, 28
DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 4", "12 4")


@dataclass(frozen=True)
class Line:
    """One curve. The accent marks what was asked for; a faint one has no label."""

    name: str
    points: list[tuple[float, float]]  # (step, value)
    accent: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """An event at a step: a vertical line with words."""

    step: float
    text: str
    kind: str  # "steer" or "guard"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """Steps and values to the coordinates of the picture."""

    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - RIGHT - LEFT) * step / self.last, 1)

    def y(self, value: float) -> float:
        bottom = HEIGHT - BOTTOM
        return round(bottom - (bottom - TOP) * (value - self.low) / (self.high - self.low), 1)


def chart(
    title: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    unit_range: bool = False,
    reference: float | None = None,
) -> Markup:
    """Inline SVG of curves over steps, each named at its end; empty without points.

    `unit_range` fixes the values' axis to 0..1; `reference` draws a level to compare with (1 for ratios to the base).
    """
    lines = [
        Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.accent, line.faint) for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    scale = _scale(lines, marks, unit_range, reference)
    marks = sorted(marks, key=lambda mark: mark.step)
    return Markup(
        environment()
        .get_template("chart.html")
        .render(
            width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM,
            label=aria_label(title, lines, marks),
            reference=None if reference is None else scale.y(reference),
            rows=[(scale.y(value), f"{value:g}") for value in ticks(scale.low, scale.high)],
            columns=[(scale.x(step), f"{step:g}") for step in ticks(0, scale.last, 5)],
            marks=[_mark(row, mark, scale) for row, mark in enumerate(marks)],
            curves=_curves(lines, scale),
        )
    )  # fmt: skip


def _scale(lines: Sequence[Line], marks: Sequence[Mark], unit_range: bool, reference: float | None) -> Scale:
    last = max([x for line in lines for x, _ in line.points] + [mark.step for mark in marks] + [1])
    if unit_range:
        return Scale(last, 0.0, 1.0)
    values = [y for line in lines for _, y in line.points] + ([] if reference is None else [reference])
    low, high = min(values), max(values)
    pad = max((high - low) * 0.08, abs(high) * 1e-3, 1e-6)
    return Scale(last, low - pad, high + pad)


def _mark(row: int, mark: Mark, scale: Scale) -> dict[str, object]:
    flip = mark.step > scale.last * 0.55
    return {
        "kind": mark.kind, "x": scale.x(mark.step), "text": shorten(mark.text, 44),
        "text_x": scale.x(mark.step) + (-5 if flip else 5), "text_y": TOP - 24 if row % 2 else TOP - 10,
        "anchor": "end" if flip else "start",
    }  # fmt: skip


def _curves(lines: Sequence[Line], scale: Scale) -> list[dict[str, object]]:
    named = [line for line in lines if not line.faint]
    places = separate_labels([scale.y(line.points[-1][1]) + 4 for line in named], 14, TOP + 4, HEIGHT - BOTTOM + 4)
    label_y = dict(zip(map(id, named), places, strict=True))
    found, plain = [], 0
    for line in lines:
        kind, dash = ("accent", "") if line.accent else (f"plain p{plain % 4}", DASHES[plain % len(DASHES)])
        plain += not line.accent and not line.faint
        x, y = line.points[-1]
        found.append(
            {
                "kind": kind, "faint": line.faint, "dash": dash, "end": (scale.x(x), scale.y(y)),
                "points": " ".join(f"{scale.x(x)},{scale.y(y)}" for x, y in line.points),
                "name": shorten(line.name, 15), "name_y": label_y.get(id(line)),
            }
        )  # fmt: skip
    return found


def aria_label(title: str, lines: Sequence[Line], marks: Sequence[Mark]) -> str:
    """The chart in words, for those who cannot see it."""
    descriptions = [
        f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines if not line.faint
    ]
    return escape_controls(
        "; ".join([f"{title}: {', '.join(descriptions)}", *(f"step {mark.step:g}: {mark.text}" for mark in marks)])
    )


def separate_labels(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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
