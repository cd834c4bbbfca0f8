"""How much network each method needs until the pictures show what was asked for.

    python benchmarks/time_to_preference.py [--seeds 0 1 2] [--methods SRPO Flow-GRPO ...] [--budget 6000] [--jobs 2]
    python benchmarks/time_to_preference.py --quick       # the mechanics, in a few minutes; its numbers mean nothing

Denoiser forwards (batch rows x network evaluations, counted at model.predict) until, on fixed prompts that name no
style, the judge sees the target style in .8 of the images while concept accuracy is within .03 of the base model's. A
method that does not get there within the budget is reported as never. Every check draws from the same noise. Seconds
are of this machine, training only. Run `methods.py tune` first for tuned learning rates; otherwise the recipes' hold.

Writes RESULTS/time_to_preference.svg: style share over forwards, one curve a method (mean over seeds).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
from figures import STYLE as CSS
from methods import STYLE, Check, Row, about, available, measured, parsed, rate, referees, slug, small, watch

from palate.report import Line, chart

TARGET, CONCEPT_LOSS = 0.8, 0.03


def reached(check: Check, base_concept: float) -> bool:
    return check.mean("style") >= TARGET and check.mean("concept") >= base_concept - CONCEPT_LOSS


def run(method: str, seed: int, prompts: int, budget: int, checks: int, overrides: list[str]) -> dict:
    """What the table and the plot need of one run."""
    who = referees(prompts, (0,))
    found = watch(method, seed, who, budget=budget, checks=checks, overrides=overrides,
                  done=lambda check: reached(check, float(np.mean(who.base["values"]["concept"]))))
    base, last = found[0], found[-1]
    rows = [{"forwards": c.forwards, "style": c.mean("style"), "concept": c.mean("concept"), "reward": c.mean("reward"),
             "heldout": c.mean("heldout")} for c in found]
    return {"method": method, "seed": seed, "budget": budget, "reached": reached(last, base.mean("concept")),
            "forwards": last.forwards, "updates": last.updates, "seconds": last.seconds,
            "differentiated": last.differentiated, "checks": rows}


def ratio(slow: list[dict], fast: list[dict], resamples: int = 2000) -> tuple[float, float, float, bool]:
    """(forwards of slow / forwards of fast, its 95 % bootstrap interval over seeds, whether it is only a lower bound).

    A run that never got there counts with the budget it had spent, which makes the ratio a lower bound.
    """
    a, b = (np.array([row["forwards"] for row in rows], dtype=float) for rows in (slow, fast))
    random = np.random.default_rng(0)
    drawn = [random.choice(a, len(a)).mean() / random.choice(b, len(b)).mean() for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(a.mean() / b.mean()), float(low), float(high), not all(row["reached"] for row in slow)


def table(rows: list[dict]) -> str:
    lines = ["| method | seeds there | forwards | updates x forwards per update | with gradient | seconds here "
             "| last style | last concept (base) | optimised (seeds above the base) | held-out |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        there = [row for row in own if row["reached"]]
        last = [row["checks"][-1] for row in own]
        shown = there or own
        up = sum(row["checks"][-1]["reward"] > row["checks"][0]["reward"] for row in own)

        def mean(key: str, of: list[dict] = shown) -> float:
            return float(np.mean([row[key] for row in of]))

        spread = about([row["forwards"] for row in there], "{:.0f}") if there else "never"
        bound = "" if there else f" (> {mean('forwards'):.0f})"
        lines.append(
            f"| {method} | {len(there)} of {len(own)} | {spread}{bound} | {mean('updates'):.1f} x "
            f"{mean('forwards') / max(mean('updates'), 1):.0f} | {mean('differentiated'):.0f} | "
            f"{mean('seconds'):.0f} | {mean('style', last):.2f} | {mean('concept', last):.2f} "
            f"({own[0]['checks'][0]['concept']:.2f}) | "
            f"{mean('reward', last):+.3f} ({up} of {len(own)}) | {mean('heldout', last):+.3f} |")
    by = {method: [row for row in rows if row["method"] == method] for method in ("SRPO", "Flow-GRPO")}
    if by["Flow-GRPO"] and by["SRPO"] and all(row["reached"] for row in by["SRPO"]):
        value, low, high, bound = ratio(by["Flow-GRPO"], by["SRPO"])
        said = f"at least {value:.1f}" if bound else f"{value:.1f} (over seeds {low:.1f} to {high:.1f})"
        lines += ["", f"Forwards of Flow-GRPO over SRPO: {said}."]
    elif by["SRPO"] and by["Flow-GRPO"]:
        lines += ["", "SRPO did not get there on every seed: no ratio."]
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    curves = []
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row["checks"] for row in rows if row["method"] == method]
        length = min(map(len, runs))
        points = [(float(np.mean([r[i]["forwards"] for r in runs])), float(np.mean([r[i]["style"] for r in runs])))
                  for i in range(length)]
        curves.append(Line(method, points, method == "SRPO"))
    svg = str(chart(f"Share of {STYLE}", curves, share=True)).replace(">step<", ">forwards<")
    svg = re.sub(r"<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', svg, count=1)
    path.write_text(svg.replace(">", ">" + CSS, 1))
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=available(), choices=available())
    parser.add_argument("--budget", type=int, default=6000, help="denoiser forwards after which a run has failed")
    parser.add_argument("--checks", type=int, default=8, help="measurements in a run, evenly spread over the budget")
    parser.add_argument("--prompts", type=int, default=64, help="one image each")
    parser.add_argument("--override", nargs="*", default=[], help="for every method")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.budget, args.checks, args.prompts = args.seeds[:1], 60, 1, 8
    wanted = []
    for seed in args.seeds:
        for method in args.methods:
            overrides = [f"trainer.lr={rate(method, args.results)}", *args.override]
            overrides += small(method) if args.quick else []
            wanted.append(Row(args.results / f"{slug('time', method, seed, args.budget)}.json", run,
                              (method, seed, args.prompts, args.budget, args.checks, overrides)))
    rows = measured(wanted, args.jobs, lambda row: {k: v for k, v in row.items() if k != "checks"})
    text = table(rows)
    (args.results / "time_to_preference.md").write_text(text + "\n")
    print(text)
    plot(rows, args.results / "time_to_preference.svg")


if __name__ == "__main__":
    main()
