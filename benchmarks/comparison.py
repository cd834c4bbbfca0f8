"""One comparison: every method on every task, paired over prompts and seeds, with what each run cost.

    python benchmarks/comparison.py tune                  # the same small search for each method and task, once
    python benchmarks/comparison.py [--tasks style jpeg] [--methods SRPO ...] [--seeds 0 1 2] [--jobs 2]
    python benchmarks/comparison.py plan                  # minutes of each row and hours of all that are left, here
    python benchmarks/comparison.py table                 # the tables of the rows that are there
    ... --minutes 110                                     # no row is begun later; the same command goes on
    python benchmarks/comparison.py --quick               # the mechanics, in minutes; its numbers mean nothing

A run goes on until it saturates (no better value of the goal in the last STALL looks), until its loss is not finite, or
until its task's denoiser forwards are spent (BUDGETS), and says which. It is judged at the best goal of any look that
kept the concepts within LOST of the base's, the base itself among them: each at its own best, by one rule. Which look
that is, and whether it kept the concepts, every second prompt decides for the others: a best that is chosen by what it
is judged on flatters, and most where nothing is learned. The goal is not what was optimised, jpeg's apart (tasks.py).
Two methods are compared on the same prompts, noise and training seeds; intervals are over prompts and seeds at once
(`crossed`), so that a result of one lucky seed is not one of the method.

All of it is meant for one night of two cores, and `plan` says beforehand how long it takes here. So every method has
the same cut: learning rates are searched on SEARCHED and carried to the other tasks, since Adam is blind to a reward's
scale; tasks of three seeds have a smaller budget than the headline; each run is looked at LOOKS times. A search is
three runs for everybody: at the recipe's rate, at twice as much, and at four times or at half as much, on from the
better of the two. Rows are made seed by seed, so that tables of a part have all methods, with fewer seeds.

Costs: denoiser forwards, the share of them with a gradient, images that the reward has looked at, and seconds of one
processor in training alone. A row, a file in RESULTS, is not made again, so the command goes on where it was cut off;
and a new embedded model makes its own (rows.py). The tables hold all rows that are there with the same settings.

Writes RESULTS/comparison.{json,md}; `results_page.py` makes the pictures.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import budget
import methods
import numpy as np
import torch
from budget import Prices
from methods import METHODS, Check, Referees, available, first_rate, parsed, referees, settings, slug, small, watch
from rows import Row, is_made, keep_tuned, made, made_in, measured, write_table
from scipy import stats
from tasks import TASKS, missing, needs_gradient

from palate import recipe
from palate.evaluate import generate, quantise
from palate.runtime.images import encode_png, to_pixels

STALL, LOST = 3, 0.05
CONCEPTS = ("style", "absolute", "jpeg", "taste")  # tasks whose prompts name one thing that must stay right
HEADLINE, SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)
EARLY = "early"  # rows of another budget are named so: they are in no table, but may have looked more often
# denoiser forwards of a run at most
BUDGETS = {"style": 12000, "absolute": 8000, "scenes": 12000, "unguided": 60000, "jpeg": 8000, "taste": 8000}
LOOKS, PROMPTS, TUNE_BUDGET, TUNE_SEED = 6, 48, 4000, 100
LOWEST, *BEGIN_WITH, HIGHEST = TRIED = (0.5, 1.0, 2.0, 4.0)  # times the recipe's learning rate; three of them each
SEARCHED = ("style", "scenes")  # tasks with a search of their own; the others take the style's learning rates
STAND_INS = ("Flow-GRPO", "Diffusion-DPO")  # left out unless named: their released and online forms stand for them
ONLY = {"DRaFT-1": ("scenes",)}  # LeapAlign's nearest relative; elsewhere DRaFT-LV stands for it
# task -> weights that it needs besides
BESIDE = {"scenes": ("detector",), "unguided": ("detector",), "taste": ("emoji-1step",)}
SHOWN = 6  # prompts whose pictures the first seed keeps
HALVES = (slice(0, None, 2), slice(1, None, 2))  # of the prompts: each is judged at the look that the other one picks
MEASURES = ("concept", "style", "diversity", "cast", "detail", "again")
Points = list[dict[str, Any]]


def applies(method: str, task: str) -> bool:
    """Whether the method is compared on the task: it can use its reward, and is not kept for another one."""
    if task not in ONLY.get(method, TASKS) or (TASKS[task].fixed and method not in TASKS[task].fixed):
        return False
    return TASKS[task].gradient or TASKS[task].soft is not None or not needs_gradient(METHODS[method])


def stalled(values: Sequence[float]) -> bool:
    """No better value in the last STALL of them."""
    return len(values) > STALL and max(values[-STALL:]) <= max(values[:-STALL])


def why_ended(goals: Sequence[float], spent: bool) -> str:
    """saturated, budget or not finite, from the goal at each look and whether all forwards are spent; a run that saw
    nothing better by its last look has saturated, whatever it might have spent."""
    return "saturated" if stalled(goals) else "budget" if spent else "not finite"


def looks_at(task: str, prompts: int) -> tuple[int, tuple[int, ...]]:
    """How many prompts a look is at, and the seeds of their pictures; always `2 prompts` pictures. Two a prompt, by
    which diversity is measured, but one of twice as many scenes: they differ more than two pictures of one do."""
    return (2 * prompts, (0,)) if task in ("scenes", "unguided") else (prompts, (0, 1))


def run(
    task: str, method: str, seed: int, prompts: int, budget: int, checks: int, overrides: list[str], pictures: bool
) -> dict[str, Any]:
    """The looks at one run, per prompt, with its costs, and why it ended."""
    who = referees(*looks_at(task, prompts), False, task)
    goals: list[float] = []

    def done(check: Check) -> bool:
        goals.append(check.mean("heldout"))
        return stalled(goals)

    shown: list[str] = []
    look = _looking(who, shown) if pictures else None
    found = watch(
        method, seed, who, budget=budget, checks=checks, overrides=overrides, done=done, looked_at=look
    )  # fmt: skip
    ended = why_ended([check.mean("heldout") for check in found[1:]], found[-1].forwards >= budget)
    points = [
        {"updates": c.updates, "forwards": c.forwards, "differentiated": c.differentiated, "scored": c.scored,
         "processor_seconds": c.processor, **c.values}
        for c in found
    ]  # fmt: skip
    return {"task": task, "method": method, "seed": seed, "ended": ended, "prompts": who.prompts, "points": points,
            "pictures": shown}  # fmt: skip


def _looking(who: Referees, shown: list[str]) -> Any:
    """Keeps the pictures of a few prompts at each look, as one PNG beside each other, in base64."""
    prompts = recipe.evenly_spaced(who.prompts, SHOWN)

    def look(model: Any, weights: str) -> None:
        drawn = generate(model, prompts, (0,), weights=weights, guidance=who.task.guidance)
        images = to_pixels(quantise(drawn))
        sheet = np.concatenate(list(images), axis=1)
        shown.append(base64.b64encode(encode_png(sheet)).decode())

    return look


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Every row of the comparison, headline seeds where the task is `style`. All methods of a seed come before the next
    seed, so that a comparison which was cut off has as many seeds of each."""
    rows = []
    for task in args.tasks:
        overrides = {
            method: [f"trainer.lr={methods.rate(method, args.results, task)}", *args.override]
            + (small(method) if args.quick else [])
            for method in args.methods
            if applies(method, task)
        }
        spent = args.budget or BUDGETS[task]
        for seed, method in itertools.product(args.seeds or seeds_of(task), overrides):
            arguments = (task, method, seed, args.prompts, spent, args.checks, overrides[method], seed == 0)
            program = "comparison" if args.quick or spent == BUDGETS[task] else EARLY
            path = args.results / f"{slug(program, task, method, seed, spent)}.json"
            rows.append(Row(path, run, arguments, BESIDE.get(task, ()), settings(method, task)))
    return rows


def seeds_of(task: str) -> tuple[int, ...]:
    """Five for the headline, three elsewhere."""
    return HEADLINE if task == "style" else SEEDS


def standing(args: argparse.Namespace, rows: Sequence[Row] = ()) -> list[Row]:
    """Those of these rows, and all others of the comparison, that are there with the same settings, so that a table of
    some tasks or methods does not take the others' place."""
    paths, others = {row.path for row in rows}, []
    for task, name in itertools.product(TASKS, available()):
        if any(args.results.glob(f"{slug('comparison', task, name)}-*.json")):  # a recipe is slow to read
            one = argparse.Namespace(**{**vars(args), "tasks": [task], "methods": [name], "seeds": None})
            others += [row for row in rows_of(one) if row.path not in paths]
    return [row for row in (*rows, *others) if is_made(row)]


def by_method(results: Path, task: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Method -> seed -> its row of the task, {"seed", "points": [{"forwards", key: per prompt}]}; of a method those at
    its largest budget."""
    found: dict[str, dict[int, dict[int, dict[str, Any]]]] = {}
    for path, run in made_in(results, f"{slug('comparison', task)}-*.json"):
        found.setdefault(run["method"], {}).setdefault(row_budget(path), {})[run["seed"]] = run
    return {method: own[max(own)] for method, own in found.items()}


def row_budget(path: Path) -> int:
    """Which a row's name ends with."""
    return int(path.stem.rpartition("-")[2])


def try_rate(task: str, method: str, lr: float, budget: int, prompts: int, more: list[str]) -> dict[str, Any]:
    """One run of the search, on prompts that no table uses."""
    who = referees(prompts, (0,), True, task)
    found = watch(method, TUNE_SEED, who, budget=budget, checks=1, overrides=[f"trainer.lr={lr}", *more])
    return {"lr": lr, "goal": found[-1].mean("heldout"), "concept": found[-1].mean("concept"),
            "concept_base": found[0].mean("concept"), "finite": found[-1].forwards >= budget}  # fmt: skip


def search_row(args: argparse.Namespace, task: str, method: str, factor: float) -> Row:
    """The run of the search at so many times the recipe's learning rate."""
    lr = first_rate(method) * factor
    more = small(method) if args.quick else []
    spent = args.budget or TUNE_BUDGET
    path = args.results / f"{slug('comparison-tune', task, method, factor, spent)}.json"
    arguments = (task, method, lr, spent, args.prompts, more)
    return Row(path, try_rate, arguments, BESIDE.get(task, ()), settings(method, task))


def search_rows(args: argparse.Namespace) -> list[list[Row]]:
    """Three runs of the search for each task of SEARCHED and method: at the recipe's learning rate, at twice as much,
    and on from the better of the two, as soon as they are made."""
    return [_search(args, task, name) for task in args.tasks if task in SEARCHED
            for name in args.methods if applies(name, task)]  # fmt: skip


def _search(args: argparse.Namespace, task: str, method: str) -> list[Row]:
    first = [search_row(args, task, method, factor) for factor in BEGIN_WITH]
    found = [made(row.path) for row in first if is_made(row)]
    higher = len(found) == len(first) and best_of(task, found) is found[-1]
    return [*first, search_row(args, task, method, HIGHEST if higher else LOWEST)]


def best_of(task: str, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The run with the highest goal that lost at most .1 of the concepts; if all lost more, the one that kept most;
    None if none stayed finite."""
    own = [row for row in found if row["finite"]]
    kept = [row for row in own if task not in CONCEPTS or row["concept"] >= row["concept_base"] - 0.1]
    return max(kept, key=lambda r: r["goal"]) if kept else max(own, key=lambda r: r["concept"], default=None)


def tune(args: argparse.Namespace) -> dict[str, float]:
    """The learning rate of the best of three runs for each method and task, kept for the rows that follow."""
    for part in (slice(len(BEGIN_WITH)), slice(None)):
        measured([row for own in search_rows(args) for row in own[part]], args.jobs, minutes=args.minutes)
    best = {f"{own[0].arguments[0]}: {own[0].arguments[1]}": best_of(own[0].arguments[0], [made(r.path) for r in own])
            for own in search_rows(args)}  # fmt: skip
    chosen = keep_tuned(args.results, {name: found["lr"] for name, found in best.items() if found})
    if broken := [name for name, found in best.items() if not found]:
        raise ValueError(f"{', '.join(broken)}: no learning rate stayed finite; lower trainer.lr of the recipe")
    return chosen


# --- what the rows say ----------------------------------------------------------------------------------------------


def mean(point: dict[str, Any], key: str) -> float:
    """Over the prompts."""
    return float(np.nanmean(point[key]))


def best_kept(points: Points, task: str, prompts: slice = slice(None)) -> int:
    """The place of the best goal among the looks that kept the concepts, both of these prompts."""
    return max(kept_looks(points, task, prompts), key=lambda i: float(np.nanmean(points[i]["heldout"][prompts])))


def kept_looks(points: Points, task: str, prompts: slice = slice(None)) -> list[int]:
    """The places of the looks that lost at most LOST of the concepts, where the task's prompts have one each."""
    return keeping(points, LOST, prompts) if task in CONCEPTS else list(range(len(points)))


def keeping(points: Points, lost: float, prompts: slice = slice(None)) -> list[int]:
    """The places of the looks that lost at most so much of these prompts' concepts, the base among them."""
    share = [float(np.nanmean(point["concept"][prompts])) for point in points]
    return [i for i in range(len(points)) if i == 0 or share[i] >= share[0] - lost]


def cross_fitted(points: Points, key: str, pick: Callable[[slice], int]) -> np.ndarray:
    """(prompts,) of a measurement, each half of them at the look that `pick` names for the other half."""
    values = np.array(points[0][key], dtype=float)
    for half, other in (HALVES, HALVES[::-1]):
        values[half] = points[pick(other)][key][half]
    return values


def looks_judged(found: dict[str, Any]) -> list[int]:
    """The places of the looks at which the two halves of the prompts are judged."""
    return [best_kept(found["points"], found["task"], other) for other in HALVES[::-1]]


def with_early_looks(results: Path, task: str, run: dict[str, Any]) -> dict[str, Any]:
    """The run with what rows of the same seed and of a smaller budget saw before its first look."""
    before = {point["forwards"]: point
              for _, row in made_in(results, f"{slug(EARLY, task, run['method'], run['seed'])}-*.json")
              for point in row["points"] if 0 < point["forwards"] < run["points"][1]["forwards"]}  # fmt: skip
    base, *later = run["points"]
    return run | {"points": [base, *(before[spent] for spent in sorted(before)), *later]}


def how_ended(found: dict[str, Any]) -> str:
    """As the row says, but "never rose" of a run that stopped with no look above its start."""
    rose = any(looks_judged(found))
    return "never rose" if found["ended"] == "saturated" and not rose else str(found["ended"])


def crossed(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values (seeds, prompts) and its 95 % interval over both, for seeds and prompts that were not tried.

    Two crossed random effects: the mean's variance is (MS seeds + MS prompts - MS residual) / values, its degrees of
    freedom are Satterthwaite's (1946). With three seeds that differ, a bootstrap of both holds the truth in .79 of the
    cases, this in .92. With one seed, or one prompt, it is Student's interval over the others. NaNs are replaced
    by what their seed and their prompt make likely; a prompt or a seed of NaNs alone is left out.
    """
    known = np.isfinite(values)
    whole = _completed(values[known.any(1)][:, known.any(0)])
    count, width = whole.shape
    if not whole.size:
        return float("nan"), float("nan"), float("nan")
    center = float(np.mean(values[known]))
    by_seed, by_prompt = whole.mean(1) - whole.mean(), whole.mean(0) - whole.mean()
    rest = whole - whole.mean() - by_seed[:, None] - by_prompt
    sums = (width * np.sum(by_seed**2), count * np.sum(by_prompt**2), np.sum(rest**2))
    free = (count - 1, width - 1, (count - 1) * (width - 1))
    seeds, prompts, residual = (total / max(degrees, 1) for total, degrees in zip(sums, free, strict=True))
    variance = max(seeds + prompts - residual, seeds, prompts)
    if not any(free):
        return center, -np.inf, np.inf
    noise = sum(square**2 / max(degrees, 1) for square, degrees in zip((seeds, prompts, residual), free, strict=True))
    half = student(max(variance**2 / noise, 1.0)) * (variance / whole.size) ** 0.5 if noise > 0 else 0.0
    return center, center - half, center + half


def _completed(values: np.ndarray) -> np.ndarray:
    """Values (seeds, prompts) with seed mean + prompt mean - mean in the place of a NaN."""
    known = np.isfinite(values)
    if known.all():
        return values
    likely = np.nanmean(values, 1, keepdims=True) + np.nanmean(values, 0, keepdims=True) - np.nanmean(values)
    return np.where(known, values, likely)


def student(degrees: float) -> float:
    """Half the width of a 95 % interval in standard errors, by Student's t."""
    return float(stats.t.ppf(0.975, degrees))


def at_best(runs: Sequence[dict[str, Any]], key: str, *, change: bool = True) -> np.ndarray:
    """(seeds, prompts) of a measurement where each run is judged, less the base's with `change`."""
    rows = []
    for found in runs:
        points = found["points"]
        now = cross_fitted(points, key, partial(best_kept, points, found["task"]))
        rows.append(now - np.array(points[0][key], dtype=float) if change else now)
    return np.stack(rows)


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By task and method: the goal's rise with its interval, what it cost, why it ended; and each method against the
    task's best in pairs."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in found):
        runs = {m: [r for r in found if r["task"] == task and r["method"] == m]
                for m in dict.fromkeys(r["method"] for r in found if r["task"] == task)}  # fmt: skip
        told = {}
        for method, own in runs.items():
            ends = [r["points"][look] for r in own for look in looks_judged(r) if look > 0]
            why = [how_ended(r) for r in own]
            last = [r["points"][-1] for r in own]
            told[method] = {
                "seeds": len(own),
                "goal": crossed(at_best(own, "heldout")),
                "base": float(np.mean([mean(r["points"][0], "heldout") for r in own])),
                "reward": crossed(at_best(own, "reward")),
                **{key: crossed(at_best(own, key)) for key in MEASURES if key in own[0]["points"][0]},
                "to_best": _cost(own, ends) if ends else None,
                "spent": float(np.mean([end["forwards"] for end in last])),
                "ended": {reason: why.count(reason) for reason in dict.fromkeys(why)},
            }  # fmt: skip
        enough = min(len(seeds_of(task)), max(len(own) for own in runs.values()), len(SEEDS))
        leader = max((m for m in told if len(runs[m]) >= enough), key=lambda method: told[method]["goal"][0])
        for method, own in runs.items():
            if method != leader and {r["seed"] for r in own} & {r["seed"] for r in runs[leader]}:
                told[method][f"less than {leader}"] = crossed(_paired(runs[leader], own, "heldout"))
        result[task] = {"leader": leader, "methods": told}
    return result


def _cost(runs: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of reaching these looks, on average. Processor seconds are the forwards' at the price of the run that was
    disturbed least: the same row takes up to 2.6 times as long on another machine, or beside other work."""
    last = [run["points"][-1] for run in runs]
    price = min(end["processor_seconds"] / end["forwards"] for end in last if end["forwards"])  # 0: never finite
    cost = {key: float(np.mean([end[key] for end in ends])) for key in ("forwards", "differentiated", "scored")}
    return cost | {"processor_seconds": price * cost["forwards"]}


def _paired(first: Sequence[dict], second: Sequence[dict], key: str) -> np.ndarray:
    """(seeds, prompts) of the first's value less the second's, on the seeds that both have."""
    seeds = [r["seed"] for r in first if r["seed"] in {other["seed"] for other in second}]
    pick = [[next(r for r in runs if r["seed"] == seed) for seed in seeds] for runs in (first, second)]
    return at_best(pick[0], key) - at_best(pick[1], key)


def searched(found: Sequence[dict[str, Any]], results: Path) -> dict[str, str]:
    """By task a sentence on the learning rates of its methods: which lie at an end of the search, which had none."""
    chosen, told = methods.tuned(results), {}
    for task in dict.fromkeys(row["task"] for row in found):
        places: dict[str, list[str]] = {}
        for method in dict.fromkeys(row["method"] for row in found if row["task"] == task):
            if method in TASKS[task].fixed:
                places.setdefault(f"not searched, {methods.rate(method, results, task):g}", []).append(method)
                continue
            lr = chosen.get(f"{task}: {method}") or chosen.get(f"style: {method}")
            factor = lr / first_rate(method) if lr else 0.0
            tried = [k for k, known in enumerate(TRIED) if abs(factor - known) < 1e-6 * known]
            where = {0: "the lowest tried", len(TRIED) - 1: "the highest tried"}
            place = where.get(tried[0], "") if tried else "not searched, the recipe's" if not lr else ""
            places.setdefault(place, []).append(method)
        ends = (f"{place}: {', '.join(names)}" for place, names in places.items() if place)
        told[task] = f"Learning rates, {'; '.join(ends) or 'all inside the search'}."
    return told


def lacking(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By task a sentence on what is not measured: methods without rows, and those with fewer seeds than are meant."""
    told = {}
    for task in TASKS:
        seeds = {name: {row["seed"] for row in found if (row["task"], row["method"]) == (task, name)}
                 for name in available() if name not in STAND_INS and applies(name, task)}  # fmt: skip
        without = [name for name, own in seeds.items() if not own]
        meant = len(seeds_of(task))
        fewer = [f"{name} ({len(own)})" for name, own in seeds.items() if 0 < len(own) < meant]
        parts = [f"Not measured: {', '.join(without)}."] if without else []
        parts += [f"Fewer than {meant} seeds: {', '.join(fewer)}."] if fewer else []
        told[task] = " ".join(parts)
        if len(without) == len(seeds):
            told[task] = f"Not measured: `python benchmarks/comparison.py --tasks {task}`."
    return told


def table(result: dict[str, Any], rates: Mapping[str, str] | None = None) -> str:
    """A table per task, and below it what `searched` says of it."""
    lines = []
    for task, told in result.items():
        what = TASKS[task]
        base, beside = next(iter(told["methods"].values()))["base"], "again" if what.again else "concept"
        lines += [
            f"**{what.title}** ({what.unit}; the base model has {base:.3f})", "",
            f"| method | seeds | rise | behind {told['leader']}, seeds of both "
            f"| {'mirrored' if what.again else 'concept'}, change | diversity, change "
            "| forwards to there (with gradient) | images scored | processor seconds | ended |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        order = sorted(told["methods"], key=lambda method: -told["methods"][method]["goal"][0])
        for method in order:
            row = told["methods"][method]
            cost, behind = row["to_best"], row.get(f"less than {told['leader']}")
            spent = ["never", "", ""]
            if cost:
                gradient = f"{cost['differentiated'] / cost['forwards']:.0%}"
                spent = [f"{cost['forwards']:,.0f} ({gradient})",
                         *(f"{cost[key]:,.0f}" for key in ("scored", "processor_seconds"))]  # fmt: skip
            ended = ", ".join(f"{count} {why}" for why, count in row["ended"].items())
            lines.append(
                f"| {method} | {row['seeds']} | {spelled(row['goal'])} | {spelled(behind) if behind else ''} "
                f"| {spelled(row[beside], 2)} | {spelled(row['diversity']) if 'diversity' in row else ''} "
                f"| {' | '.join(spent)} | {ended} (at {row['spent']:,.0f}) |"
            )
        lines += ["", rates[task], ""] if rates else [""]
    return "\n".join(lines)


def spelled(value: Sequence[float], digits: int = 3) -> str:
    """ "+0.123 (+0.100 to +0.140)"; without an interval where nothing moved at all."""
    if not any(value):
        return f"{0:+.{digits}f}"
    center, low, high = (f"{x:+.{digits}f}" for x in value)
    return f"{center} ({low} to {high})"


def write(args: argparse.Namespace, rows: Sequence[Row] = ()) -> str:
    """comparison.{json,md}, of these rows and of all others that are there; each table says what it lacks."""
    found = [made(row.path) for row in standing(args, rows)]
    result, rates, without = summary(found), searched(found, args.results), lacking(found)
    notes = {task: f"{rates[task]} {without[task]}".strip() for task in result}
    text = table(result, notes) if found else ""
    for task in TASKS:
        if task not in result:
            text += f"\n**{TASKS[task].title}**: {missing(task) or without[task]}\n"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(args.results / "comparison.md", text)
    return text


def usual(results: Path) -> argparse.Namespace:
    """The arguments of the command without options."""
    return argparse.Namespace(results=results, seeds=None, budget=None, checks=LOOKS, prompts=PROMPTS, override=[],
                              quick=False)  # fmt: skip


def unsearched(args: argparse.Namespace) -> list[str]:
    """Methods whose learning rate nothing was searched for on this model."""
    known = methods.tuned(args.results)
    tasks = ("style", *args.tasks)
    return [name for name in args.methods if not any(f"{task}: {name}" in known for task in tasks)]


def plan(rows: Sequence[Row], search: Sequence[Row], jobs: int, prices: Prices) -> str:
    """How many rows are left, and their processor time at these prices if none saturates: per method a row's minutes on
    each task, and the hours of them all."""
    left = [row for row in [*search, *rows] if not is_made(row)]
    minutes: dict[str, dict[str, float]] = {}
    total = 0.0
    for row in left:
        spent = expected(row, prices)
        total += spent
        if row.make is run:
            minutes.setdefault(row.arguments[1], {})[row.arguments[0]] = spent / 60
    tasks = list(dict.fromkeys(row.arguments[0] for row in rows))
    lines = [f"| minutes of a row | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for method, own in minutes.items():
        cells = (f"{own[task]:.1f}" if task in own else "" for task in tasks)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    searching = sum(row.make is try_rate for row in left)
    lines += ["", f"{len(left)} of {len(rows) + len(search)} rows are left, {searching} of them of the search: at most "
              f"{total / 3600:.1f} processor hours, {total / 3600 / jobs:.1f} hours with --jobs {jobs}."]  # fmt: skip
    return "\n".join(lines)


def expected(row: Row, prices: Prices) -> float:
    """Processor seconds of a row that is not made yet."""
    if row.make is try_rate:
        _, method, _, spent, prompts, _ = row.arguments
        return budget.row_seconds(method, prices, spent, 1, prompts)
    _, method, _, prompts, spent, checks, _, _ = row.arguments
    return budget.row_seconds(method, prices, spent, checks, 2 * prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["run", "tune", "plan", "table"], default="run")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    usual = [name for name in available() if name not in STAND_INS]
    parser.add_argument("--methods", nargs="+", default=usual, choices=available())
    parser.add_argument("--seeds", type=int, nargs="+", help="else five of the style task, three of the others")
    parser.add_argument(
        "--budget",
        type=int,
        help="denoiser forwards of a run at most; else BUDGETS, of tune 4,000. Such rows are in no table",
    )
    parser.add_argument("--checks", type=int, default=LOOKS, help="looks, evenly spread over the budget")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="two images each; of scenes twice as many of one")
    parser.add_argument("--override", nargs="*", default=[], help="for every method")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.budget, args.checks, args.prompts = (args.seeds or [0])[:2], 60, 2, 4
    for task in list(args.tasks):
        if why := missing(task):
            print(f"{task} is left out: {why}")
            args.tasks.remove(task)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "tune":
        print(json.dumps(tune(args)))
        return
    rows = rows_of(args)
    if args.what == "plan":
        search = [row for own in search_rows(args) for row in own]
        print(plan(rows, search, max(args.jobs, 1), budget.measured_prices()))
        return
    if args.what == "table":
        print(write(args))
        return
    if not args.quick and (names := unsearched(args)):
        print(f"No learning rate was searched for {', '.join(names)}: the recipes' hold. Rows that are made before "
              "`tune` are refused after it.", flush=True)  # fmt: skip

    def show(found: dict[str, Any]) -> dict[str, Any]:
        last = found["points"][best_kept(found["points"], found["task"])]
        return {"ended": found["ended"], **{key: round(mean(last, key), 3) for key in ("heldout", "concept")}}

    measured(rows, args.jobs, show, minutes=args.minutes)
    if args.quick or not args.budget:
        print(write(args, rows))


if __name__ == "__main__":
    main()
