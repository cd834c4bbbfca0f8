"""What the papers claim, held against the rows that were measured: a value, its interval, a verdict.

    python benchmarks/claims.py                           # RESULTS/claims.{json,md}, from the rows that are there

Each claim is one number with a bar. Of an interval that lies above the bar the claim holds, below it fails, and
otherwise it is open: the runs cannot tell. A claim whose rows are missing is not measured, and names the command that
makes them. Ratios of forwards are taken at a level of the held-out goal that both methods reach; where the slower one
does not reach it on some seed, what it had spent stands in and the ratio is a lower bound.

Intervals: over prompts and seeds where rows keep their prompts (comparison.py), else over seeds by Student's t. What is
worse when it is larger (a colour cast) is counted negatively, so that more is always better. Rows of "Palate" are the
project's own aims.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from comparison import at_best, best_kept, mean, pigeonhole
from frontier import share_above
from methods import made, slug

from palate.models.vocabulary import parse_prompt

T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SHARE = 0.8  # of the rise that both methods reach: the level of a ratio
RESAMPLES = 500


class Measured(NamedTuple):
    """A value with its interval; `bound`: a lower bound. `series`: what a figure draws, by name; bars are two."""

    value: float
    low: float
    high: float
    bound: bool = False
    series: dict[str, Any] | None = None


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
        if self.found.low > self.claim.bar:
            return "holds"
        return "fails" if self.found.high < self.claim.bar and not self.found.bound else "open"


# --- rows -----------------------------------------------------------------------------------------------------------


def runs_of(results: Path, task: str, method: str) -> list[dict[str, Any]]:
    """The comparison's rows of a method, or those of time_to_preference.py, which keep no prompts: {"seed", "points":
    [{"forwards", key: per prompt}]}."""
    paths = sorted(results.glob(f"{slug('comparison', task, method)}-*.json"))
    found = [row for row in map(made, paths) if row["method"] == method]
    if not found and task == "style":
        for path in sorted(results.glob(f"{slug('time', method)}-*.json")):
            row = made(path)
            if row["method"] == method:
                points = [{k: v if k == "forwards" else [v] for k, v in check.items()} for check in row["checks"]]
                found.append({"seed": row["seed"], "points": points})
    return found


def ablation(results: Path, program: str, group: str, name: str) -> dict[int, Any]:
    """Seed -> row of an ablation of srpo.py, sqdf.py or distar.py."""
    found = {}
    for path in sorted(results.glob(f"{slug(program, group, name)}-[0-9]*.json")):
        found[int(path.stem.removeprefix(slug(program, group, name)).split("-")[1])] = made(path)
    return found


# --- measures -------------------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    center = float(np.mean(values))
    if len(values) < 2:
        return center, -np.inf, np.inf
    half = T975.get(len(values) - 1, 2.2) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return center, center - half, center + half


def reach(forwards: np.ndarray, rises: np.ndarray, level: float) -> tuple[float, bool]:
    """Forwards at which the rises (looks,) first reach the level, linear between two looks; the last look's, and False,
    where they never do."""
    for i in range(1, len(rises)):
        if rises[i] >= level:
            before = rises[i - 1]
            part = (level - before) / (rises[i] - before) if before < level else 0.0
            return float(forwards[i - 1] + part * (forwards[i] - forwards[i - 1])), True
    return float(forwards[-1]), False


def _cube(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Forwards (looks,) and the goal's rise (looks, prompts)."""
    goal = np.array([point["heldout"] for point in run["points"]], dtype=float)
    return np.array([point["forwards"] for point in run["points"]], dtype=float), goal - goal[0]


def ratio(slow: str, fast: str, task: str = "style") -> Callable[[Path], Measured | None]:
    """Forwards of the slow method over those of the fast one to SHARE of the rise that both reach."""

    def measure(results: Path) -> Measured | None:
        runs = [runs_of(results, task, method) for method in (slow, fast)]
        if not all(runs):
            return None
        cubes = [[_cube(run) for run in own] for own in runs]
        tops = [np.mean([rises.mean(1).max() for _, rises in own]) for own in cubes]
        level = SHARE * float(min(tops))
        if level <= 0:
            return None
        rng, ratios = np.random.default_rng(0), []
        value, reached = _ratio_at(cubes, level, None, rng)
        ratios = [_ratio_at(cubes, level, True, rng)[0] for _ in range(RESAMPLES)]
        low, high = np.quantile(ratios, [0.025, 0.975])
        series = {
            name: [[forwards.tolist(), rises.mean(1).tolist()] for forwards, rises in own]
            for name, own in zip((slow, fast), cubes, strict=True)
        }
        return Measured(value, float(low), float(high), not reached, {"level": level, "curves": series})

    return measure


def _ratio_at(
    cubes: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], level: float, resample: bool | None, rng: Any
) -> tuple[float, bool]:
    """The ratio of mean forwards, of all runs or of a resample of seeds and prompts; whether every slow run got
    there."""
    prompts = cubes[0][0][1].shape[1]
    weights = np.full(prompts, 1 / prompts)
    if resample:
        weights = rng.multinomial(prompts, weights) / prompts
    spent, there = [], []
    for own in cubes:
        chosen = rng.integers(0, len(own), len(own)) if resample else range(len(own))
        found = [reach(own[i][0], own[i][1] @ weights, level) for i in chosen]
        spent.append(np.mean([forwards for forwards, _ in found]))
        there.append(all(ok for _, ok in found))
    return float(spent[0] / max(spent[1], 1e-9)), there[0]


def differs(program: str, group: str, first: str, second: str, pick: Callable[[Any], float]) -> Any:
    """What `pick` gives for the first less for the second, in pairs of seeds."""

    def measure(results: Path) -> Measured | None:
        rows = [ablation(results, program, group, name) for name in (first, second)]
        seeds = sorted(set(rows[0]) & set(rows[1]))
        if not seeds:
            return None
        values = [[pick(own[seed]) for seed in seeds] for own in rows]
        center, low, high = over_seeds(np.subtract(*values).tolist())
        return Measured(center, low, high, False, {"bars": {first: values[0], second: values[1]}})

    return measure


def last(key: str) -> Callable[[Any], float]:
    """A measurement at the end of a row of sqdf.py or distar.py."""
    return lambda row: float((row["points"] if isinstance(row, dict) else row)[-1][key])


def above(first: str, second: str, key: str = "diversity", at: str = "heldout") -> Callable[[Path], Measured | None]:
    """The share of the values of `at` that either reaches where the first's best `key` is higher."""

    def measure(results: Path) -> Measured | None:
        runs = [[_even(run) for run in runs_of(results, "style", method)] for method in (first, second)]
        if not all(runs) or any(axis not in own[0]["points"][0] for own in runs for axis in (at, key)):
            return None
        looks = min(len(run["points"]) for own in runs for run in own)
        clouds = [np.array([[np.nan_to_num(np.array([p[at], p[key]], dtype=float)) for p in run["points"][:looks]]
                            for run in own]) for own in runs]  # (seeds, looks, 2, prompts)  # fmt: skip
        rng = np.random.default_rng(0)

        def share(resample: bool) -> float:
            prompts = clouds[0].shape[-1]
            weights = np.full(prompts, 1 / prompts)
            weights = rng.multinomial(prompts, weights) / prompts if resample else weights
            pair = []
            for cloud in clouds:
                seeds = rng.integers(0, len(cloud), len(cloud)) if resample else np.arange(len(cloud))
                points = (cloud[seeds] @ weights).reshape(-1, 2)
                pair.append((points[:, 0], points[:, 1]))
            spread = np.concatenate([x for x, _ in pair])
            return share_above(pair[0], pair[1], float(spread.min()), float(spread.max()))

        shares = [share(True) for _ in range(RESAMPLES)]
        low, high = np.nanquantile(shares, [0.025, 0.975])
        series = {name: [[float(p[0].mean()), float(p[1].mean())] for run in cloud for p in run]
                  for name, cloud in zip((first, second), clouds, strict=True)}  # fmt: skip
        return Measured(share(False), float(low), float(high), False, {"points": series, "axis": key, "at": at})

    return measure


def _even(run: dict[str, Any]) -> dict[str, Any]:
    """The run without what one look measured and another did not."""
    shared = set.intersection(*(set(point) for point in run["points"]))
    return run | {"points": [{key: point[key] for key in shared} for point in run["points"]]}


def rises(task: str, *methods: str) -> Callable[[Path], Measured | None]:
    """The goal's rise over the base at each run's best look, of the first of the methods that has rows."""

    def measure(results: Path) -> Measured | None:
        method = _best(*methods)(results, task)
        runs = [run | {"task": task} for run in runs_of(results, task, method)]
        if not runs:
            return None
        bars = {"base": [mean(run["points"][0], "heldout") for run in runs],
                method: [mean(run["points"][best_kept(run["points"], task)], "heldout") for run in runs]}  # fmt: skip
        return Measured(*pigeonhole(at_best(runs, "heldout")), False, {"bars": bars})

    return measure


def kept_style(method: str, lost: float = 0.03) -> Callable[[Path], Measured | None]:
    """The highest share of the target style at any look that lost at most so much of the concepts."""

    def measure(results: Path) -> Measured | None:
        chosen, runs = [], runs_of(results, "style", method)
        for run in runs:
            floor = mean(run["points"][0], "concept") - lost
            kept = [point for point in run["points"] if mean(point, "concept") >= floor]
            chosen.append(max(kept, key=lambda point: mean(point, "style")))
        if not chosen:
            return None
        found = pigeonhole(np.array([point["style"] for point in chosen], dtype=float))
        bars = {"base": [mean(run["points"][0], "style") for run in runs],
                method: [mean(point, "style") for point in chosen]}  # fmt: skip
        return Measured(*found, False, {"bars": bars})

    return measure


def layout_gain(first: str, second: str) -> Callable[[Path], Measured | None]:
    """How much more of the prompts of position and counting the first gets right than the second, in pairs of prompts
    and seeds, each at its best look; counted on the mirrored pictures, where pleasing the detector does not help."""

    def measure(results: Path) -> Measured | None:
        runs = [{run["seed"]: run for run in runs_of(results, "scenes", method)} for method in (first, second)]
        seeds = sorted(runs[0].keys() & runs[1].keys())
        if not seeds:
            return None
        prompts = runs[0][seeds[0]]["prompts"]
        read = [parse_prompt(prompt) for prompt in prompts]
        chosen = [k for k, caption in enumerate(read) if caption.relation or caption.number]
        sides = [at_best([own[seed] for seed in seeds], "again")[:, chosen] for own in runs]
        bars = {name: side.mean(1).tolist() for name, side in zip((first, second), sides, strict=True)}
        return Measured(*pigeonhole(sides[0] - sides[1]), False, {"bars": bars})

    return measure


def cheaper(what: str) -> Callable[[Path], Measured | None]:
    """The teacher's time over the one-step generator's, median and middle half of the timings."""

    def measure(results: Path) -> Measured | None:
        path = results / f"{slug('distar', 'teacher', 'emoji-1step')}.json"
        if not path.exists():
            return None
        times = made(path)["seconds"]
        value = times[f"ratio, {what}"]
        low, high = (times.get(f"ratio, {what}, {end}", value) for end in ("low", "high"))
        bars = {side: [1000 * times[f"{side}, {what}"]] for side in ("teacher", "generator")}
        return Measured(value, low, high, False, {"bars": bars})

    return measure


def blackbox(key: str, against: str) -> Callable[[Path], Measured | None]:
    """What DI* with a black-box reward gives for `key`, less the base generator's `against`; in pairs of prompts."""

    def measure(results: Path) -> Measured | None:
        rows = [made(path) for path in sorted(results.glob(f"{slug('distar', 'blackbox')}-[0-9]*.json"))]
        if not rows:
            return None
        sides = [np.array([row[name] for row in rows], dtype=float) for name in (key, against)]
        bars = {name: np.nanmean(side, 1).tolist() for name, side in zip((key, against), sides, strict=True)}
        return Measured(*pigeonhole(sides[0] - sides[1]), False, {"bars": bars})

    return measure


def against_teacher(prompts: str, key: str) -> Callable[[Path], Measured | None]:
    """The shipped one-step generator against the many steps that it was distilled from, paired over prompts."""

    def measure(results: Path) -> Measured | None:
        path = results / f"{slug('distar', 'teacher', 'emoji-1step')}.json"
        if not path.exists():
            return None
        found = made(path)[prompts][key]
        bars = {"one step": [found["value"]], "teacher": [found["base"]]}
        return Measured(found["change"], found["change_low"], found["change_high"], False, {"bars": bars})

    return measure


def _best(*names: str) -> Callable[[Path, str], str]:
    """The first of the methods that has rows; else the first."""
    return lambda results, task: next((n for n in names if runs_of(results, task, n)), names[0])


def ratio_of_best(slow: Sequence[str], fast: str) -> Callable[[Path], Measured | None]:
    """`ratio` with the first of the slow methods' versions that has rows."""
    return lambda results: ratio(_best(*slow)(results, "style"), fast)(results)


def cast(row: Any) -> float:
    """Minus the colour cast of a row of srpo.py."""
    return -float(row["drift"]["colour_cast"])


def detail(row: Any) -> float:
    """Fine detail of a row of srpo.py, as a share of the base's."""
    return float(row["drift"]["high_frequency_ratio"])


def heldout(row: Any) -> float:
    """How far the held-out reward prefers the wanted words more than before, of a row of srpo.py."""
    return float(row["relative emoji-heldout"])


def hacked(row: Any) -> float:
    """The share of the optimised preference's rise that the held-out reward does not see, of a row of srpo.py."""
    return 1 - float(row["relative emoji-heldout"]) / max(float(row["relative emoji"]), 1e-3)


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
          "both branches in equal weight, three seeds; detail measured against the base's pictures"),
    Claim("srpo-inversion-cast", "SRPO (2509.06942)", "the inversion branch avoids a colour cast", "less cast", 0.0,
          ABLATE, differs("srpo", "ablations", "default", "no inversion branch", cast), "bars"),
    Claim("srpo-inversion-heldout", "SRPO (2509.06942)", "the inversion branch raises what was not optimised", HELD,
          0.0, ABLATE, differs("srpo", "ablations", "default", "no inversion branch", heldout), "bars"),
    Claim("srpo-relative-cast", "SRPO (2509.06942)", "a relative reward casts colours less than an absolute one",
          "less cast", 0.0, ABLATE, differs("srpo", "ablations", "default", "absolute, both branches", cast), "bars"),
    Claim("srpo-relative-detail", "SRPO (2509.06942)", "a relative reward keeps more fine detail than an absolute one",
          "of the base's detail", 0.0, ABLATE,
          differs("srpo", "ablations", "default", "absolute, both branches", detail), "bars"),
    Claim("srpo-relative", "SRPO (2509.06942)", "a relative reward is hacked less than an absolute one", HELD, 0.0,
          ABLATE, differs("srpo", "ablations", "default", "absolute, both branches", heldout), "bars"),
    Claim("srpo-late", "SRPO (2509.06942)", "training late times alone is worse than early ones", HELD, 0.0,
          ABLATE, differs("srpo", "ablations", "early window", "late window", heldout), "bars",
          "early, late and full windows, three seeds"),
    Claim("srpo-late-hacks", "SRPO (2509.06942)", "late times raise the reward more than what was not optimised",
          "of the reward's rise not found", 0.0, ABLATE,
          differs("srpo", "ablations", "late window", "early window", hacked), "bars"),
    Claim("sqdf-draft", "SQDF (2512.04559)", "at equal reward SQDF is more diverse than DRaFT", "of the range", 0.75,
          COMPARE, above("SQDF", "DRaFT-LV"), "frontier"),
    Claim("sqdf-refl", "SQDF (2512.04559)", "at equal reward SQDF is more diverse than ReFL", "of the range", 0.75,
          COMPARE, above("SQDF", "ReFL"), "frontier"),
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
    Claim("distar-teacher", "Diff-Instruct* (2410.20898)", "one step keeps the teacher's concepts within .02",
          "change of concepts", -0.02, TEACHER, against_teacher("plain", "concept"), "bars"),
    Claim("distar-reward", "Diff-Instruct* (2410.20898)", "one step ends above its teacher", "held-out reward", 0.0,
          TEACHER, against_teacher("plain", "reward/emoji-heldout"), "bars"),
    Claim("distar-style", "Diff-Instruct* (2410.20898)", "one step keeps the teacher's styles within .03",
          "change of styles", -0.03, TEACHER, against_teacher("styled", "style_named"), "bars",
          "two continuations of its training"),
    Claim("distar-cost", "Diff-Instruct* (2410.20898)", "one step is 15 times cheaper than eight guided ones",
          "times the network's time", 15.0, TEACHER, cheaper("network, batch 16"), "bars"),
    Claim("distar-blackbox", "Diff-Instruct* (2410.20898)",
          "with a reward that can only be asked, one picture beats the best of eight", "kilobytes less", 0.0, BLACKBOX,
          blackbox("score", "best of 8"), "bars"),
    Claim("distar-blackbox-concept", "Diff-Instruct* (2410.20898)", "towards a black box the concepts stay within .03",
          "change of concepts", -0.03, BLACKBOX, blackbox("concept", "concept before"), "bars"),
    Claim("nft-flow", "DiffusionNFT (2509.16117)", "DiffusionNFT needs 25 times less than Flow-GRPO",
          "times the forwards", 25.0, COMPARE, ratio_of_best(RELEASED, "DiffusionNFT"), "curves",
          "learning rates of both searched alike; a level that both reach"),
    Claim("leap-draft", "LeapAlign (2604.15311)", "LeapAlign changes layout more than DRaFT-1", "fraction right", 0.0,
          SCENES, layout_gain("LeapAlign", "DRaFT-1"), "bars"),
    Claim("leap-refl", "LeapAlign (2604.15311)", "LeapAlign changes layout more than ReFL", "fraction right", 0.0,
          SCENES, layout_gain("LeapAlign", "ReFL"), "bars"),
    Claim("srpo-style", "Palate", "SRPO shows the style in .80 with the concepts within .03", "of the pictures", 0.8,
          COMPARE, kept_style("SRPO"), "bars", "learning rates of one search, k = 1 and 4, with and without a hinge"),
    Claim("dpo-nft", "Palate", "online DPO needs no more forwards than DiffusionNFT", "times the forwards", 1.0,
          COMPARE, ratio("DiffusionNFT", "online DPO"), "curves"),
    Claim("flow-scenes", "Palate", "Flow-GRPO raises the embedded GenEval by .15", "fraction right", 0.15, SCENES,
          rises("scenes", *RELEASED), "bars"),
    Claim("nft-scenes", "Palate", "DiffusionNFT raises the embedded GenEval by .15", "fraction right", 0.15, SCENES,
          rises("scenes", "DiffusionNFT"), "bars"),
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
    """ "at least 2.2 (1.4 to 2.7)"."""
    if found is None:
        return ""
    values = (f"{x:.3g}" if np.isfinite(x) else "?" for x in (found.value, found.low, found.high))
    center, low, high = values
    return f"{'at least ' if found.bound else ''}{center} ({low} to {high})"


def table(rows: Sequence[Judged]) -> str:
    """The documentation's table."""
    lines = ["| paper | claim | must exceed | found, 95 % | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        claim, verdict = row.claim, f"**{row.verdict}**"
        if row.found is None:
            verdict += f": `{claim.command}`"
        elif row.verdict != "holds" and claim.tried:
            verdict += f"; tried: {claim.tried}"
        lines.append(f"| {claim.paper} | {claim.text} | {claim.bar:g} {claim.unit} | {told(row.found)} | {verdict} |")
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in
              ("holds", "fails", "open", "not measured")}  # fmt: skip
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return "\n".join([*lines, "", f"Of {len(rows)} claims: {said}."]) + "\n"


def as_json(rows: Sequence[Judged]) -> dict[str, Any]:
    """By claim: verdict, value, interval, bar."""
    return {
        row.claim.key: {
            "verdict": row.verdict,
            "bar": row.claim.bar,
            **({"value": row.found.value, "low": row.found.low, "high": row.found.high, "bound": row.found.bound}
               if row.found else {}),
        }
        for row in rows
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = judge(args.results)
    (args.results / "claims.json").write_text(json.dumps(as_json(rows), indent=1) + "\n")
    (args.results / "claims.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
