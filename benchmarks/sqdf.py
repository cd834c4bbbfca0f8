"""SQDF on the embedded model: reward against diversity over alpha_kl, ablations, black-box optimisation.

    python benchmarks/sqdf.py sweep     --seeds 0 1 2  # alpha_kl, beside DRaFT-1 and ReFL at three learning rates
    python benchmarks/sqdf.py ablations --seeds 0 1 2  # gamma, estimator (--consistency FOLDER adds one), buffer
    python benchmarks/sqdf.py blackbox  --seeds 0 1 2  # 1,000 questions: SQDF, random search, weighted samples
    python benchmarks/sqdf.py table                    # print what has been measured, and draw it
    ... --jobs 2                                       # rows at once, a process of one thread each
    ... --budget 3000, --updates 20                    # shorter rows: forwards of a run; updates a round of blackbox
    ... --quick                                        # the mechanics, in minutes; its numbers mean nothing

Sweep and ablations train on the objective of methods.py with the same budget of denoiser forwards each, and judge the
same prompts and noise as the base. `table` compares what SQDF, DRaFT-1 and ReFL keep at equal held-out reward, as far
as all of them reach: at four levels (linear between measured points), and as the area under each method's frontier,
seed by seed and with three runs of each method, where a frontier at g is the best diversity, or concept accuracy, of
any point with held-out reward of at least g. A result that is already in --results is not measured again.

blackbox: the hidden judge answers with noise of .1, the other two exactly. colour-position is asked about prompts that
name a side, which the base model misses; backgrounds alone it draws as told. What is judged has not been asked about.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import lru_cache
from importlib.resources import files
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import torch
from frontier import area, share_above
from methods import about, fingerprints, parsed, rate, referees, scatter, settings, slug, small, watch, whole
from rows import Row, content, made, made_in, measured, write_table

from palate import recipe
from palate.evaluate import concept_accuracy, embedded_panel, generate, pairs, quantise
from palate.models.vocabulary import vocabulary, with_article
from palate.optimize import from_recipe, load_oracle

ALPHAS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3)
FIELD = (0.0, 3e-4, 3e-3)  # those that the frontier takes: as many runs as a rival has, chosen beforehand
DEFAULT = "the recipe"
ORACLES = ("jpeg-size", "hidden-judge", "colour-position")
NAMES = ("reward", "heldout", "style", "concept", "diversity", "drift", "saturation")
DRAFT_1 = ["algorithm.K=1", "algorithm.n=0"]
RATES = (0.5, 1.0, 2.0)  # times the learning rate of DRaFT-1 and ReFL


def runs(group: str, args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """Row -> method of methods.py, overrides. A row of the ablations changes one thing of the recipe."""
    ours = f"trainer.lr={rate('SQDF', args.results)}"
    if group == "sweep":
        rows = {_sweep(alpha): ("SQDF", [f"algorithm.alpha_kl={alpha}", ours]) for alpha in ALPHAS}
        for name, method, more in (("DRaFT-1", "DRaFT-LV", DRAFT_1), ("ReFL", "ReFL", [])):
            lr = rate(method, args.results)
            rows |= {f"{name} lr x {f:g}": (method, [*more, f"trainer.lr={lr * f}"]) for f in RATES}
    else:
        rows = {DEFAULT: []} | {f"gamma {gamma:g}": [f"algorithm.gamma={gamma}"] for gamma in (0.8, 1.0)}
        rows["tweedie, posterior mean"] = ["algorithm.estimator_guidance=1"]
        rows["rollout-2"] = ["algorithm.estimator=rollout-2"]
        if args.consistency or (files("palate") / "assets/emoji-consistency").is_dir():
            folder = f"model.consistency={args.consistency or 'null'}"
            rows["consistency"] = ["algorithm.estimator=consistency", "algorithm.estimator_guidance=1", folder]
        rows["buffer none"] = ["algorithm.buffer=none", "algorithm.rollout_every=1"]
        rows |= {f"buffer {law}": [f"algorithm.buffer={law}"] for law in ("prioritised", "importance")}
        rows = {name: ("SQDF", [*overrides, ours]) for name, overrides in rows.items()}
    return dict(list(rows.items())[:: max(1, len(rows) // 2)]) if args.quick else rows


def _sweep(alpha: float) -> str:
    return f"SQDF alpha_kl {alpha:g}"


def train_and_judge(method: str, seed: int, prompts: int, budget: int, checks: int, overrides: list[str]) -> list[dict]:
    found = watch(method, seed, referees(prompts, (0, 1)), budget=budget, checks=checks, overrides=overrides)
    return [
        {"updates": c.updates, "forwards": c.forwards, "seconds": c.seconds} | {key: c.mean(key) for key in NAMES}
        for c in found
    ]


def trained_rows(group: str, args: argparse.Namespace) -> list[Row]:
    return [
        Row(
            args.results / f"{slug('sqdf', group, name, seed, args.budget)}.json",
            train_and_judge,
            (
                method,
                seed,
                args.prompts,
                args.budget,
                args.checks,
                [*overrides, *args.override, *(small(method) if args.quick else [])],
            ),
            beside=("emoji-consistency",) if name == "consistency" and not args.consistency else (),
            recipe=settings(method),
        )
        for seed in args.seeds
        for name, (method, overrides) in runs(group, args).items()
        if not args.only or name in args.only
    ]


def at_reward(points: list[dict], reward: float, key: str) -> float:
    """The value of `key` where a run first reaches the held-out reward, linear between checks; NaN if it never does."""
    for before, after in pairwise(points):
        if after["heldout"] >= reward > before["heldout"]:
            share = (reward - before["heldout"]) / (after["heldout"] - before["heldout"])
            return before[key] + share * (after[key] - before[key])
    return float("nan")


def tables(args: argparse.Namespace) -> str:
    """Mean over seeds and, behind it, the standard deviation; the frontier as an SVG beside the results."""
    parts, clouds = [], {}  # method -> seed -> its runs, each a list of points
    for group in ("sweep", "ablations"):
        lines = [
            f"| {group} | seeds | updates | optimised | held-out | style | concept | diversity | drift | saturation |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in runs(group, args):
            paths = {seed: args.results / f"{slug('sqdf', group, name, seed, args.budget)}.json" for seed in args.seeds}
            found = {seed: made(file) for seed, file in paths.items() if content(file) is not None}
            if not found:
                continue
            compared = group == "sweep" and (not name.startswith("SQDF") or name in map(_sweep, FIELD))
            for seed, points in found.items() if compared else ():
                clouds.setdefault(name.split(" ")[0], {}).setdefault(seed, []).append(points)
            ends = [points[-1] for points in found.values()]
            cells = [about([end[key] for end in ends]) for key in NAMES]
            lines.append(f"| {name} | {len(found)} | {ends[0]['updates']} | " + " | ".join(cells) + " |")
        if len(lines) > 2:
            parts.append("\n".join(lines))
    if len(clouds) > 1:
        parts += [levels(clouds), frontier_table(clouds)]
        series = {
            name: [(p["heldout"], p["diversity"]) for points in every(found) for p in points]
            for name, found in clouds.items()
        }
        path = args.results / "sqdf-frontier.svg"
        path.write_text(
            scatter(
                "SQDF over alpha_kl, DRaFT-1 and ReFL over learning rates",
                "held-out objective",
                "diversity inside prompt and style",
                series,
                {},
            )
        )
    lines = [
        "| oracle | seeds | base, one draw | random search, best of the draws | reward-weighted, the same draws "
        "| SQDF, one draw | concept before, after |",
        "|---|---|---|---|---|---|---|",
    ]
    for oracle in ORACLES:
        name = f"{slug('sqdf', 'blackbox', oracle)}-*-{args.queries}-{args.updates}.json"
        if found := [row for _, row in made_in(args.results, name)]:
            cells = [about([row[key] for row in found]) for key in ("base", "search", "weighted", "sqdf")]
            concept = ", ".join(f"{np.mean([f[k] for f in found]):.3f}" for k in ("concept_base", "concept"))
            concept += " (by the oracle itself)" if oracle == "hidden-judge" else ""
            lines.append(f"| {oracle} | {len(found)} | " + " | ".join(cells) + f" | {concept} |")
    return "\n\n".join([*parts, "\n".join(lines)] if len(lines) > 2 else parts)


def every(found: dict[int, list]) -> list[list[dict]]:
    return [points for own in found.values() for points in own]


def levels(clouds: dict[str, dict[int, list]]) -> str:
    """Diversity and concept accuracy where a method first reaches a held-out reward: of each seed the run that keeps
    most diversity there, mean over the seeds that reach it."""
    base = every(next(iter(clouds.values())))[0][0]
    reached = min(max(p["heldout"] for points in every(found) for p in points) for found in clouds.values())
    lines = [
        "| at held-out reward | " + " | ".join(f"{n}: diversity, concept" for n in clouds) + " |",
        "|---" * (len(clouds) + 1) + "|",
        f"| {base['heldout']:.3f} (base) | "
        + " | ".join(f"{base['diversity']:.3f}, {base['concept']:.3f}" for _ in clouds)
        + " |",
    ]
    for share in (0.25, 0.5, 0.75, 1.0):
        level, cells = base["heldout"] + share * (reached - base["heldout"]), []
        for found in clouds.values():
            kept = [
                max(there)
                for own in found.values()
                if (
                    there := [
                        tuple(at_reward(points, level, key) for key in ("diversity", "concept"))
                        for points in own
                        if any(point["heldout"] >= level for point in points)
                    ]
                )
            ]
            cells.append(
                "{:.3f}, {:.3f} ({} of {} seeds)".format(*np.mean(kept, axis=0), len(kept), len(found))
                if kept
                else "never"
            )
        lines.append(f"| {level:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def frontier_table(clouds: dict[str, dict[int, list]]) -> str:
    """Areas under the frontiers over the held-out rewards that every method reaches, as shares of the box of all values
    seen, mean and standard deviation over seeds; and over which share of them SQDF's frontier is higher (equal: half).
    """
    lines = [
        "| method | seeds | highest held-out | area, diversity | area, concept | SQDF above: diversity, concept |",
        "|---|---|---|---|---|---|",
    ]
    columns = {
        name: {
            seed: {
                key: np.array([p[key] for points in own for p in points]) for key in ("heldout", "diversity", "concept")
            }
            for seed, own in found.items()
        }
        for name, found in clouds.items()
    }
    flat = [own for found in columns.values() for own in found.values()]
    spans = {
        key: (min(c[key].min() for c in flat), max(c[key].max() for c in flat)) for key in ("diversity", "concept")
    }
    for name, found in columns.items():
        rows: dict[str, list[float]] = {}
        for seed, own in found.items():
            rivals = [other[seed] for other in columns.values() if seed in other]
            low, high = own["heldout"][0], min(rival["heldout"].max() for rival in rivals)
            rows.setdefault("highest", []).append(float(own["heldout"].max()))
            for key, span in spans.items():
                rows.setdefault(key, []).append(float(area(own["heldout"], own[key], low, high, *span)))
                ours = columns.get("SQDF", {}).get(seed)
                if ours is not None and name != "SQDF":
                    rows.setdefault(f"above {key}", []).append(
                        share_above((ours["heldout"], ours[key]), (own["heldout"], own[key]), low, high)
                    )
        cells = [about(rows[key]) for key in ("highest", "diversity", "concept")]
        above = [f"{np.nanmean(rows[k]):.0%}" for k in ("above diversity", "above concept") if k in rows]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + f" | {', '.join(above)} |")
    return "\n".join(lines)


@lru_cache(maxsize=1)
@torch.no_grad()
def search_images(seed: int, prompts: tuple[str, ...], each: int):
    """What random search draws: `each` images of the base model a prompt, the same for every oracle."""
    model = recipe.build_model(recipe.read("optimize-emoji"))
    seeds = list(range(1000 * (seed + 1), 1000 * (seed + 1) + each))
    return quantise(generate(model, prompts, seeds, weights="reference")), pairs(prompts, seeds)[0]


@torch.no_grad()
def black_box(oracle: str, seed: int, prompts: int, queries: int, overrides: list[str]) -> dict[str, float]:
    """Noiseless score on evaluation prompts of: one draw of the base; of as many draws a prompt as the same number of
    questions allows, the best by the noisy oracle; the same draws weighted by exp(score / std); one draw of SQDF."""
    panel, words_of = embedded_panel(), recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), prompts)
    asked_about = []
    if oracle == "colour-position":
        judged, rest = (
            [
                f"{with_article(concept)} at the {side} on {with_article(colour)} background"
                for concept, side, colour in zip(concepts, cycle(vocabulary().positions), cycle(vocabulary().colours))
            ]
            for concepts in (vocabulary().concepts[::2], vocabulary().concepts[1::2])
        )
        words_of = judged[:prompts]
        asked_about = ["prompts.file=null", f"prompts.list={json.dumps(rest)}"]
    with tempfile.TemporaryDirectory() as folder:
        plan = recipe.read(
            "optimize-emoji",
            [
                f"run.folder={folder}/run",
                f"trainer.seed={seed}",
                f"optimize.oracle.name={oracle}",
                f"optimize.budget={queries}",
                f"optimize.oracle.noise={0.1 if oracle == 'hidden-judge' else 0.0}",
                *asked_about,
                *overrides,
            ],
        )
        with torch.enable_grad():
            whole(from_recipe(plan))
        model = recipe.build_model(plan)
        model.load_adapter(Path(folder) / "run/adapter")
    asked = load_oracle(plan.optimize.oracle, seed=seed)
    exact = load_oracle(recipe.OracleSettings(name=oracle))

    def scores(ask, images, words) -> np.ndarray:
        parts = [ask(images[k : k + 64], words[k : k + 64]) for k in range(0, len(images), 64)]
        return np.array([float(score) for part in parts for score in part])

    def concept(images, words) -> float:
        return concept_accuracy(panel.classifier, images, [panel.parse(word) for word in words])

    each = max(1, queries // len(words_of))
    drawn, words = search_images(seed, tuple(words_of), each)
    seen, true = (scores(ask, drawn, words).reshape(len(words_of), each) for ask in (asked, exact))
    weight = np.exp((seen - seen.max(1, keepdims=True)) / max(float(seen.std()), 1e-9))
    words, _ = pairs(words_of, (0, 1))
    before, after = (quantise(generate(model, words_of, (0, 1), weights=w)) for w in ("reference", "policy"))
    return {
        "base": float(scores(exact, before, words).mean()),
        "sqdf": float(scores(exact, after, words).mean()),
        "search": float(true[np.arange(len(true)), seen.argmax(1)].mean()),
        "weighted": float(((weight * true).sum(1) / weight.sum(1)).mean()),
        "concept_base": concept(before, words),
        "concept": concept(after, words),
    }


def black_box_rows(args: argparse.Namespace) -> list[Row]:
    overrides = [f"trainer.steps={args.updates}", *args.override]
    name = ("sqdf", "blackbox")
    return [
        Row(
            args.results / f"{slug(*name, oracle, seed, args.queries, args.updates)}.json",
            black_box,
            (oracle, seed, args.prompts, args.queries, overrides),
            recipe=fingerprints("optimize-emoji"),
        )
        for seed in args.seeds
        for oracle in args.oracles
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["sweep", "ablations", "blackbox", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=4000, help="denoiser forwards of a run")
    parser.add_argument("--checks", type=int, default=2)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=60, help="of each of the four rounds of blackbox")
    parser.add_argument("--prompts", type=int, default=48, help="of emoji-eval, two images each")
    parser.add_argument("--oracles", nargs="+", default=list(ORACLES), choices=ORACLES)
    parser.add_argument("--consistency", type=Path, help="folder of a consistency model, else the one in the package")
    parser.add_argument("--only", nargs="+", help="rows by name")
    parser.add_argument("--override", nargs="*", default=[], help="for every row, while tuning")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.budget, args.checks, args.prompts, args.queries = [0], 60, 1, 4, 12
        if args.what == "blackbox":
            args.oracles, args.updates = args.oracles[:1], 1
            args.override += [
                "trainer.batch_size=2",
                "algorithm.buffer_size=8",
                "optimize.rounds=2",
                "algorithm.rollout_steps=3",
            ]
    if args.what in ("sweep", "ablations"):
        measured(
            trained_rows(args.what, args),
            args.jobs,
            lambda found: {key: round(found[-1][key], 3) for key in NAMES},
            minutes=args.minutes,
        )
    if args.what == "blackbox":
        measured(black_box_rows(args), args.jobs, minutes=args.minutes)
    text = tables(args)
    args.results.mkdir(parents=True, exist_ok=True)
    if text:
        write_table(args.results / "sqdf.md", text)
    print(text)


if __name__ == "__main__":
    main()
