"""Measure the embedded base model, its autoencoder, judges and rewards: the figures of the model card.

    python tools/evaluate_assets.py [--model FOLDER] [--only autoencoder judges styled ...] [--out figures.json]
    python tools/evaluate_assets.py --quick --out /tmp/figures.json      # a few pictures of each, to see that it works
    python tools/evaluate_assets.py --model OLD --shared OLD --only styled sides frechet variety \
        --section "the first model"         # an earlier model by these judges; then again without --model, to compare

The judge, the detector and the exact oracles speak; none was used in training the base model. --model measures another
model (an earlier one, say) by the same judges, on the words that it knows; figures that it cannot have are left out.
What was measured before stays in the file, so that parts can be run one by one; `tools/model_card.py` writes the card
from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import ASSETS, Atlas, Composer, Samples, save_grid
from shown import wrong
from torch import Tensor
from train_autoencoder import fidelity, fresh, laplacian
from train_detector import Lessons, check
from transformers import PreTrainedTokenizerFast

from palate.data.prompts import evenly_spaced
from palate.evaluate import diversity, frechet_distance, generate
from palate.models.emoji import EmojiModel
from palate.models.vocabulary import parse_prompt, vocabulary, with_article
from palate.rewards.emoji import COLOURS, EmojiClassifier, background, load_reward, position
from palate.rewards.tasks import TaskReward, load_detector, task_prompts, task_scores

SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}


class Bench:
    """The model that is measured, who judges it, and what it may be asked."""

    def __init__(self, folder: Path | None, grids: Path, shared: Path | None = None, most: int | None = None):
        self.model = EmojiModel.load(folder, training="none")
        self.judge, self.grids, self.most = EmojiClassifier(), grids, most
        known = set(self.model.tokenizer.get_vocab())
        self.scenes = all(word in known for word in vocabulary().counts)
        if shared:
            known &= set(PreTrainedTokenizerFast.from_pretrained(shared / "tokenizer").get_vocab())
        self.concepts = [concept for concept in vocabulary().concepts if concept in known]
        self.composer = Composer(Atlas.load())

    def some(self, prompts: list[str]) -> list[str]:
        """All of them, or of a quick run a few."""
        return evenly_spaced(prompts, self.most or len(prompts))

    def read(self, name: str) -> list[str]:
        """The prompts of that file that the model has the words for."""
        prompts = (ASSETS / f"prompts/{name}.txt").read_text().splitlines()
        return self.some([prompt for prompt in prompts if parse_prompt(prompt).concept in self.concepts])

    def fresh(self, seed: int, mix: dict[str, float] | None = None) -> Samples:
        """2,000 compositions that no training saw, or of a quick run a few."""
        return Composer(self.composer.atlas, mix=mix).compose(np.random.default_rng((99, seed)), self.most or 2000)

    def draw(self, prompts: list[str], seeds: range | tuple[int, ...] = (0,)) -> Tensor:
        return generate(self.model, prompts, seeds)

    def seen(self, images: Tensor, prompts: list[str]) -> dict[str, float]:
        """How often concept, style and background are as the prompt says."""
        asked = [parse_prompt(prompt) for prompt in prompts]
        parts = list(zip(images.split(100), (asked[k : k + 100] for k in range(0, len(asked), 100)), strict=True))
        names = {"concept": self.judge.concepts, "style": self.judge.styles, "background": COLOURS}
        ask = {"concept": self.judge.concept, "style": self.judge.style, "background": background}
        return {
            kind: float(
                np.mean(
                    [
                        names[kind][int(k)] == getattr(caption, kind)
                        for part, captions in parts
                        for k, caption in zip(ask[kind](part), captions, strict=True)
                        if getattr(caption, kind) is not None
                    ]
                )
            )
            for kind in names
        }

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.judge.features(part) for part in images.split(100)])


def autoencoder(bench: Bench) -> dict:
    """Encode and decode 256 fresh compositions."""
    return fidelity(bench.model.vae, fresh()[: bench.most])


def judges(bench: Bench) -> dict:
    """The judge and the oracle on 2,000 fresh compositions; the rewards: the true caption above a wrong one."""
    samples = bench.fresh(2, {"one": 1})
    parts = samples.images.split(100)
    seen = {
        "concept": torch.cat([bench.judge.concept(part) for part in parts]) == samples.concept,
        "style": torch.cat([bench.judge.style(part) for part in parts]) == samples.style,
        "background": torch.cat([background(part) for part in parts]) == samples.colour,
    }
    found: dict = {"judge": {name: float(right.float().mean()) for name, right in seen.items()}}
    mixed = bench.fresh(3)
    true = [
        scene.caption if parse_prompt(scene.caption).style else f"{vocabulary().styles[scene.style]}. {scene.caption}"
        for scene in mixed.scenes
    ]
    lies = [
        wrong(scene._replace(caption=text), np.random.default_rng((99, 4, k)))
        for k, (scene, text) in enumerate(zip(mixed.scenes, true, strict=True))
    ]
    for name in ("emoji", "emoji-heldout"):
        reward = load_reward(name)
        with torch.no_grad():
            features = torch.cat([reward.image_features(part) for part in mixed.images.split(100)])
            own = reward.score(features, true)
            found[name] = {
                what: float((own > reward.score(features, [row[kind] for row in lies])).float().mean())
                for kind, what in enumerate(("style", "background", "concept", "detail"))
            }
    return found


def detector(bench: Bench) -> dict:
    """The detector on 2,000 fresh compositions of all kinds."""
    samples = bench.fresh(1)
    return check(load_detector(), Lessons(bench.composer.atlas), samples.images, samples.scenes)


def styled(bench: Bench) -> dict:
    """Concept and style that are named, on trained pairs; how fine the pictures are beside real ones of the prompts."""
    prompts = bench.read("emoji-styled")
    images = bench.draw(prompts)
    save_grid(images[:128], bench.grids / "styled.png", zoom=2)
    real = bench.composer.paint(
        [bench.composer.fulfil(np.random.default_rng((99, 5, k)), p) for k, p in enumerate(prompts)]
    )
    energy = [float(laplacian(x).square().mean()) for x in (images, real)]
    return bench.seen(images, prompts) | {"prompts": len(prompts), "high frequency": energy[0] / energy[1]}


def unseen(bench: Bench) -> dict:
    """The same for (concept, style) pairs that the base model never saw."""
    prompts = bench.read("emoji-heldout")
    return bench.seen(bench.draw(prompts), prompts) | {"prompts": len(prompts)}


def unstyled(bench: Bench) -> dict:
    """Without a style word: which style is drawn."""
    prompts = bench.read("emoji-eval")
    images = bench.draw(prompts)
    style = torch.cat([bench.judge.style(part) for part in images.split(100)])
    shares = {name: float((style == k).float().mean()) for k, name in enumerate(bench.judge.styles)}
    return {"concept": bench.seen(images, prompts)["concept"]} | shares


def frechet(bench: Bench) -> dict:
    """Distance of 2,000 samples from 2,000 compositions of the same words, judge features; one thing each."""
    count, rng, prompts = bench.most or 2000, np.random.default_rng((99, 6)), []
    for _ in range(count):
        concept, colour = rng.choice(bench.concepts), rng.choice(COLOURS)
        prompts.append(f"{rng.choice(vocabulary().styles)} {concept} on a {colour} background")
    real = bench.composer.paint([bench.composer.fulfil(rng, prompt) for prompt in prompts])
    return {"distance": frechet_distance(bench.features(bench.draw(prompts)), bench.features(real))}


def sides(bench: Bench) -> dict:
    """A side that is named: the middle of the drawing is there."""
    asked = [
        (f"a small {concept} at the {side} on a blue background", side)
        for concept in bench.concepts[:: max(1, len(bench.concepts) // 50)]
        for side in SIDES
    ]
    asked = asked[: bench.most]
    centres = position(bench.draw([prompt for prompt, _ in asked]))
    right = [
        float(SIDES[side][1] * centre[SIDES[side][0]] > 0.08) for centre, (_, side) in zip(centres, asked, strict=True)
    ]
    return {"right": float(np.mean(right)), "prompts": len(asked)}


def tasks(bench: Bench, seeds: int = 4) -> dict:
    """The six tasks, strict."""
    if not bench.scenes:
        return {}
    reward, prompts, right = TaskReward(strict=True), task_prompts(), {}
    prompts = {task: bench.some(asked) for task, asked in prompts.items()}
    for task, asked in prompts.items():
        images = bench.draw(asked, range(seeds))
        repeated = [prompt for prompt in asked for _ in range(seeds)]
        right[task] = [
            float(x)
            for k, part in enumerate(images.split(100))
            for x in reward(part, repeated[100 * k : 100 * k + len(part)])
        ]
        save_grid(images[:96], bench.grids / f"{task.replace(' ', '-')}.png", columns=16, zoom=1)
    return task_scores(prompts, right)


def variety(bench: Bench) -> dict:
    """Diversity inside a prompt that names its style: mean judge distance of eight pictures, 52 prompts."""
    rng, styles = np.random.default_rng((99, 7)), vocabulary().styles
    shared = bench.concepts[:: max(1, len(bench.concepts) // 52)][:52]
    prompts = bench.some([f"{with_article(f'{styles[k % 4]} {c}')} on a blue background" for k, c in enumerate(shared)])
    images = bench.draw(prompts, range(8))
    groups = [prompt for prompt in prompts for _ in range(8)]
    real = bench.composer.paint([bench.composer.fulfil(rng, prompt) for prompt in groups])
    return {
        name: float(diversity(bench.features(x), groups).mean()) for name, x in (("samples", images), ("real", real))
    }


PARTS: dict[str, Callable[[Bench], dict]] = {
    part.__name__: part
    for part in (autoencoder, judges, detector, styled, unseen, unstyled, frechet, sides, tasks, variety)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a model folder; the embedded one if left out")
    parser.add_argument("--shared", type=Path, help="ask only for what this model folder knows as well, to compare")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="these parts; all if left out")
    parser.add_argument("--out", type=Path, help="figures.json of the package, if left out")
    parser.add_argument("--section", help="of the file, for the figures of another model or of fewer words")
    parser.add_argument("--grids", type=Path, default=Path(".cache/evaluation"))
    parser.add_argument("--quick", action="store_true", help="eight prompts of each part; its numbers mean nothing")
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick: give --out, so that its numbers do not take the place of the shipped ones")
    args.out = args.out or ASSETS / "figures.json"
    bench = Bench(args.model, args.grids, args.shared, 8 if args.quick else None)
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    part = figures.setdefault(args.section, {}) if args.section else figures
    for name in args.only or PARTS:
        part[name] = _rounded(PARTS[name](bench))
        print(name, json.dumps(part[name]), flush=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


def _rounded(value):
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else round(value, 4)


if __name__ == "__main__":
    main()
