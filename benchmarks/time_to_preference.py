"""How much network each method needs until the pictures show what was asked for.

    python benchmarks/time_to_preference.py   # of the style rows that comparison.py has; nothing is trained

Denoiser forwards (batch rows x network evaluations, counted at model.predict) until, on fixed prompts that name no
style, the judge sees the target style in .8 of the images while concept accuracy is within .03 of the base model's. A
run that does not get there within the budget is reported as never. The way to .2, .4 and .6 is reported as well, and
to rises of the optimised objective whatever the concepts do, shares of the largest that a method has: linear between
two looks, and "at most" the first look's forwards where that one is there already, since nothing says how it got there.
Concepts are those of the later look, so that a run which kept them only in between counts as never. Every look draws
from the same noise. Rows that looked more often in the beginning (`comparison.py --budget 2080 --checks 13`) count with
those of the same seed.

Writes RESULTS/time_to_preference.md and .svg: style share over forwards, one curve a method (mean over seeds).
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
from comparison import by_method, with_early_looks
from figures import standalone
from methods import STYLE, about
from rows import write_table

from palate.report import Line, chart

LEVELS, CONCEPT_LOSS = (0.2, 0.4, 0.6, 0.8), 0.03
RISES = (0.2, 0.5, 0.8)  # of the optimised objective, as shares of the largest rise that a method has on average


def forwards_to(checks: list[dict], level: float, key: str = "style") -> tuple[float, bool]:
    """Denoiser forwards to the level, and whether they are only an upper bound.

    They are those of the first check at the level, less what lies beyond it on the line from the check before; the
    first one after the start counts whole, as an upper bound. Infinite if there is none. A style share counts where the
    concepts are kept; "reward" is a rise over the start."""
    floor = checks[0]["reward"] if key == "reward" else 0.0
    for place, (before, after) in enumerate(itertools.pairwise(checks)):
        kept = key != "style" or after["concept"] >= checks[0]["concept"] - CONCEPT_LOSS
        if kept and after[key] - floor >= level:
            rise, left = after[key] - before[key], level - (before[key] - floor)
            share = left / rise if left > 0 and place > 0 else 1.0
            return before["forwards"] + share * (after["forwards"] - before["forwards"]), place == 0
    return math.inf, False


def goals_of(rows: list[dict]) -> list[tuple[float, str]]:
    """What ways are measured to: shares of the style, and rises of the objective, to two digits."""
    rises: dict[str, list[float]] = {}
    for row in rows:
        start = row["checks"][0]["reward"]
        rises.setdefault(row["method"], []).append(max(check["reward"] for check in row["checks"]) - start)
    largest = max(float(np.mean(own)) for own in rises.values())
    wanted = [float(f"{share * largest:.2g}") for share in RISES] if largest > 0 else []
    return [(level, "style") for level in LEVELS] + [(rise, "reward") for rise in wanted]


def compared(results: Path) -> list[dict]:
    """What the table and the plot need of each style row, with its early looks."""
    rows, keys = [], ("style", "concept", "reward", "heldout")
    for method, runs in by_method(results, "style").items():
        for seed, run in runs.items():
            looks = with_early_looks(results, "style", run)["points"]
            checks = [{"forwards": look["forwards"], **{key: float(np.mean(look[key])) for key in keys}}
                      for look in looks]  # fmt: skip
            told = {key: looks[-1][key] for key in ("forwards", "updates", "differentiated")}
            rows.append({"method": method, "seed": seed, "checks": checks, **told})
    return rows


def way(own: list[dict], level: float, key: str) -> str:
    """A method's cell: mean and deviation over the seeds that get there, and how many do where not all; "at most" where
    the forwards of one are an upper bound."""
    found = [forwards_to(row["checks"], level, key) for row in own]
    there = [forwards for forwards, _ in found if math.isfinite(forwards)]
    most = "at most " if any(bound for forwards, bound in found if math.isfinite(forwards)) else ""
    some = "" if len(there) == len(own) else f" ({len(there)} of {len(own)} seeds)"
    return most + about(there, "{:.0f}") + some if there else "never"


def table(rows: list[dict]) -> str:
    """A line a method: its way to each of `goals_of`, what an update costs, where its runs ended."""
    by = {
        method: [row for row in rows if row["method"] == method]
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    goals = goals_of(rows)
    lines = [
        "| method | "
        + " | ".join(f"forwards to {level:g}" if key == "style" else f"to +{level:g} optimised" for level, key in goals)
        + " | forwards of an update | with gradient | last style | last concept (base) "
        "| optimised (seeds above the base) | held-out |",
        "|---" * (len(goals) + 7) + "|",
    ]
    for method, own in by.items():
        last = [row["checks"][-1] for row in own]
        forwards, updates = (sum(row[key] for row in own) for key in ("forwards", "updates"))
        up = sum(row["checks"][-1]["reward"] > row["checks"][0]["reward"] for row in own)
        cells = [way(own, level, key) for level, key in goals]

        def mean(key: str, of: list[dict] = last) -> float:
            return float(np.mean([row[key] for row in of]))

        lines.append(
            f"| {method} | " + " | ".join(cells) + f" | {forwards / max(updates, 1):.0f} "
            f"| {sum(row['differentiated'] for row in own) / forwards:.0%} "
            f"| {mean('style'):.2f} "
            f"| {mean('concept'):.2f} ({own[0]['checks'][0]['concept']:.2f}) "
            f"| {mean('reward'):+.3f} ({up} of {len(own)}) | {mean('heldout'):+.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    curves = []
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row["checks"] for row in rows if row["method"] == method]
        points = []
        for i in range(max(map(len, runs))):  # a run that ended stays where it ended
            now = [run[min(i, len(run) - 1)] for run in runs]
            points.append(tuple(float(np.mean([check[key] for check in now])) for key in ("forwards", "style")))
        curves.append(Line(method, points, method == "SRPO"))
    svg = str(chart(f"Share of {STYLE}", curves, unit_range=True)).replace(">step<", ">forwards<")
    path.write_text(standalone(svg))


def write(results: Path) -> str:
    """The table and the figure of the rows that are there; "" and nothing written if there are none."""
    rows = compared(results)
    if not rows:
        return ""
    text = table(rows)
    write_table(results / "time_to_preference.md", text)
    plot(rows, results / "time_to_preference.svg")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    print(write(parser.parse_args().results) or "no rows of this model: python benchmarks/comparison.py --tasks style")


if __name__ == "__main__":
    main()
