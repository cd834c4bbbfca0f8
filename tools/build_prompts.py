"""Write the embedded prompt files: src/palate/assets/prompts/*.txt, deterministic.

emoji-train    416 prompts without a style word (what the recipes train on)
emoji-eval     208 other prompts without a style word, each concept twice (what evaluations use)
emoji-styled   520 prompts that name concept, style and background, trained pairs only (the base model's quality bar)
emoji-distil   emoji-train and a prompt of each trained pair of concept and style (what the one-step generator learns)
emoji-heldout  120 prompts of the (concept, style) pairs that the base model never saw
"""

from __future__ import annotations

import numpy as np
from data import ASSETS, held_out_pairs

from palate.models.vocabulary import vocabulary


def main() -> None:
    vocab, rng = vocabulary(), np.random.default_rng(7)
    colours, held_out = list(vocab.colours), held_out_pairs()

    def plain(concept: str, colour: str) -> str:
        size = f"{rng.choice(vocab.sizes)} " if rng.random() < 0.15 else ""
        place = f" at the {rng.choice(vocab.positions)}" if rng.random() < 0.1 else ""
        return f"a {size}{concept}{place} on a {colour} background"

    train, evaluation = [], []
    for concept in vocab.concepts:
        picks = rng.permutation(len(colours))[:6]
        train += [plain(concept, colours[k]) for k in picks[:4]]
        evaluation += [f"a {concept} on a {colours[k]} background" for k in picks[4:]]
    seen = [(c, s) for c in range(len(vocab.concepts)) for s in range(len(vocab.styles)) if (c, s) not in held_out]
    seen += [seen[k] for k in rng.permutation(len(seen))[: 520 - len(seen)]]

    def styled(pair: tuple[int, int], colour: str) -> str:
        return f"a {vocab.styles[pair[1]]} {vocab.concepts[pair[0]]} on a {colour} background"

    lists = {
        "emoji-train": train,
        "emoji-eval": evaluation,
        "emoji-styled": [styled(pair, str(rng.choice(colours))) for pair in seen],
        "emoji-heldout": [styled(pair, colour) for pair in sorted(held_out) for colour in colours],
    }
    orders = {name: rng.permutation(len(prompts)) for name, prompts in lists.items()}
    others = [styled(pair, str(rng.choice(colours))) for pair in sorted(set(seen))]
    lists["emoji-distil"] = [*train, *(prompt for prompt in others if prompt not in lists["emoji-styled"])]
    orders["emoji-distil"] = rng.permutation(len(lists["emoji-distil"]))
    folder = ASSETS / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in lists.items():
        order = orders[name]
        (folder / f"{name}.txt").write_text("".join(f"{prompts[k]}\n" for k in order))
        print(f"{name}: {len(prompts)} prompts, {len(set(prompts))} different")


if __name__ == "__main__":
    main()
