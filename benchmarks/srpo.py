"""SRPO on the embedded model: three word pairs, ablations, and a swap of words, with held-out judges.

    python benchmarks/srpo.py pairs      --seeds 0 1 2
    python benchmarks/srpo.py ablations  --seeds 0 1 2
    python benchmarks/srpo.py table                      # print what has been measured

Each row trains the published recipe with the overrides named here, and judges 208 prompts without a style word, two images
each, against the base model from the same noise. A result that is already in --results is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from methods import about, whole

from palate import recipe
from palate.evaluate import Referee, diversity, drift, embedded_referee, evaluate_images, generate, pairs, quantise
from palate.rewards.combine import score_pair, with_control
from palate.train import train

SEEDS_PER_PROMPT = (0, 1)
ABSOLUTE = ["algorithm.preference=absolute", "algorithm.k_denoise=[0, 0]", "algorithm.hinge=null"]
RUNS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "pairs": {
        "3d against flat, outline": ("srpo-emoji", []),
        "cartoon against outline": ("srpo-emoji-cartoon", []),
        "outline against 3d": ("srpo-emoji-outline", []),
    },
    "ablations": {
        "default": ("srpo-emoji", []),
        "no inversion branch": ("srpo-emoji", ["algorithm.branches=[denoise]"]),
        "early window": ("srpo-emoji", ["algorithm.window=[0.7, 0.98]"]),
        "late window": ("srpo-emoji", ["algorithm.window=[0.02, 0.35]"]),
        "full window": ("srpo-emoji", ["algorithm.window=[0.02, 0.98]"]),
        "rollout noise": ("srpo-emoji", ["algorithm.noise=rollout"]),
        "absolute reward": ("srpo-emoji", [*ABSOLUTE, "algorithm.branches=[denoise]"]),
        "absolute, both branches": ("srpo-emoji", ABSOLUTE),
        "no hinge": ("srpo-emoji", ["algorithm.hinge=null"]),
        "all layers": ("srpo-emoji", ["model.lora_targets=null", "trainer.lr=1.2e-3"]),
    },
}


def measure(name: str, overrides: list[str], seed: int, referee: Referee, cache: dict, count: int) -> dict:
    """Train without guard, previews or checkpoints, then judge the result."""
    plan = recipe.read(name, [*overrides, f"trainer.seed={seed}", "trainer.guard.every=0", "trainer.preview_every=0",
                              "trainer.checkpoint_every=0"])
    torch.manual_seed(seed)
    parts = recipe.build(plan)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        whole(train(parts.model, parts.algorithm, parts.reward, parts.prompts, folder=folder, **vars(plan.trainer),
                    progress=False))
    seconds = time.perf_counter() - began

    prompts = recipe.spread(recipe.read_prompts("emoji-eval"), count)
    words, seeds = pairs(prompts, SEEDS_PER_PROMPT)
    if "base" not in cache:
        cache["base"] = quantise(generate(parts.model, prompts, SEEDS_PER_PROMPT, weights="reference"))
    images = quantise(generate(parts.model, prompts, SEEDS_PER_PROMPT))
    positive, negative = plan.algorithm.positive, plan.algorithm.negative
    rewards = dict(referee.rewards)
    rewards.pop("jpeg_size")
    judged = evaluate_images(images, words, seeds, rewards=rewards, judge=referee.judge, parse=referee.parse,
                             background=referee.background, colours=referee.colours, base=cache["base"]).summary
    metrics = judged["metrics"]
    row = {"seconds": seconds, "drift": judged["drift"]}
    for key in (f"style/{positive[0]}", "concept", "background"):
        short = "style" if key.startswith("style/") else key
        row[short], row[f"{short}_base"] = metrics[key]["value"], metrics[key]["base"]
    for key in ("diversity", "diversity_same_style"):
        row[key] = metrics[key]["value"] / metrics[key]["base"]
    with torch.no_grad():
        for reward in ("emoji", "emoji-heldout"):  # the relative preference, on the images of both models
            change = []
            for side in (cache["base"], images):
                scores = [score_pair(referee.rewards[reward], side[k: k + 64],
                                     with_control(positive[0], words[k: k + 64]), with_control(negative[0], words[k: k + 64]))
                          for k in range(0, len(side), 64)]
                change.append(float(torch.cat([a - b for a, b in scores]).mean()))
            row[f"relative {reward}"] = change[1] - change[0]
            row[f"absolute {reward}"] = metrics[f"reward/{reward}"]["change"]
    # the colours of the style itself: the base model asked for it by name, same prompts and noise
    style = f"asked for {positive[0]}"
    if style not in cache:
        asked = [prompt.replace("a ", f"a {positive[0]} ", 1) for prompt in prompts]
        cache[style] = quantise(generate(parts.model, asked, SEEDS_PER_PROMPT, weights="reference"))
    groups = [prompt for prompt in prompts for _ in SEEDS_PER_PROMPT]
    inside = [float(diversity(referee.judge.features(side), groups).nanmean()) for side in (images, cache[style])]
    row["diversity_of_style"] = inside[0] / inside[1]
    cast = drift(images, cache[style], referee.judge.features(images), referee.judge.features(cache[style]))
    row["cast"] = {key: cast[key] for key in ("saturation_ratio", "red_ratio", "green_ratio", "blue_ratio")}
    return row


def table(group: str, results: Path) -> str:
    """Mean over seeds, with the standard deviation behind it; "" if nothing has been measured."""
    lines = ["| run | seeds | style share | concept change | background change | diversity / base | same style "
             "| / base in that style | relative reward, optimised | held out | absolute reward, held out "
             "| saturation; red, green, blue / base in that style | fine detail / base | seconds |", "|---" * 14 + "|"]
    for name in RUNS[group]:
        rows = [json.loads(p.read_text()) for p in sorted(results.glob(f"{group}-{_slug(name)}-*.json"))]
        if not rows:
            continue
        two, base = "{:.2f}", np.mean([r["style_base"] for r in rows])
        red, green, blue = (f"{np.mean([r['cast'][f'{c}_ratio'] for r in rows]):.2f}" for c in ("red", "green", "blue"))
        lines.append("| " + " | ".join([
            name, str(len(rows)), f"{base:.2f} -> " + about([r["style"] for r in rows], two),
            about([r["concept"] - r["concept_base"] for r in rows], "{:+.3f}"),
            about([r["background"] - r["background_base"] for r in rows], "{:+.3f}"),
            about([r["diversity"] for r in rows], two), about([r["diversity_same_style"] for r in rows], two),
            about([r["diversity_of_style"] for r in rows], two),
            about([r["relative emoji"] for r in rows], "{:+.3f}"),
            about([r["relative emoji-heldout"] for r in rows], "{:+.3f}"),
            about([r["absolute emoji-heldout"] for r in rows], "{:+.3f}"),
            f"{np.mean([r['cast']['saturation_ratio'] for r in rows]):.2f}; {red}, {green}, {blue}",
            about([r["drift"]["high_frequency_ratio"] for r in rows], two),
            f"{np.mean([r['seconds'] for r in rows]):.0f}",
        ]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def tell(results: Path) -> None:
    """Print the tables, and write them where publish.py finds them."""
    for group in RUNS:
        if text := table(group, results):
            (results / f"srpo-{group}.md").write_text(text + "\n")
            print(f"{text}\n")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*RUNS, "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=208, help="of the 208 evaluation prompts")
    parser.add_argument("--only", nargs="+", help="rows by name")
    parser.add_argument("--override", nargs="*", default=[], help="for every row, while tuning")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.what == "table":
        tell(args.results)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    referee, cache = embedded_referee(), {}
    for seed in args.seeds:
        for name, (source, overrides) in RUNS[args.what].items():
            path = args.results / f"{args.what}-{_slug(name)}-{seed}.json"
            if path.exists() or (args.only and name not in args.only):
                continue
            row = measure(source, [*overrides, *args.override], seed, referee, cache, args.prompts)
            path.write_text(json.dumps(row, indent=1) + "\n")
            print(seed, name, json.dumps({k: round(v, 3) for k, v in row.items() if isinstance(v, float)}), flush=True)
    tell(args.results)


if __name__ == "__main__":
    main()
