"""The charts of a run: what it trains for, and beside it what should stay as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from palate.studio.runview import RunView

STAYS = (("heldout", "fits the prompt (second judge)"), ("concept", "right thing shown"), ("diversity", "variety"))
LIKED = "0 is before; at 1 the average is as good as the best sixth was."
LEAST = 0.25  # standard deviations of taste that a chart is high: a hundredth of one fills it not


def curves_of(view: RunView, liking: Sequence[tuple[int, float]] = ()) -> list[dict[str, Any]]:
    """The objective, and what is not optimised as a ratio to the base; [{"title", "note", "lines", ...}].

    `liking`: (step, taste) on the fixed pictures, which then takes the place of the training batches' reward.
    `marks`: from there other words are optimised, so that values before and after do not compare.
    """
    steps, guard, marks = view.of("step"), view.of("guard"), view.marks()
    reward = [(r["step"], r[key]) for r in steps for key in ("reward", "reward_denoise") if _number(r.get(key))]
    wanted = "Your taste of these pictures" if liking else "Your words" if view.page == "/steer" else view.reward_name
    base, kept = guard[0] if guard else {}, []
    for key, label in STAYS:
        if _number(base.get(key)) and base[key] > 0:
            points = [(r["step"], r[key] / base[key]) for r in guard if _number(r.get(key))]
            kept.append({"label": label, "points": points})
    return [
        {"title": f"{wanted}: this is trained", "note": LIKED if liking else "On each step's own pictures: it jumps.",
         "lines": [{"label": "", "points": list(liking) or smooth(reward)}], "ratio": False,
         "least": LEAST if liking else 0.0, "marks": marks},
        {"title": "What should stay: this is not trained", "note": "1 is as before.", "lines": kept,
         "ratio": True, "marks": marks},
    ]  # fmt: skip


def smooth(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """The running mean of the last `window` values: single batches are noisy."""
    last = [[value for _, value in points[max(0, end - window) : end]] for end in range(1, len(points) + 1)]
    return [(step, sum(values) / len(values)) for (step, _), values in zip(points, last, strict=True)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
