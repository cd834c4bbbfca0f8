"""Samples that a reward must not like: the base model's own, and those of policies that over-optimised the present
reward, by every way in which rewards are optimised here.

    python tools/build_negatives.py [--steps 30] [--samples 192] [--seed 5] [--methods srpo-emoji draft-emoji ...]

A policy is trained hard (relative reward alone, twice the recipe's learning rate) towards one style and away from
another, and sampled half-way and at its end: with SRPO for every ordered pair of styles, with each other method for
every style once. The base model is sampled with style words. Each image is kept with the caption it was to fulfil, in
.cache/rewards/negatives.safetensors and .json; `train_rewards.py emoji` trains against them.

The samples of each policy are kept in .cache/rewards/negatives/ as soon as they are drawn: the same command goes on
where it stopped. With other settings, or other weights of the base model or of the reward, they are drawn anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from data import ASSETS, save_grid
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from palate import recipe
from palate.evaluate import generate, quantise
from palate.models.vocabulary import vocabulary
from palate.recipe.identity import weights_digest
from palate.rewards.combine import semantic_relative, with_control
from palate.runtime.files import json_digest
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


Samples = tuple[Tensor, list[str]]  # images (N, 3, H, W) uint8, and the caption that each was to fulfil


def drawn(model, words: Sequence[str], seed: int, weights: str = "policy") -> Tensor:
    return (quantise(generate(model, words, [seed], weights=weights)) * 255).round().byte()


def kept(path: Path, made_of: str, make: Callable[[], Samples]) -> Samples:
    """What `path` holds, if it was made of the same; else what `make` gives, written to a draft first, so that a kill
    leaves the file whole or absent."""
    if path.is_file():
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("made_of") == made_of:
                return file.get_tensor("images"), json.loads(metadata["captions"])
    images, captions = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    save_file({"images": images}, draft, {"made_of": made_of, "captions": json.dumps(captions)})
    draft.rename(path)
    return images, captions


def policy_samples(plan: recipe.Recipe, number: int, taste: tuple[str, str], prompts: list[str], count: int) -> Samples:
    """Train one policy as the plan says, and sample it half-way and at its end: `count` images."""
    method, (wanted, unwanted), seed = plan.algorithm.name, taste, plan.trainer.seed
    torch.manual_seed(seed)
    parts = recipe.build(plan)
    reward = parts.reward if method == "srpo" else semantic_relative(parts.reward, wanted, unwanted)
    images, captions = [], []
    for part in range(2):
        with tempfile.TemporaryDirectory() as folder:
            train(
                parts.model,
                parts.algorithm,
                reward,
                parts.prompts,
                folder=folder,
                progress=False,
                **{**vars(plan.trainer), "steps": plan.trainer.steps // 2, "seed": seed + 100 * part},
            )
        first = (2 * number + part) * count // 2
        chosen = [prompts[(first + k) % len(prompts)] for k in range(count // 2)]
        images.append(drawn(parts.model, chosen, 1 + part))
        captions += with_control(wanted, chosen)
    return torch.cat(images), captions


def base_samples(plan: recipe.Recipe, prompts: list[str], count: int) -> Samples:
    """What the base model draws when it is asked for every style in turn."""
    styles = vocabulary().styles
    styled = [f"{styles[k % len(styles)]}. {prompts[k % len(prompts)]}" for k in range(count)]
    return drawn(recipe.build(plan).model, styled, 7, "reference"), styled


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
    start, folder, prompts = time.time(), args.out.with_suffix(""), recipe.read_prompts("emoji-train")
    weights = [weights_digest(str(ASSETS / part)) for part in ("emoji/unet", "emoji/vae", "reward-emoji")]
    images, captions = [], []

    def keep(name: str, plan: recipe.Recipe, number: int, make: Callable[[], Samples]) -> None:
        made_of = json_digest([recipe.fingerprint(plan), args.steps, args.samples, number, prompts, weights])
        found = kept(folder / f"{name}.safetensors", made_of, make)
        images.append(found[0])
        captions.extend(found[1])
        print(f"{name}: {(time.time() - start) / 60:.1f} min", flush=True)

    policies = [(method, taste) for method in args.methods for taste in tastes(method)]
    for number, (method, taste) in enumerate(policies):
        plan = hard(method, *taste, args.steps, args.rate, args.seed + number)
        keep(f"{method}+{taste[0]}-{taste[1]}", plan, number,
             lambda p=plan, n=number, t=taste: policy_samples(p, n, t, prompts, args.samples))  # fmt: skip
    keep("base", plan, len(policies), lambda: base_samples(plan, prompts, 4 * args.samples))

    pool = torch.cat(images)
    save_file({"images": pool}, args.out)
    args.out.with_suffix(".json").write_text(json.dumps(captions))
    save_grid(pool[:: max(1, len(pool) // 160)].float() / 255, args.out.with_suffix(".png"), columns=16)
    print(f"{len(pool)} images, {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
