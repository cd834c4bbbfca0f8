"""What the papers claim, held against the rows that were measured: a value, its interval, a verdict.

    python benchmarks/claims.py                           # RESULTS/claims.{json,md}, from the rows that are there

Each claim is one number with a bar. Of an interval that lies above the bar the claim holds, below it fails, and
otherwise it is open: the runs cannot tell. A claim whose rows are missing is not measured, and names the command that
makes them. Ratios of forwards are taken at a level of the held-out goal that both methods reach on average; a run that
does not reach it counts with what it had spent, and one that is there at its first look with that look's. So a slow run
that does not get there, or a fast one that was there before anybody looked, makes the ratio a lower bound, by which no
claim fails; the other way round it is an upper bound, by which none holds. Rows of a smaller budget with more looks
(`--budget 2080 --checks 13`) tell when a fast one got there.

Of one seed there is no verdict: its prompts say nothing of other seeds.

Intervals: over prompts and seeds where rows keep their prompts (comparison.py), else over seeds by Student's t, on
prompts that are the same for all; of shares of a range by the bootstrap of both, which few seeds make somewhat narrow;
of the generator that is shipped, which is one, over prompts or timings. The table says which. What is worse when it is
larger (a colour cast) is counted negatively, so that more is always better. Rows of "Palate" are the project's own
aims.

Only rows of the model in the package count (rows.py), and two methods are compared at one budget.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from comparison import LOST, at_best, cross_fitted, crossed, keeping, mean, row_budget, student, with_early_looks
from frontier import share_above
from methods import slug
from rows import content, made, made_in, write_table

from palate.models.vocabulary import parse_prompt

SHARE = 0.8  # of the rise that both methods reach: the level of a ratio
RESAMPLES = 500


class Measured(NamedTuple):
    """A value with its interval; `bound`: a lower bound, `short`: an upper one. `series`: what a figure draws, by name;
    bars are two."""

    value: float
    low: float
    high: float
    bound: bool = False
    series: dict[str, Any] | None = None
    short: bool = False
    over: str = "seeds, prompts"  # what the interval is over


class Claim(NamedTuple):
    """`bar`: what the value must exceed. `tried`: what was done to make a failing claim true."""

    key: str
    paper: str
    text: str
    unit: str
    bar: float
    command: str
    measure: Callable[[Path], Measured | None]
    kind: str  # of its figure: curves, bars or frontier
    tried: str = ""


class Judged(NamedTuple):
    """A claim and what was found."""

    claim: Claim
    found: Measured | None

    @property
    def verdict(self) -> str:
        """holds, fails, open or not measured."""
        if self.found is None:
            return "not measured"
        if self.found.low > self.claim.bar and not self.found.short:
            return "holds"
        return "fails" if self.found.high < self.claim.bar and not self.found.bound else "open"


# --- rows -----------------------------------------------------------------------------------------------------------


def runs_of(results: Path, task: str, *methods: str) -> list[list[dict[str, Any]]]:
    """The comparison's rows of each method at the largest budget at which all have some: {"seed", "points":
    [{"forwards", key: per prompt}]}; else empty."""
    rows = [
        (row["method"], row_budget(path), row) for path, row in made_in(results, f"{slug('comparison', task)}-*.json")
    ]
    by = [{budget for name, budget, _ in rows if name == method} for method in methods]
    most = max(set.intersection(*by), default=None)
    return [[row for name, budget, row in rows if (name, budget) == (method, most)] for method in methods]


def ablation(results: Path, program: str, group: str, *names: str) -> list[dict[int, Any]]:
    """Of each name seed -> row of an ablation of srpo.py, sqdf.py or distar.py, at the largest budget that all have."""
    found: list[dict[str, dict[int, Any]]] = []
    for name in names:
        own: dict[str, dict[int, Any]] = {}
        for path, row in made_in(results, f"{slug(program, group, name)}-[0-9]*.json"):
            seed, _, budget = path.stem.removeprefix(slug(program, group, name) + "-").partition("-")
            own.setdefault(budget, {})[int(seed)] = row
        found.append(own)
    shared = set.intersection(*(set(own) for own in found))
    return [own[max(shared, key=lambda budget: int(budget or 0))] if shared else {} for own in found]


# --- measures -------------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    return crossed(np.array(values, dtype=float)[:, None])


class Reached(NamedTuple):
    """Forwards to a level; whether the run got there, and whether its first look was there already."""

    forwards: float
    there: bool
    at_first: bool = False


def over_runs(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values (seeds, prompts) and its interval over both; of one seed none."""
    center, low, high = crossed(values)
    return (center, low, high) if len(values) > 1 else (center, -np.inf, np.inf)


def reach(forwards: np.ndarray, rises: np.ndarray, level: float) -> Reached:
    """Forwards at which the rises (looks,) first reach the level, linear between two looks. The first look's, where it
    is there already, since what lies before it may be less than one update; the last look's where none is."""
    for i in range(1, len(rises)):
        if rises[i] >= level:
            before = rises[i - 1]
            part = 1.0 if i == 1 else (level - before) / (rises[i] - before) if before < level else 0.0
            return Reached(float(forwards[i - 1] + part * (forwards[i] - forwards[i - 1])), True, i == 1)
    return Reached(float(forwards[-1]), False)


Cube = tuple[np.ndarray, np.ndarray]  # forwards (looks,); the goal's rise (looks, prompts)


def _cube(run: dict[str, Any]) -> Cube:
    """Forwards (looks,) and the goal's rise (looks, prompts)."""
    goal = np.array([point["heldout"] for point in run["points"]], dtype=float)
    return np.array([point["forwards"] for point in run["points"]], dtype=float), goal - goal[0]


def ratio(slow: str, fast: str, task: str = "style") -> Callable[[Path], Measured | None]:
    """Forwards of the slow method over those of the fast one to SHARE of the rise that both reach."""

    def measure(results: Path) -> Measured | None:
        runs = runs_of(results, task, slow, fast)
        if not all(runs):
            return None
        slow_rise, fast_rise = (over_runs(at_best(own, "heldout")) for own in runs)
        cubes = [[_cube(with_early_looks(results, task, run)) for run in own] for own in runs]
        prompts = cubes[0][0][1].shape[1]
        even = np.full(prompts, 1 / prompts)
        level = _level(cubes, even)
        series = {
            name: [[forwards.tolist(), rises.mean(1).tolist()] for forwards, rises in own]
            for name, own in zip((slow, fast), cubes, strict=True)
        }
        drawn = {"level": level, "curves": series}
        if level <= 0 or _by_chance(fast_rise):
            return Measured(np.nan, -np.inf, np.inf, False, drawn)
        value = _log_ratio(cubes, even)
        half = _half_width(cubes)
        ends = (float(np.exp(value + sign * half)) for sign in (-1, 1))
        spent = [_spent(own, level, even) for own in cubes]
        late = [any(not run.there for run in own) for own in spent]  # of the slow runs and of the fast
        early = [any(run.at_first for run in own) for own in spent]
        by_chance = _by_chance(slow_rise)  # then the level may be one that nothing was learned for, and no bound holds
        bounds = (late[0] or early[1] or by_chance, late[1] or early[0] or by_chance)
        return Measured(float(np.exp(value)), *ends, bounds[0], drawn, bounds[1])

    return measure


def _by_chance(rise: tuple[float, float, float]) -> bool:
    """Whether a rise over several seeds is not told from none."""
    return bool(rise[1] <= 0 < rise[2] < np.inf)


def _level(cubes: Sequence[Sequence[Cube]], weights: np.ndarray) -> float:
    """SHARE of the rise that both methods reach on average, with prompts of these weights."""
    return SHARE * float(min(np.mean([(rises @ weights).max() for _, rises in own]) for own in cubes))


def _spent(own: Sequence[Cube], level: float, weights: np.ndarray) -> list[Reached]:
    """Of each run, with prompts of these weights."""
    return [reach(forwards, rises @ weights, level) for forwards, rises in own]


def _log_ratio(cubes: Sequence[Sequence[Cube]], weights: np.ndarray) -> float:
    """Of the mean forwards of the slow runs and of the fast ones to their own level; NaN where it is not above 0."""
    level = _level(cubes, weights)
    slow, fast = (np.mean([run.forwards for run in _spent(own, level, weights)]) for own in cubes)
    return float(np.log(slow / fast)) if level > 0 else float("nan")


def _half_width(cubes: Sequence[Sequence[Cube]]) -> float:
    """Of the logarithm of the ratio, the level's own uncertainty included: both methods' seeds by the jackknife, and
    prompts by the bootstrap, as independent parts with Satterthwaite's degrees of freedom. Infinite where a method has
    one seed, or rises in one alone."""
    if any(len(own) < 2 for own in cubes):
        return float("inf")
    prompts = cubes[0][0][1].shape[1]
    even = np.full(prompts, 1 / prompts)
    parts = []
    for place, own in enumerate(cubes):
        count = len(own)
        without = [_log_ratio([[*own[:k], *own[k + 1 :]] if at == place else other for at, other in enumerate(cubes)],
                              even) for k in range(count)]  # fmt: skip
        if not np.isfinite(without).all():  # one seed alone makes the level
            return float("inf")
        parts.append(((count - 1) * float(np.var(without)), count - 1))
    resamples = np.random.default_rng(0).multinomial(prompts, even, RESAMPLES) / prompts
    moved = [_log_ratio(cubes, weights) for weights in resamples] if prompts > 1 else [0.0]
    parts.append((float(np.nanvar(moved)), max(prompts - 1, 1)))
    variance, noise = sum(part for part, _ in parts), sum(part**2 / free for part, free in parts)
    return student(max(variance**2 / noise, 1.0)) * variance**0.5 if noise > 0 else 0.0


def differs(program: str, group: str, first: str, second: str, pick: Callable[[Any], float]) -> Any:
    """What `pick` gives for the first less for the second, in pairs of seeds."""

    def measure(results: Path) -> Measured | None:
        rows = ablation(results, program, group, first, second)
        seeds = sorted(set(rows[0]) & set(rows[1]))
        if not seeds:
            return None
        values = [[pick(own[seed]) for seed in seeds] for own in rows]
        center, low, high = over_seeds(np.subtract(*values).tolist())
        return Measured(center, low, high, False, {"bars": {first: values[0], second: values[1]}}, over="seeds")

    return measure


def changed(program: str, group: str, name: str, key: str, *, from_base: bool) -> Callable[[Path], Measured | None]:
    """A measurement of the rows of one name over seeds; `from_base`: its change."""

    def measure(results: Path) -> Measured | None:
        (rows,) = ablation(results, program, group, name)
        if not rows:
            return None
        ends, bases = ([float(row[of]) for row in rows.values()] for of in (key, f"{key}_base"))
        found = over_seeds(np.subtract(ends, bases).tolist() if from_base else ends)
        return Measured(*found, False, {"bars": {"base": bases, "after": ends}}, over="seeds")

    return measure


def last(key: str) -> Callable[[Any], float]:
    """A measurement at the end of a row of sqdf.py or distar.py."""
    return lambda row: float((row["points"] if isinstance(row, dict) else row)[-1][key])


def above(first: str, second: str, key: str = "diversity", at: str = "heldout") -> Callable[[Path], Measured | None]:
    """The share of the values of `at` that both reach where the first's best `key` is higher, seed by seed; of the
    seeds that both have, at looks that kept the concepts."""

    def measure(results: Path) -> Measured | None:
        runs = _of_both(runs_of(results, "style", first, second))
        runs = [[_even(run) for run in own] for own in runs]
        if not all(runs) or any(axis not in own[0]["points"][0] for own in runs for axis in (at, key)):
            return None
        looks = max(len(run["points"]) for own in runs for run in own)
        clouds = [np.array([[[p[at], p[key]] for p in _until(run["points"], looks)] for run in own], dtype=float)
                  for own in runs]  # (seeds, looks, 2, prompts)  # fmt: skip
        rng = np.random.default_rng(0)

        def share(resample: bool) -> float:
            prompts = clouds[0].shape[-1]
            weights = np.full(prompts, 1 / prompts)
            weights = rng.multinomial(prompts, weights) / prompts if resample else weights
            count = len(clouds[0])
            seeds = rng.integers(0, count, count) if resample else np.arange(count)
            found = [_share_of_seed(*(_weighted(cloud[seed], weights) for cloud in clouds)) for seed in seeds]
            return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")

        value = share(False)
        shares = [found for found in (share(True) for _ in range(RESAMPLES)) if np.isfinite(found)]
        low, high = np.quantile(shares, [0.025, 0.975]) if shares else (-np.inf, np.inf)
        even = np.full(clouds[0].shape[-1], 1 / clouds[0].shape[-1])
        series = {name: _weighted(cloud, even).reshape(-1, 2).tolist()
                  for name, cloud in zip((first, second), clouds, strict=True)}  # fmt: skip
        return Measured(value, float(low), float(high), False, {"points": series, "axis": key, "at": at})

    return measure


def _share_of_seed(*clouds: np.ndarray) -> float:
    """`frontier.share_above` of two runs' points (looks, 2), over the range that both reach."""
    pair = [(points[:, 0], points[:, 1]) for points in clouds]
    return share_above(*pair, max(x.min() for x, _ in pair), min(x.max() for x, _ in pair))


def _of_both(runs: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Those of the seeds that every method has."""
    shared = set.intersection(*({run["seed"] for run in own} for own in runs))
    return [sorted((run for run in own if run["seed"] in shared), key=lambda run: run["seed"]) for own in runs]


def _until(points: list[dict[str, Any]], looks: int) -> list[dict[str, Any]]:
    """The points of a run that ended early stay where it ended."""
    return [*points, *points[-1:] * (looks - len(points))]


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over the last axis, of what was measured: two pictures in different styles have no diversity of one."""
    known = np.isfinite(values)
    return (np.where(known, values, 0.0) @ weights) / np.maximum(known @ weights, 1e-12)


def _even(run: dict[str, Any]) -> dict[str, Any]:
    """The looks of the run that kept the concepts, without what one of them measured and another did not."""
    points = [run["points"][k] for k in keeping(run["points"], LOST)]
    shared = set.intersection(*(set(point) for point in points))
    return run | {"points": [{key: point[key] for key in shared} for point in points]}


def rises(task: str, *methods: str, tuned_on: Sequence[int] = ()) -> Callable[[Path], Measured | None]:
    """The goal's rise over the base at each run's best look, of the first of the methods that has rows. tuned_on: seeds
    that settings were chosen by, which are left out."""

    def measure(results: Path) -> Measured | None:
        method = _best(*methods)(results, task)
        runs = [run | {"task": task} for run in runs_of(results, task, method)[0] if run["seed"] not in tuned_on]
        if not runs:
            return None
        bars = {"base": [mean(run["points"][0], "heldout") for run in runs],
                method: np.nanmean(at_best(runs, "heldout", change=False), 1).tolist()}  # fmt: skip
        return Measured(*over_runs(at_best(runs, "heldout")), False, {"bars": bars})

    return measure


def at_style(method: str, key: str, lost: float = 0.03) -> Callable[[Path], Measured | None]:
    """A measurement, of the concepts its change, at the look with the highest share of the target style of those that
    lost at most so much of the concepts; each half of the prompts at the look that the other half picks."""

    def at_look(points: list[dict[str, Any]], key: str) -> np.ndarray:
        def best(half: slice) -> int:
            return max(keeping(points, lost, half), key=lambda k: float(np.mean(points[k]["style"][half])))

        return cross_fitted(points, key, best)

    def measure(results: Path) -> Measured | None:
        (runs,) = runs_of(results, "style", method)
        if not runs:
            return None
        ends, bases = ([at_look(run["points"], key) for run in runs],
                       [np.array(run["points"][0][key], dtype=float) for run in runs])  # fmt: skip
        bars = {"base": [float(base.mean()) for base in bases], method: [float(end.mean()) for end in ends]}
        values = np.stack(ends) - (np.stack(bases) if key == "concept" else 0.0)
        return Measured(*over_runs(values), False, {"bars": bars})

    return measure


def layout_gain(first: str, second: str) -> Callable[[Path], Measured | None]:
    """How much more of the prompts of position and counting the first gets right than the second, in pairs of prompts
    and seeds, each at its best look; counted on the mirrored pictures, where pleasing the detector does not help."""

    def measure(results: Path) -> Measured | None:
        runs = [{run["seed"]: run for run in own} for own in runs_of(results, "scenes", first, second)]
        seeds = sorted(runs[0].keys() & runs[1].keys())
        if not seeds:
            return None
        prompts = runs[0][seeds[0]]["prompts"]
        read = [parse_prompt(prompt) for prompt in prompts]
        chosen = [k for k, caption in enumerate(read) if caption.relation or caption.number]
        sides = [at_best([own[seed] for seed in seeds], "again")[:, chosen] for own in runs]
        bars = {name: side.mean(1).tolist() for name, side in zip((first, second), sides, strict=True)}
        return Measured(*over_runs(sides[0] - sides[1]), False, {"bars": bars})

    return measure


def cheaper(what: str) -> Callable[[Path], Measured | None]:
    """The teacher's time over the one-step generator's; a row that keeps no interval of it has none."""

    def measure(results: Path) -> Measured | None:
        path = results / f"{slug('distar', 'teacher', 'emoji-1step')}.json"
        if content(path) is None:
            return None
        times = made(path)["seconds"]
        value = times[f"ratio, {what}"]
        ends = (times.get(f"ratio, {what}, {end}", unknown) for end, unknown in (("low", -np.inf), ("high", np.inf)))
        bars = {f"{shown}, ms": [1000 * times[f"{side}, {what}"]]
                for side, shown in (("teacher", "teacher"), ("generator", "one step"))}  # fmt: skip
        return Measured(value, *ends, False, {"bars": bars}, over="timings")

    return measure


def blackbox(key: str, against: str, rival: str) -> Callable[[Path], Measured | None]:
    """What DI* with a black-box reward gives for `key`, less the base generator's `against`, which the figure calls
    `rival`; in pairs of prompts."""

    def measure(results: Path) -> Measured | None:
        rows = [row for _, row in made_in(results, f"{slug('distar', 'blackbox')}-[0-9]*.json")]
        if not rows:
            return None
        sides = [np.array([row[name] for row in rows], dtype=float) for name in (key, against)]
        bars = {name: np.nanmean(side, 1).tolist() for name, side in zip(("DI*", rival), sides, strict=True)}
        return Measured(*over_runs(sides[0] - sides[1]), False, {"bars": bars})

    return measure


def against_teacher(prompts: str, key: str) -> Callable[[Path], Measured | None]:
    """The shipped one-step generator against the many steps that it was distilled from, paired over prompts."""

    def measure(results: Path) -> Measured | None:
        path = results / f"{slug('distar', 'teacher', 'emoji-1step')}.json"
        if content(path) is None:
            return None
        found = made(path)[prompts][key]
        bars = {"one step": [found["value"]], "teacher": [found["base"]]}
        ends = (found["change_low"], found["change_high"])
        return Measured(found["change"], *ends, False, {"bars": bars}, over="prompts")

    return measure


def _best(*names: str) -> Callable[[Path, str], str]:
    """The first of the methods that has rows; else the first."""
    return lambda results, task: next((n for n in names if runs_of(results, task, n)[0]), names[0])


def ratio_of_best(slow: Sequence[str], fast: str) -> Callable[[Path], Measured | None]:
    """`ratio` with the first of the slow methods' versions that has rows."""
    return lambda results: ratio(_best(*slow)(results, "style"), fast)(results)


def cast(row: Any) -> float:
    """Minus the colour cast of a row of srpo.py."""
    return -float(row["drift"]["colour_cast"])


def detail(row: Any) -> float:
    """How much of the base's fine detail is kept in a row of srpo.py: 1 = as much, less for blur and for grain."""
    ratio = float(row["drift"]["high_frequency_ratio"])
    return min(ratio, 1 / ratio)


def heldout(row: Any) -> float:
    """How far the held-out reward prefers the wanted words more than before, of a row of srpo.py."""
    return float(row["relative emoji-heldout"])


def hacked(row: Any) -> float:
    """The share of the optimised preference's rise that the held-out reward does not see, of a row of srpo.py."""
    return 1 - float(row["relative emoji-heldout"]) / max(float(row["relative emoji"]), 1e-3)


ALONE = (
    'Each interval is of its claim alone, none is widened for their number. "One picture beats the best of eight" was '
    "open over three seeds and then got two more."
)
RELEASED = ("Flow-GRPO released", "Flow-GRPO")
COMPARE, ABLATE = "python benchmarks/comparison.py", "python benchmarks/srpo.py ablations"
SCENES, BLACKBOX = f"{COMPARE} --tasks scenes", "python benchmarks/distar.py blackbox"
TEACHER = "python benchmarks/distar.py teacher emoji-1step"
HELD = "held-out preference"
CLAIMS = [
    Claim("srpo-dance", "SRPO (2509.06942)", "SRPO needs 75 times less than DanceGRPO", "times the forwards", 75.0,
          COMPARE, ratio("DanceGRPO", "SRPO"), "curves",
          "learning rates of both searched alike; a level that both reach"),
    Claim("srpo-flow", "SRPO (2509.06942)", "SRPO needs less than Flow-GRPO", "times the forwards", 1.0,
          COMPARE, ratio_of_best(RELEASED, "SRPO"), "curves"),
    Claim("srpo-inversion", "SRPO (2509.06942)", "the inversion branch keeps fine detail", "of the base's detail", 0.0,
          ABLATE, differs("srpo", "ablations", "default", "no inversion branch",
                          detail), "bars",
          "both branches in equal weight, five seeds; detail measured against the base's pictures"),
    Claim("srpo-inversion-cast", "SRPO (2509.06942)", "the inversion branch avoids a colour cast", "less cast", 0.0,
          ABLATE, differs("srpo", "ablations", "default", "no inversion branch", cast), "bars"),
    Claim("srpo-inversion-heldout", "SRPO (2509.06942)",
          "at equal updates the inversion branch raises what was not optimised",
          HELD, 0.0, ABLATE, differs("srpo", "ablations", "default", "no inversion branch", heldout), "bars"),
    Claim("srpo-relative-cast", "SRPO (2509.06942)", "a relative reward casts colours less than an absolute one",
          "less cast", 0.0, ABLATE, differs("srpo", "ablations", "default", "absolute, both branches", cast), "bars",
          "equal shares of the style; colours against the base's own 3d: blue 1.05 with it, 1.03 without"),
    Claim("srpo-relative-detail", "SRPO (2509.06942)", "a relative reward keeps more fine detail than an absolute one",
          "of the base's detail", 0.0, ABLATE,
          differs("srpo", "ablations", "default", "absolute, both branches", detail), "bars"),
    Claim("srpo-relative", "SRPO (2509.06942)", "a relative reward is hacked less than an absolute one",
          "of the reward's rise not found", 0.0, ABLATE,
          differs("srpo", "ablations", "absolute, both branches", "default", hacked), "bars"),
    Claim("srpo-late", "SRPO (2509.06942)", "training late times alone is worse than early ones", HELD, 0.0,
          ABLATE, differs("srpo", "ablations", "early window", "late window", heldout), "bars",
          "early and late windows, five seeds"),
    Claim("srpo-late-hacks", "SRPO (2509.06942)",
          "late times leave more of the reward's rise unseen by the held-out one than early times",
          "of the reward's rise not found", 0.0, ABLATE,
          differs("srpo", "ablations", "late window", "early window", hacked), "bars"),
    Claim("sqdf-draft", "SQDF (2512.04559)", "at equal held-out reward SQDF is more diverse than DRaFT",
          "of the range", 0.75, COMPARE, above("SQDF", "DRaFT-LV"), "frontier"),
    Claim("sqdf-refl", "SQDF (2512.04559)", "at equal held-out reward SQDF is more diverse than ReFL",
          "of the range", 0.75, COMPARE, above("SQDF", "ReFL"), "frontier"),
    Claim("sqdf-draft-heldout", "SQDF (2512.04559)", "at equal diversity SQDF's held-out reward is above DRaFT's",
          "of the range", 0.75, COMPARE, above("SQDF", "DRaFT-LV", "heldout", "diversity"), "frontier"),
    Claim("sqdf-refl-heldout", "SQDF (2512.04559)", "at equal diversity SQDF's held-out reward is above ReFL's",
          "of the range", 0.75, COMPARE, above("SQDF", "ReFL", "heldout", "diversity"), "frontier"),
    Claim("sqdf-discount", "SQDF (2512.04559)", "a discount below 1 helps", HELD, 0.0,
          "python benchmarks/sqdf.py ablations", differs("sqdf", "ablations", "the recipe", "gamma 1", last("heldout")),
          "bars"),
    Claim("sqdf-consistency", "SQDF (2512.04559)", "a consistency model's estimate beats Tweedie's", HELD, 0.0,
          "python benchmarks/sqdf.py ablations",
          differs("sqdf", "ablations", "consistency", "tweedie, posterior mean", last("heldout")), "bars"),
    Claim("sqdf-buffer", "SQDF (2512.04559)", "the replay buffer keeps diversity", "diversity", 0.0,
          "python benchmarks/sqdf.py ablations",
          differs("sqdf", "ablations", "buffer prioritised", "buffer none", last("diversity")), "bars"),
    Claim("distar-kl", "Diff-Instruct* (2410.20898)", "DI* ends above DI++", "held-out reward", 0.0,
          "python benchmarks/distar.py family emoji-1step",
          differs("distar", "family", "DI*", "DI++ (kl)", last("heldout")), "bars"),
    Claim("distar-sim", "Diff-Instruct* (2410.20898)", "DI* ends above SIM, which has no reward", "held-out reward",
          0.0, "python benchmarks/distar.py family emoji-1step",
          differs("distar", "family", "DI*", "SIM (no reward)", last("heldout")), "bars"),
    Claim("distar-teacher", "Palate", "the shipped one step keeps its teacher's concepts within .02",
          "change of concepts", -0.02, TEACHER, against_teacher("plain", "concept"), "bars"),
    Claim("distar-reward", "Palate", "the shipped one step ends above its teacher", "held-out reward", 0.0,
          TEACHER, against_teacher("plain", "reward/emoji-heldout"), "bars"),
    Claim("distar-style", "Palate", "the shipped one step keeps its teacher's styles within .03",
          "change of styles", -0.03, TEACHER, against_teacher("styled", "style_named"), "bars",
          "two continuations of its training"),
    Claim("distar-cost", "Palate",
          "in batches of 16 the network of the shipped one step is 15 times cheaper than eight guided ones",
          "times the network's time", 15.0, TEACHER, cheaper("network, batch 16"), "bars"),
    Claim("distar-blackbox", "Diff-Instruct* (2410.20898)",
          "with a reward that can only be asked, one picture beats the best of eight", "kilobytes less", 0.0, BLACKBOX,
          blackbox("score", "best of 8", "best of 8"), "bars"),
    Claim("distar-blackbox-concept", "Diff-Instruct* (2410.20898)", "towards a black box the concepts stay within .03",
          "change of concepts", -0.03, BLACKBOX, blackbox("concept", "concept before", "before"), "bars"),
    Claim("nft-flow", "DiffusionNFT (2509.16117)", "DiffusionNFT needs 25 times less than Flow-GRPO",
          "times the forwards", 25.0, COMPARE, ratio_of_best(RELEASED, "DiffusionNFT"), "curves",
          "learning rates of both searched alike; a level that both reach"),
    Claim("leap-draft", "LeapAlign (2604.15311)", "LeapAlign gets more layouts right than DRaFT-1", "fraction right",
          0.0,          SCENES, layout_gain("LeapAlign", "DRaFT-1"), "bars"),
    Claim("leap-refl", "LeapAlign (2604.15311)", "LeapAlign gets more layouts right than ReFL", "fraction right", 0.0,
          SCENES, layout_gain("LeapAlign", "ReFL"), "bars"),
    Claim("srpo-style", "Palate", "SRPO shows the style in .80, at looks that other prompts chose", "of the pictures",
          0.8, COMPARE, at_style("SRPO", "style"), "bars",
          "learning rates of one search, k = 1 and 4, with and without a hinge"),
    Claim("srpo-style-concept", "Palate", "SRPO keeps the concepts within .03 at those looks", "change of concepts",
          -0.03, COMPARE, at_style("SRPO", "concept"), "bars",
          "the same; a look that kept them on half of the prompts need not on the others"),
    Claim("srpo-shipped", "Palate",
          "the recipe srpo-emoji without its guard shows the style in .80 after 8,000 forwards", "of the pictures",
          0.8, ABLATE, changed("srpo", "ablations", "default", "style", from_base=False), "bars"),
    Claim("srpo-shipped-concept", "Palate", "the recipe srpo-emoji without its guard keeps the concepts within .03",
          "change of concepts", -0.03, ABLATE, changed("srpo", "ablations", "default", "concept", from_base=True),
          "bars"),
    Claim("dpo-nft", "Palate", "online DPO needs no more forwards than DiffusionNFT", "times the forwards", 1.0,
          COMPARE, ratio("DiffusionNFT", "online DPO"), "curves",
          "four and eight pictures a pair, one to eight noise levels a pair, two to eight pairs an update, "
          "rates of 2e-3 to 4e-2"),
    Claim("flow-scenes", "Palate", "Flow-GRPO raises the embedded GenEval by .15", "fraction right", 0.15, SCENES,
          rises("scenes", *RELEASED), "bars", "12,000 forwards; without guidance, below"),
    Claim("nft-scenes", "Palate", "DiffusionNFT raises the embedded GenEval by .15", "fraction right", 0.15, SCENES,
          rises("scenes", "DiffusionNFT"), "bars", "12,000 forwards; without guidance, below"),
    Claim("nft-unguided", "DiffusionNFT (2509.16117)",
          "trained and drawn without guidance, DiffusionNFT raises the embedded GenEval by .15", "fraction right", 0.15,
          f"{COMPARE} --tasks unguided", rises("unguided", "DiffusionNFT", tuned_on=(0,)), "bars",
          "rates of 4e-3 and 1e-3, 16 and 64 pictures an update, on seed 0, which is left out"),
    Claim("flow-unguided", "Palate", "trained and drawn without guidance, Flow-GRPO raises it by .15", "fraction right",
          0.15, f"{COMPARE} --tasks unguided", rises("unguided", "Flow-GRPO released", tuned_on=(0,)), "bars",
          "rates of 1e-3 (.104), 2.5e-3 and 4e-3 (.094) on seed 0, which is left out"),
]  # fmt: skip


def missing(rows: Sequence[Judged]) -> list[str]:
    """The commands that make what is not measured, each once, with the claims that wait for it."""
    waiting: dict[str, list[str]] = {}
    for row in rows:
        if row.found is None:
            waiting.setdefault(row.claim.command, []).append(row.claim.key)
    return [f"{command}  # {', '.join(keys)}" for command, keys in waiting.items()]


def judge(results: Path) -> list[Judged]:
    """Every claim with what the rows say."""
    return [Judged(claim, claim.measure(results)) for claim in CLAIMS]


def told(found: Measured | None) -> str:
    """ "at least 2.2 (1.4 to 2.7)"; of one seed, which has no interval, "2.2 (no interval)"."""
    if found is None:
        return ""
    center, low, high = (f"{x:.3g}" if np.isfinite(x) else "?" for x in (found.value, found.low, found.high))
    interval = f"{low} to {high}" if np.isfinite([found.low, found.high]).any() else "no interval"
    how = {(True, False): "at least ", (False, True): "at most ", (True, True): "about "}
    return f"{how.get((found.bound, found.short), '')}{center} ({interval})"


def table(rows: Sequence[Judged]) -> str:
    """The documentation's table."""
    lines = ["| paper | claim | must exceed | found, 95 % | over | verdict |", "|---|---|---|---|---|---|"]
    for row in rows:
        claim, verdict = row.claim, f"**{row.verdict}**"
        if row.found is None:
            verdict += f": `{claim.command}`"
        elif row.verdict != "holds" and claim.tried:
            verdict += f"; tried: {claim.tried}"
        over = row.found.over if row.found else ""
        lines.append(
            f"| {claim.paper} | {claim.text} | {claim.bar:g} {claim.unit} | {told(row.found)} | {over} | {verdict} |"
        )
    counts = Counter(row.verdict for row in rows)
    words = {"holds": "hold", "fails": "fail", "open": "are open", "not measured": "are not measured"}
    said = ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict])
    return "\n".join([*lines, "", f"Of {len(rows)} claims: {said}. {ALONE}"]) + "\n"


def as_json(rows: Sequence[Judged]) -> dict[str, Any]:
    """By claim: verdict, value, interval, bar."""
    return {
        row.claim.key: {
            "verdict": row.verdict,
            "bar": row.claim.bar,
            **({key: value if np.isfinite(value) else None for key, value in
                {"value": row.found.value, "low": row.found.low, "high": row.found.high}.items()}
               | {"bound": row.found.bound, "short": row.found.short} if row.found else {}),
        }
        for row in rows
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = judge(args.results)
    (args.results / "claims.json").write_text(json.dumps(as_json(rows), indent=1) + "\n")
    write_table(args.results / "claims.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
