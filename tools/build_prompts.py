"""Write the embedded prompt files: src/palate/assets/prompts/*.txt, deterministic.

emoji-train    four prompts per concept without a style word (what the recipes train on)
emoji-eval     other prompts without a style word, one or two per concept (what evaluations use)
emoji-styled   520 prompts that name concept, style and background, trained pairs only (the base model's quality bar)
emoji-distil   emoji-train and a prompt of each trained pair of concept and style (what the one-step generator learns)
emoji-heldout  prompts of the (concept, style) pairs that the base model never saw, on every background
emoji-tasks    144 prompts of the six tasks (`palate.rewards.tasks`), and emoji-tasks-train, 480 others; where the
               vocabulary has words for them
emoji-taste    every concept without and with a background (what alignment to a taste trains on)
"""

from __future__ import annotations

import numpy as np
from data import ASSETS, held_out_pairs

from palate.models.vocabulary import vocabulary, with_article
from palate.rewards.tasks import task_prompts

STYLED = 520


def main() -> None:
    vocab, rng = vocabulary(), np.random.default_rng(7)
    colours, held_out = list(vocab.colours), held_out_pairs()

    def plain(concept: str, colour: str) -> str:
        size = f"{rng.choice(vocab.sizes)} " if rng.random() < 0.15 else ""
        place = f" at the {rng.choice(vocab.positions)}" if rng.random() < 0.1 else ""
        return f"{with_article(size + concept)}{place} on {with_article(colour)} background"

    train, evaluation = [], []
    for concept in vocab.concepts:
        picks = rng.permutation(len(colours))[:6]
        train += [plain(concept, colours[k]) for k in picks[:4]]
        others = picks[4:] if len(vocab.concepts) < 150 else picks[4:5]
        evaluation += [f"{with_article(concept)} on {with_article(colours[k])} background" for k in others]
    seen = [(c, s) for c in range(len(vocab.concepts)) for s in range(len(vocab.styles)) if (c, s) not in held_out]
    order = rng.permutation(len(seen))
    asked = [seen[k] for k in order[:STYLED]] + [seen[k] for k in order[: max(0, STYLED - len(seen))]]

    def styled(pair: tuple[int, int], colour: str) -> str:
        thing = with_article(f"{vocab.styles[pair[1]]} {vocab.concepts[pair[0]]}")
        return f"{thing} on {with_article(colour)} background"

    lists = {
        "emoji-train": train,
        "emoji-eval": evaluation,
        "emoji-styled": [styled(pair, str(rng.choice(colours))) for pair in asked],
        "emoji-heldout": [styled(pair, colour) for pair in sorted(held_out) for colour in colours],
    }
    orders = {name: rng.permutation(len(prompts)) for name, prompts in lists.items()}
    others = [styled(pair, str(rng.choice(colours))) for pair in sorted(set(seen))]
    lists["emoji-distil"] = [*train, *(prompt for prompt in others if prompt not in lists["emoji-styled"])]
    orders["emoji-distil"] = rng.permutation(len(lists["emoji-distil"]))
    if vocab.counts:
        lists["emoji-tasks"] = [prompt for asked in task_prompts().values() for prompt in asked]
        more = [prompt for asked in task_prompts(90, seed=1).values() for prompt in asked[:80]]
        lists["emoji-tasks-train"] = [prompt for prompt in more if prompt not in set(lists["emoji-tasks"])]
        orders |= {name: rng.permutation(len(lists[name])) for name in ("emoji-tasks", "emoji-tasks-train")}
    own = np.random.default_rng(11)  # so that the lists above stay as they are
    lists["emoji-taste"] = [
        *(f"a {concept}" for concept in vocab.concepts),
        *(f"a {concept} on a {own.choice(colours)} background" for concept in vocab.concepts),
    ]
    orders["emoji-taste"] = own.permutation(len(lists["emoji-taste"]))
    folder = ASSETS / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in lists.items():
        order = orders[name]
        (folder / f"{name}.txt").write_text("".join(f"{prompts[k]}\n" for k in order))
        print(f"{name}: {len(prompts)} prompts, {len(set(prompts))} different")


if __name__ == "__main__":
    main()
