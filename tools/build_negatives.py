"""Samples that a reward must not like: the base model's own, and those of policies that over-optimised the present
reward, by every way in which rewards are optimised here.

    python tools/build_negatives.py [--steps 30] [--samples 192] [--seed 5] [--methods srpo-emoji draft-emoji ...]

A policy is trained hard (relative reward alone, twice the recipe's learning rate) towards one style and away from
another, and sampled half-way and at its end: with SRPO for every ordered pair of styles, with each other method for
every style once. The base model is sampled with style words. Each image is kept with the caption it was to fulfil, in
.cache/rewards/negatives.safetensors and .json; `train_rewards.py emoji` trains against them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from data import save_grid
from safetensors.torch import save_file

from palate import recipe
from palate.evaluate import generate, quantise
from palate.models.vocabulary import vocabulary
from palate.rewards.combine import semantic_relative, with_control
from palate.train import train

WORDS = "srpo-emoji"  # its control words are what is relative; the others take a relative reward
METHODS = (WORDS, "draft-emoji", "refl-emoji", "sqdf-emoji", "grpo-emoji")
PLAIN = ["trainer.ema_decay=0", "trainer.guard.every=0", "trainer.preview_every=0", "trainer.checkpoint_every=0"]


def tastes(method: str) -> list[tuple[str, str]]:
    """(wanted, unwanted) styles of the policies that a method trains."""
    styles = vocabulary().styles
    pairs = list(itertools.permutations(styles, 2))
    return pairs if method == WORDS else pairs[:: len(styles) - 1]  # each style once


def hard(method: str, wanted: str, unwanted: str, steps: int, rate: float, seed: int) -> recipe.Recipe:
    """The recipe without what holds it back."""
    words = [f"algorithm.positive=[{wanted}]", f"algorithm.negative=[{unwanted}]", "algorithm.k_denoise=[0, 0]"]
    return recipe.read(
        method,
        [
            *(words if method == WORDS else []),
            *PLAIN,
            f"trainer.steps={steps}",
            f"trainer.lr={rate * recipe.read(method).trainer.lr}",
            f"trainer.seed={seed}",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="updates of each over-optimised policy")
    parser.add_argument("--rate", type=float, default=2.0, help="times each recipe's learning rate")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--samples", type=int, default=192, help="images of each policy, and four times so many of the base"
    )
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".cache/rewards/negatives.safetensors"))
    args = parser.parse_args()
    styles, start = vocabulary().styles, time.time()
    prompts = recipe.read_prompts("emoji-train")
    images, captions = [], []

    def keep(model, words: list[str], texts: list[str], seed: int, weights: str = "policy") -> None:
        images.append((quantise(generate(model, words, [seed], weights=weights)) * 255).round().byte())
        captions.extend(texts)

    policies = [(method, *taste) for method in args.methods for taste in tastes(method)]
    for number, (method, wanted, unwanted) in enumerate(policies):
        seed = args.seed + number
        plan = hard(method, wanted, unwanted, args.steps, args.rate, seed)
        torch.manual_seed(seed)
        parts = recipe.build(plan)
        reward = parts.reward if method == WORDS else semantic_relative(parts.reward, wanted, unwanted)
        for part in range(2):
            with tempfile.TemporaryDirectory() as folder:
                train(
                    parts.model,
                    parts.algorithm,
                    reward,
                    parts.prompts,
                    folder=folder,
                    progress=False,
                    **{**vars(plan.trainer), "steps": args.steps // 2, "seed": args.seed + 100 * part + number},
                )
            first = (2 * number + part) * args.samples // 2
            chosen = [prompts[(first + k) % len(prompts)] for k in range(args.samples // 2)]
            keep(parts.model, chosen, with_control(wanted, chosen), seed=1 + part)
        print(f"{method} +{wanted} -{unwanted}: {(time.time() - start) / 60:.1f} min", flush=True)
    chosen = [prompts[k % len(prompts)] for k in range(4 * args.samples)]
    styled = [f"{styles[k % len(styles)]}. {prompt}" for k, prompt in enumerate(chosen)]
    keep(parts.model, styled, styled, seed=7, weights="reference")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    pool = torch.cat(images)
    save_file({"images": pool}, args.out)
    args.out.with_suffix(".json").write_text(json.dumps(captions))
    save_grid(pool[:: max(1, len(pool) // 160)].float() / 255, args.out.with_suffix(".png"), columns=16)
    print(f"{len(pool)} images, {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
