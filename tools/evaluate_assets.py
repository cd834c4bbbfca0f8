"""Measure the embedded base model and write the figures into its model card (src/palate/assets/README.md).

    python tools/evaluate_assets.py [--seeds 1]

The judge and the background oracle speak, neither was used in training the base model. Bars: concept and style >= .90,
background >= .98 on trained (concept, style) pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from data import ASSETS, compose, load_sprites, save_grid

from palate.evaluate import diversity, embedded_panel, evaluate_model, generate, pairs
from palate.models.emoji import EmojiModel
from palate.models.vocabulary import vocabulary
from palate.rewards.emoji import position


def read(name: str) -> list[str]:
    return (ASSETS / f"prompts/{name}.txt").read_text().splitlines()


def judge_accuracy(panel) -> dict[str, float]:
    """The judge and the oracle on 2,000 fresh compositions: how far their word can be trusted."""
    import numpy as np

    samples = compose(np.random.default_rng((99, 0)), load_sprites(), 2000)
    pieces = samples.images.split(100)
    concept = torch.cat([panel.classifier.concept(piece) for piece in pieces])
    style = torch.cat([panel.classifier.style(piece) for piece in pieces])
    colour = torch.cat([panel.background(piece) for piece in pieces])
    right = {
        "concept": concept == samples.concept,
        "style": style == samples.style,
        "background": colour == samples.colour,
    }
    figures = {name: float(values.float().mean()) for name, values in right.items()}
    names = vocabulary()
    captions = [
        f"{names.styles[s]} {names.concepts[c]} on {panel.colours[b]}"
        for s, c, b in zip(samples.style, samples.concept, samples.colour, strict=True)
    ]
    for name in ("emoji", "emoji-heldout"):  # the true caption above the same with a wrong style / concept / background
        reward = panel.rewards[name]
        shifts = {
            "style": [
                f"{names.styles[(s + 1 + k % 3) % 4]} {names.concepts[c]} on {panel.colours[b]}"
                for k, (s, c, b) in enumerate(zip(samples.style, samples.concept, samples.colour, strict=True))
            ],
            "concept": [
                f"{names.styles[s]} {names.concepts[(c + 1 + k % 97) % len(names.concepts)]} on {panel.colours[b]}"
                for k, (s, c, b) in enumerate(zip(samples.style, samples.concept, samples.colour, strict=True))
            ],
            "background": [
                f"{names.styles[s]} {names.concepts[c]} on {panel.colours[(b + 1 + k % 9) % 10]}"
                for k, (s, c, b) in enumerate(zip(samples.style, samples.concept, samples.colour, strict=True))
            ],
        }
        with torch.no_grad():
            features = torch.cat([reward.image_features(piece) for piece in pieces])
            own = reward.score(features, captions)
            for what, wrong in shifts.items():
                figures[f"{name} {what}"] = float((own > reward.score(features, wrong)).float().mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--grid", type=Path, default=Path(".cache/base/evaluation.png"))
    args = parser.parse_args()
    panel, model = embedded_panel(), EmojiModel.load(training="none")
    figures = {"judge": judge_accuracy(panel)}
    for name in ("emoji-styled", "emoji-heldout", "emoji-eval"):
        found = evaluate_model(model, read(name), range(args.seeds), panel=panel).summary["metrics"]
        figures[name] = {
            key: round(metric["value"], 4)
            for key, metric in found.items()
            if key.split("/")[0] in ("concept", "background", "style_named", "style", "reward")
        }
        print(name, json.dumps(figures[name]), flush=True)
    sides = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    asked = [
        f"a small {concept} at the {side} on a blue background"
        for concept in vocabulary().concepts[::4]
        for side in sides
    ]
    centre = position(generate(model, asked, [0]))
    right = [
        float(sign * place[axis] > 0.08)
        for place, (axis, sign) in zip(centre, list(sides.values()) * len(asked), strict=False)
    ]
    figures["position"] = round(sum(right) / len(right), 4)
    words = ["a cat", "a rose", "a car", "a 3d dog", "an apple on a blue background", "a rocket", "a fish", "a cake"]
    images = generate(model, words, range(16))
    groups, _ = pairs(words, range(16))
    values = diversity(panel.classifier.features(images), groups)
    figures["diversity"] = {word: round(float(v), 4) for word, v in zip(words, values, strict=True)}
    save_grid(images, args.grid, columns=16, zoom=1)
    print(json.dumps(figures, indent=1))
    (ASSETS / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
