"""SRPO on the embedded model: three word pairs, ablations, and a swap of words, with held-out judges.

    python benchmarks/srpo.py pairs      --seeds 0 1 2 [--jobs 2]
    python benchmarks/srpo.py ablations  --seeds 0 1 2 [--jobs 2]
    python benchmarks/srpo.py table                      # print what has been measured
    ... --quick                                          # the mechanics, in minutes; its numbers mean nothing

Each row trains the published recipe with the overrides named here, and judges 104 prompts without a style word, two
images each, against the base model from the same noise. Rows are those of rows.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from methods import about, fingerprints, parsed, slug, trained, with_style
from rows import Row, made_in, measured, write_table
from torch import Tensor

from palate import recipe
from palate.evaluate import (
    EvaluationPanel,
    diversity,
    drift,
    embedded_panel,
    evaluate_images,
    generate,
    pairs,
    quantise,
)
from palate.rewards.combine import score_pair, with_control

SEEDS_PER_PROMPT = (0, 1)
PURPLE = ['algorithm.negative=["flat", "purple 3d"]', "trainer.lr=5e-3"]  # against the violet that its reward likes
ABSOLUTE = ["algorithm.preference=absolute", "algorithm.k_denoise=[0, 0]", "algorithm.hinge=null"]
RUNS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "pairs": {
        "3d against flat, outline": ("srpo-emoji", []),
        "3d against flat, purple 3d": ("srpo-emoji", PURPLE),
        "cartoon against outline": ("srpo-emoji-cartoon", []),
        "outline against 3d": ("srpo-emoji-outline", []),
    },
    "ablations": {
        name: ("srpo-emoji", changes)
        for name, changes in {
            "default": [],
            "no inversion branch": ["algorithm.branches=[denoise]"],
            "early window": ["algorithm.window=[0.7, 0.98]"],
            "late window": ["algorithm.window=[0.02, 0.35]"],
            "full window": ["algorithm.window=[0.02, 0.98]"],
            "rollout noise": ["algorithm.noise=rollout"],
            "absolute reward": [*ABSOLUTE, "algorithm.branches=[denoise]"],
            "absolute, both branches": ABSOLUTE,
            "no hinge": ["algorithm.hinge=null"],
            "all layers": ["model.lora_targets=null", "trainer.lr=1.2e-3"],
        }.items()
    },
}


QUICK = ["trainer.steps=1", "trainer.batch_size=2"]

panel: Callable[[], EvaluationPanel] = cache(embedded_panel)


@cache
def drawn_by_the_base(prompts: tuple[str, ...]) -> Tensor:
    """What the base model draws for them, once a process."""
    return quantise(
        generate(recipe.build(recipe.read("srpo-emoji")).model, prompts, SEEDS_PER_PROMPT, weights="reference")
    )


def violet(images: Tensor) -> Tensor:
    """The share of each image's pixels that are violet or pink, (B,): hue between 265 and 335 degrees, saturation above
    .18, value above .25. It is what the embedded reward takes for "3d"."""
    value, darkest = images.amax(1), images.amin(1)
    spread = value - darkest
    red, green, blue = images.unbind(1)
    sectors = torch.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4)
    hue = 60 * torch.where(value == red, ((green - blue) / spread) % 6, sectors)  # not a number where it is grey
    shade = (hue > 265) & (hue < 335) & (spread > 0.18 * value) & (value > 0.25)
    return shade.double().mean((1, 2))


def measure(source: str, overrides: list[str], seed: int, count: int) -> dict:
    """Train without guard, previews or checkpoints, then judge the result."""
    plan = recipe.read(
        source,
        [
            *overrides,
            f"trainer.seed={seed}",
            "trainer.guard.every=0",
            "trainer.preview_every=0",
            "trainer.checkpoint_every=0",
        ],
    )
    model = trained(plan)
    prompts = recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), count)
    words, seeds = pairs(prompts, SEEDS_PER_PROMPT)
    base = drawn_by_the_base(tuple(prompts))
    images = quantise(generate(model, prompts, SEEDS_PER_PROMPT))
    positive, negative = plan.algorithm.positive, plan.algorithm.negative
    who = panel()
    rewards = dict(who.rewards)
    rewards.pop("jpeg_size")
    judged = evaluate_images(
        images,
        words,
        seeds,
        who._replace(rewards=rewards, position=None),
        base=base,
    ).summary
    metrics = judged["metrics"]
    row = {"drift": judged["drift"]}
    for key in (f"style/{positive[0]}", "concept", "background"):
        short = "style" if key.startswith("style/") else key
        row[short], row[f"{short}_base"] = metrics[key]["value"], metrics[key]["base"]
    for key in ("diversity", "diversity_same_style"):
        row[key] = metrics[key]["value"] / metrics[key]["base"]
    with torch.no_grad():
        for reward in ("emoji", "emoji-heldout"):  # the relative preference, on the images of both models
            change = []
            for side in (base, images):
                scores = [
                    score_pair(
                        who.rewards[reward],
                        side[k : k + 64],
                        with_control(positive[0], words[k : k + 64]),
                        with_control(negative[0], words[k : k + 64]),
                    )
                    for k in range(0, len(side), 64)
                ]
                change.append(float(torch.cat([a - b for a, b in scores]).mean()))
            row[f"relative {reward}"] = change[1] - change[0]
            row[f"absolute {reward}"] = metrics[f"reward/{reward}"]["change"]
    # the colours of the style itself: the base model asked for it by name, same prompts and noise
    asked = drawn_by_the_base(tuple(with_style(prompt, positive[0]) for prompt in prompts))
    groups = [prompt for prompt in prompts for _ in SEEDS_PER_PROMPT]
    inside = [float(diversity(who.classifier.features(side), groups).nanmean()) for side in (images, asked)]
    row["diversity_of_style"] = inside[0] / inside[1]
    cast = drift(images, asked, who.classifier.features(images), who.classifier.features(asked))
    plain = torch.tensor([not {"purple", "pink"} & set(prompt.split()) for prompt in words])
    row["violet"] = {
        side: float(violet(drawn)[plain].mean())
        for side, drawn in (("result", images), ("base", base), ("asked", asked))
    }
    own = evaluate_images(asked, words, seeds, who._replace(rewards={}, position=None)).summary["metrics"]
    row["asked"] = {"style": own[f"style/{positive[0]}"]["value"], "concept": own["concept"]["value"]}
    row["cast"] = {key: cast[key] for key in ("saturation_ratio", "red_ratio", "green_ratio", "blue_ratio")}
    return row


def table(group: str, results: Path) -> str:
    """Mean over seeds, with the standard deviation behind it; "" if nothing has been measured."""
    lines = [
        "| run | seeds | style share; base asked for it | concept change; base asked for it | background change "
        "| diversity / base | same style | / base in that style | relative reward, optimised | held out "
        "| absolute reward, held out | saturation; red, green, blue / base in that style | fine detail / base "
        "| violet pixels; base asked for it |",
        "|---" * 14 + "|",
    ]
    for name in RUNS[group]:
        rows = [row for _, row in made_in(results, f"{slug('srpo', group, name)}-*.json")]
        if not rows:
            continue
        two, base = "{:.2f}", np.mean([r["style_base"] for r in rows])
        red, green, blue = (f"{np.mean([r['cast'][f'{c}_ratio'] for r in rows]):.2f}" for c in ("red", "green", "blue"))
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    str(len(rows)),
                    f"{base:.2f} -> {about([r['style'] for r in rows], two)}; {rows[0]['asked']['style']:.2f}",
                    f"{about([r['concept'] - r['concept_base'] for r in rows], '{:+.3f}')}; "
                    f"{rows[0]['asked']['concept'] - rows[0]['concept_base']:+.3f}",
                    about([r["background"] - r["background_base"] for r in rows], "{:+.3f}"),
                    about([r["diversity"] for r in rows], two),
                    about([r["diversity_same_style"] for r in rows], two),
                    about([r["diversity_of_style"] for r in rows], two),
                    about([r["relative emoji"] for r in rows], "{:+.3f}"),
                    about([r["relative emoji-heldout"] for r in rows], "{:+.3f}"),
                    about([r["absolute emoji-heldout"] for r in rows], "{:+.3f}"),
                    f"{np.mean([r['cast']['saturation_ratio'] for r in rows]):.2f}; {red}, {green}, {blue}",
                    about([r["drift"]["high_frequency_ratio"] for r in rows], two),
                    _violet(rows),
                ]
            )
            + " |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _violet(rows: list[dict]) -> str:
    """Of the rows that measured it."""
    found = [row["violet"] for row in rows if "violet" in row]
    asked = f"; {found[0]['asked']:.3f}" if found else ""
    return f"{about([each['result'] for each in found], '{:.3f}')}{asked}" if found else "-"


def tell(results: Path) -> None:
    """Print the tables, and write them where publish.py finds them."""
    for group in RUNS:
        if text := table(group, results):
            write_table(results / f"srpo-{group}.md", text)
            print(f"{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*RUNS, "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=104, help="of emoji-eval")
    parser.add_argument("--only", nargs="+", help="rows by name")
    parser.add_argument("--override", nargs="*", default=[], help="for every row, while tuning")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.prompts, args.override = args.seeds[:1], 2, [*args.override, *QUICK]
        args.only = args.only or list(RUNS.get(args.what, ()))[:2]
    if args.what != "table":
        measured(
            [
                Row(
                    args.results / f"{slug('srpo', args.what, name, seed)}.json",
                    measure,
                    (source, [*overrides, *args.override], seed, args.prompts),
                    recipe=fingerprints(source),
                )
                for seed in args.seeds
                for name, (source, overrides) in RUNS[args.what].items()
                if not args.only or name in args.only
            ],
            args.jobs,
            lambda row: {key: round(value, 3) for key, value in row.items() if isinstance(value, float)},
            minutes=args.minutes,
        )
    tell(args.results)


if __name__ == "__main__":
    main()
