"""SQDF on the embedded model: reward against diversity over alpha_kl, ablations, black-box optimisation.

    python benchmarks/sqdf.py sweep     --seeds 0 1 2  # alpha_kl, beside DRaFT-1 and ReFL at three learning rates
    python benchmarks/sqdf.py ablations --seeds 0 1 2  # gamma, estimator (--consistency FOLDER adds one), buffer
    python benchmarks/sqdf.py blackbox  --seeds 0 1 2  # 2,000 questions: SQDF, random search, weighted samples
    python benchmarks/sqdf.py table                    # print what has been measured
    ... --quick                                        # the mechanics, in minutes; its numbers mean nothing

Sweep and ablations train on the objective of methods.py with the same budget of denoiser forwards each, and judge the
same prompts and noise as the base. `table` also reads how much diversity and concept accuracy SQDF, DRaFT-1 and ReFL
keep at equal held-out reward, as far as all of them reach (linear between measured points). A result that is already in
--results is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from methods import RATES, Referees, rate, referees, scatter, slug, stored, watch

from palate import recipe
from palate.evaluate import generate, matches, pairs, quantise
from palate.optimize import from_recipe, load_oracle

ALPHAS = (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ORACLES = ("jpeg-size", "hidden-judge", "colour-position")
NAMES = ("reward", "heldout", "style", "concept", "diversity", "drift", "saturation")
DRAFT_1 = ["algorithm.K=1", "algorithm.n=0"]


def runs(group: str, args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """Row -> method of methods.py, overrides."""
    if group == "sweep":
        rows = {f"SQDF alpha_kl {alpha:g}": ("SQDF", [f"algorithm.alpha_kl={alpha}"]) for alpha in ALPHAS}
        for name, method, more in (("DRaFT-1", "DRaFT-LV", DRAFT_1), ("ReFL", "ReFL", [])):
            lr = rate(method, args.results)
            rows |= {f"{name} lr x {f:g}": (method, [*more, f"trainer.lr={lr * f}"]) for f in RATES}
    else:
        rows = {f"gamma {gamma:g}": ("SQDF", [f"algorithm.gamma={gamma}"]) for gamma in (0.8, 0.9, 1.0)}
        estimators = [("tweedie, guided", ["algorithm.estimator=tweedie", "algorithm.estimator_guidance=3"]),
                      ("tweedie, posterior mean", ["algorithm.estimator=tweedie", "algorithm.estimator_guidance=1"]),
                      ("rollout-2", ["algorithm.estimator=rollout-2", "algorithm.estimator_guidance=3"])]
        if args.consistency:
            estimators.append(("consistency", ["algorithm.estimator=consistency", "algorithm.estimator_guidance=1",
                                               f"model.consistency={args.consistency}"]))
        rows |= {name: ("SQDF", overrides) for name, overrides in estimators}
        rows["buffer none"] = ("SQDF", ["algorithm.buffer=none", "algorithm.rollout_every=1"])
        for law in ("uniform", "prioritised", "importance"):
            rows[f"buffer {law}"] = ("SQDF", [f"algorithm.buffer={law}"])
    return dict(list(rows.items())[:: max(1, len(rows) // 2)]) if args.quick else rows


def train_and_judge(group: str, args: argparse.Namespace) -> None:
    who = referees(args.prompts, (0, 1))
    for seed in args.seeds:
        for name, (method, overrides) in runs(group, args).items():

            def run(seed: int = seed, method: str = method, overrides: list[str] = overrides) -> list[dict]:
                found = watch(method, seed, who, budget=args.budget, checks=args.checks,
                              overrides=[*overrides, *args.override])
                return [{"updates": c.updates, "forwards": c.forwards, "seconds": c.seconds}
                        | {key: c.mean(key) for key in NAMES} for c in found]

            found = stored(args.results / f"{slug('sqdf', group, name, seed, args.budget)}.json", run)
            print(seed, name, json.dumps({key: round(found[-1][key], 3) for key in NAMES}), flush=True)


def at_reward(points: list[dict], reward: float, key: str) -> float:
    """The value of `key` where a run first reaches the held-out reward, linear between checks; NaN if it never does."""
    for before, after in zip(points[:-1], points[1:], strict=True):
        if after["heldout"] >= reward > before["heldout"]:
            share = (reward - before["heldout"]) / (after["heldout"] - before["heldout"])
            return before[key] + share * (after[key] - before[key])
    return float("nan")


def tables(args: argparse.Namespace) -> str:
    """Mean over seeds and, behind it, the standard deviation; the frontier as an SVG beside the results."""
    parts, clouds = [], {}
    for group in ("sweep", "ablations"):
        lines = [f"| {group} | seeds | updates | held-out | style | concept | diversity | drift | saturation |",
                 "|---|---|---|---|---|---|---|---|---|"]
        for name in runs(group, args):
            files = [args.results / f"{slug('sqdf', group, name, seed, args.budget)}.json" for seed in args.seeds]
            found = [json.loads(file.read_text()) for file in files if file.exists()]
            if not found:
                continue
            clouds.setdefault(name.split(" ")[0], []).extend(found if group == "sweep" else [])
            ends = [points[-1] for points in found]
            cells = [f"{np.mean([e[k] for e in ends]):.3f} ± {np.std([e[k] for e in ends]):.3f}"
                     for k in ("heldout", "style", "concept", "diversity", "drift", "saturation")]
            lines.append(f"| {name} | {len(found)} | {ends[0]['updates']} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    clouds = {name: found for name, found in clouds.items() if found}
    if clouds:
        base = next(iter(clouds.values()))[0][0]
        reached = min(max(p["heldout"] for points in found for p in points) for found in clouds.values())
        lines = ["| at held-out reward | " + " | ".join(f"{n}: diversity, concept" for n in clouds) + " |",
                 "|---" * (len(clouds) + 1) + "|", f"| {base['heldout']:.3f} (base) | "
                 + " | ".join(f"{base['diversity']:.3f}, {base['concept']:.3f}" for _ in clouds) + " |"]
        for share in (0.25, 0.5, 0.75, 1.0):
            level, cells = base["heldout"] + share * (reached - base["heldout"]), []
            for found in clouds.values():  # the best run of the method that reaches the level
                best = [max((at_reward(points, level, key) for points in found), default=np.nan,
                            key=lambda v: -np.inf if np.isnan(v) else v) for key in ("diversity", "concept")]
                cells.append("{:.3f}, {:.3f}".format(*best))
            lines.append(f"| {level:.3f} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
        series = {name: [(p["heldout"], p["diversity"]) for points in found for p in points]
                  for name, found in clouds.items()}
        (args.results / "sqdf-frontier.svg").write_text(scatter(
            "SQDF over alpha_kl, DRaFT-1 and ReFL over learning rates", "held-out objective",
            "diversity inside prompt and style", series, {}))
    lines = ["| oracle | seeds | base | random search | reward-weighted | SQDF | concept before, after | minutes |",
             "|---|---|---|---|---|---|---|---|"]
    for oracle in ORACLES:
        files = sorted(args.results.glob(f"{slug('sqdf', 'blackbox', oracle)}-*-{args.queries}.json"))
        if found := [json.loads(file.read_text()) for file in files]:
            cells = [f"{np.mean([f[k] for f in found]):.3f} ± {np.std([f[k] for f in found]):.3f}"
                     for k in ("base", "search", "weighted", "sqdf")]
            concept = ", ".join(f"{np.mean([f[k] for f in found]):.3f}" for k in ("concept_base", "concept"))
            lines.append(f"| {oracle} | {len(found)} | " + " | ".join(cells) + f" | {concept} | "
                         f"{np.mean([f['seconds'] for f in found]) / 60:.1f} |")
    return "\n\n".join([*parts, "\n".join(lines)])


@torch.no_grad()
def black_box(oracle: str, seed: int, who: Referees, args: argparse.Namespace) -> dict[str, float]:
    """Noiseless score on evaluation prompts of: the base; the best of the base's images by the noisy oracle, the same
    number of questions spread over those prompts; the same images weighted by exp(score / std); SQDF's result."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.folder={folder}/run", f"trainer.seed={seed}", f"optimize.oracle.name={oracle}",
                     f"optimize.budget={args.queries}", *args.override]
        plan = recipe.read("optimize-emoji", overrides)
        began = time.perf_counter()
        with torch.enable_grad():
            from_recipe(plan)
        seconds = time.perf_counter() - began
        model = recipe.build_model(plan)
        model.load_adapter(Path(folder) / "run/adapter")
    asked = load_oracle(plan.optimize.oracle, seed=seed)
    exact = load_oracle(recipe.OracleSettings(name=oracle))

    def scores(ask, images, words) -> np.ndarray:
        parts = [ask(images[k : k + 64], words[k : k + 64]) for k in range(0, len(images), 64)]
        return np.array([float(score) for part in parts for score in part])

    def concept(images, words) -> float:
        captions = [who.referee.parse(word) for word in words]
        parts = [matches(who.referee.judge.concept(images[k : k + 64]), who.referee.judge.concepts,
                         [c.concept for c in captions[k : k + 64]]) for k in range(0, len(images), 64)]
        return float(torch.cat(parts).mean())

    each = max(1, args.queries // len(who.prompts))
    seeds = list(range(1000, 1000 + each))
    words, _ = pairs(who.prompts, seeds)
    drawn = quantise(generate(model, who.prompts, seeds, weights="reference"))
    seen, true = (scores(ask, drawn, words).reshape(len(who.prompts), each) for ask in (asked, exact))
    weight = np.exp((seen - seen.max(1, keepdims=True)) / max(float(seen.std()), 1e-9))
    words, _ = pairs(who.prompts, (0, 1))
    before, after = (quantise(generate(model, who.prompts, (0, 1), weights=w)) for w in ("reference", "policy"))
    return {
        "base": float(scores(exact, before, words).mean()), "sqdf": float(scores(exact, after, words).mean()),
        "search": float(true[np.arange(len(true)), seen.argmax(1)].mean()),
        "weighted": float(((weight * true).sum(1) / weight.sum(1)).mean()),
        "concept_base": concept(before, words), "concept": concept(after, words), "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["sweep", "ablations", "blackbox", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=6000, help="denoiser forwards of a run")
    parser.add_argument("--checks", type=int, default=4)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=104, help="of the 208 evaluation prompts")
    parser.add_argument("--oracles", nargs="+", default=list(ORACLES), choices=ORACLES)
    parser.add_argument("--consistency", type=Path, help="folder of a consistency model, for its row of the ablations")
    parser.add_argument("--override", nargs="*", default=[], help="for every row, while tuning")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="a few tiny runs; results go to a scratch folder")
    args = parser.parse_args()
    if args.quick:
        args.results = Path(tempfile.gettempdir()) / "palate-sqdf-quick"
        args.seeds, args.budget, args.checks, args.prompts, args.queries = [0], 60, 1, 4, 12
        args.override += ["trainer.batch_size=2", "algorithm.buffer_size=8"] if args.what != "sweep" else []
        if args.what == "blackbox":
            args.oracles = args.oracles[:1]
            args.override += ["trainer.steps=1", "optimize.rounds=2", "algorithm.rollout_steps=3"]
    if args.what in ("sweep", "ablations"):
        train_and_judge(args.what, args)
    if args.what == "blackbox":
        who = referees(args.prompts, (0, 1))
        for seed in args.seeds:
            for oracle in args.oracles:
                path = args.results / f"{slug('sqdf', 'blackbox', oracle, seed, args.queries)}.json"
                print(seed, oracle, stored(path, lambda o=oracle, s=seed: black_box(o, s, who, args)), flush=True)
    print(tables(args))


if __name__ == "__main__":
    main()
