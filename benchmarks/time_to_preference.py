"""How much network each method needs until the pictures show what was asked for.

    python benchmarks/time_to_preference.py [--seeds 0 1 2] [--methods SRPO Flow-GRPO ...] [--budget 8000] [--jobs 2]
    python benchmarks/time_to_preference.py --compared    # of the rows that comparison.py has, without any training
    python benchmarks/time_to_preference.py --quick       # the mechanics, in a few minutes; its numbers mean nothing

Denoiser forwards (batch rows x network evaluations, counted at model.predict) until, on fixed prompts that name no
style, the judge sees the target style in .8 of the images while concept accuracy is within .03 of the base model's; a
run stops there, or when it has lost .2 of the concepts, which is taken as lost for good. A method that does not get
there within the budget is reported as never. The way to .2, .4 and .6 is reported as well, and to rises of the
optimised objective whatever the concepts do, shares of the largest that a method has: linear between two checks, and
"at most" the first check's forwards where that one is there already, since nothing says how it got there. Concepts are
those of the later check, so that a run which kept them only in between counts as never, and with 48 images one of them
is .02. Every check draws from the same noise. Seconds are of this machine, training only. Run `comparison.py tune`
first for tuned learning rates; otherwise the recipes' hold.

Writes RESULTS/time_to_preference.svg: style share over forwards, one curve a method (mean over seeds).
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
from comparison import with_early_looks
from figures import standalone
from methods import STYLE, Check, about, available, parsed, rate, referees, settings, slug, small, watch
from rows import Row, made_in, measured, write_table

from palate.report import Line, chart

LEVELS, CONCEPT_LOSS, LOST = (0.2, 0.4, 0.6, 0.8), 0.03, 0.2
RISES = (0.2, 0.5, 0.8)  # of the optimised objective, as shares of the largest rise that a method has on average


def reached(check: Check, base_concept: float) -> bool:
    return check.mean("style") >= LEVELS[-1] and check.mean("concept") >= base_concept - CONCEPT_LOSS


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


def compared(results: Path, methods: list[str]) -> list[dict]:
    """The style rows of comparison.py in the form of `run`, those of a method at its largest budget, with their early
    looks."""
    found: dict[str, dict[int, list[dict]]] = {}
    for path, row in made_in(results, f"{slug('comparison', 'style')}-*.json"):
        if row["method"] not in methods:
            continue
        keys = ("style", "concept", "reward", "heldout")
        checks = [{"forwards": point["forwards"], **{key: float(np.mean(point[key])) for key in keys}}
                  for point in with_early_looks(results, "style", row)["points"]]  # fmt: skip
        last = row["points"][-1]
        told = {"method": row["method"], "seed": row["seed"], "checks": checks}
        told |= {key: last[key] for key in ("forwards", "updates", "differentiated")}
        found.setdefault(row["method"], {}).setdefault(int(path.stem.rpartition("-")[2]), []).append(told)
    return [row for own in found.values() for row in own[max(own)]]


def run(method: str, seed: int, prompts: int, budget: int, checks: int, overrides: list[str]) -> dict:
    """What the table and the plot need of one run."""
    who = referees(prompts, (0,))

    def done(check: Check) -> bool:
        concept = float(np.mean(who.base["values"]["concept"]))
        return reached(check, concept) or check.mean("concept") < concept - LOST

    found = watch(method, seed, who, budget=budget, checks=checks, overrides=overrides, done=done)
    last = found[-1]
    rows = [
        {
            "forwards": c.forwards,
            "style": c.mean("style"),
            "concept": c.mean("concept"),
            "reward": c.mean("reward"),
            "heldout": c.mean("heldout"),
        }
        for c in found
    ]
    return {
        "method": method,
        "seed": seed,
        "forwards": last.forwards,
        "updates": last.updates,
        "differentiated": last.differentiated,
        "checks": rows,
    }


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
    print(path)


def trained(args: argparse.Namespace) -> list[dict]:
    """The runs of this program's own."""
    wanted = []
    for seed in args.seeds:
        for method in args.methods:
            overrides = [f"trainer.lr={rate(method, args.results)}", *args.override]
            overrides += small(method) if args.quick else []
            wanted.append(
                Row(
                    args.results / f"{slug('time', method, seed, args.budget)}.json",
                    run,
                    (method, seed, args.prompts, args.budget, args.checks, overrides),
                    recipe=settings(method),
                )
            )
    return measured(wanted, args.jobs, lambda row: {k: v for k, v in row.items() if k != "checks"},
                    minutes=args.minutes)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=available(), choices=available())
    parser.add_argument("--budget", type=int, default=8000, help="denoiser forwards after which a run has failed")
    parser.add_argument("--checks", type=int, default=4, help="measurements in a run, evenly spread over the budget")
    parser.add_argument("--prompts", type=int, default=48, help="one image each")
    parser.add_argument("--compared", action="store_true", help="of comparison.py's rows; nothing is trained")
    parser.add_argument("--override", nargs="*", default=[], help="for every method")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.budget, args.checks, args.prompts = args.seeds[:1], 60, 1, 8
    rows = compared(args.results, args.methods) if args.compared else trained(args)
    if not rows:
        raise SystemExit("no rows of this model: python benchmarks/comparison.py --tasks style")
    text = table(rows)
    write_table(args.results / "time_to_preference.md", text)
    print(text)
    plot(rows, args.results / "time_to_preference.svg")


if __name__ == "__main__":
    main()
