"""What `palate taste` does once its options are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from palate.core import Reward
from palate.evaluate import read_samples
from palate.models.vocabulary import with_words
from palate.recipe import load_reward
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell, write_atomically
from palate.runtime.progress import counted, printable
from palate.taste.ask import telling_pairs
from palate.taste.saved import source_of
from palate.taste.taste import Taste, fit_taste
from palate.taste.words import FEWEST, GAIN, offered, unasked, word_gains


def fit(votes: Path, out: Path, features: str, weights: str | None, blocks: str | None) -> None:
    """Learn a taste from the votes, save it and print what it is worth."""
    base = _reward(features, weights, "which has its own; leave the option out, or give --features too")
    names = [name.strip() for name in blocks.split(",")] if blocks else None
    taste = fit_taste(votes, base=base, source=features, blocks=names)
    taste.save(out)
    print_card(taste)
    print(f"taste: {printable(str(out))}")


def show(folder: Path, weights: str | None) -> None:
    """Print the card of a saved taste."""
    print_card(_load(folder, weights))


def ask(folder: Path, pictures: Path, *, count: int, out: Path, seed: int, weights: str | None) -> None:
    """Write the pairs of pictures whose answers tell most, a JSON line each."""
    found = _load(folder, weights)
    images, rows = read_samples(pictures)
    prompts = [row["prompt"] for row in rows]
    pairs = telling_pairs(found.posterior, found.rows(images, prompts), prompts, count, np.random.default_rng(seed))
    if not pairs:
        raise InputError(f"{pictures} holds no two pictures of one prompt; draw several seeds of each")
    place, beside = pictures.resolve(), out.parent.resolve()
    inside = place.is_relative_to(beside)
    place = place.relative_to(beside) if inside else place  # as every list names its pictures
    lines = [
        {"prompt": prompts[i], "left": str(place / rows[i]["file"]), "right": str(place / rows[j]["file"]),
         "nats": round(nats, 4)} for i, j, nats in pairs
    ]  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    if not inside:
        print(f"{printable(str(pictures))} lies outside the folder of the list; palate votes import reads lists that "
              "lie beside or above their pictures")  # fmt: skip
    print(f"{counted(len(lines), 'pair')}, most telling first: {printable(str(out))}")


def words(folder: Path, pictures: Path, *, prompt: str, weights: str | None) -> None:
    """Print the known words that the taste prefers to plain prompts, and a prompt with them put in."""
    found = _load(folder, weights)
    images, rows = read_samples(pictures)
    prompts = [row["prompt"] for row in rows]
    std = found.scaling.std(torch.from_numpy(found.posterior.mean))
    gains = word_gains(found.rows(images, prompts), prompts, found.posterior, std)
    if not gains:
        raise InputError(
            f"{pictures}: words are told from at least {FEWEST} pictures of plain prompts and {FEWEST} of prompts "
            "with a word of the same kind, as 'a fox' and 'a fox on an orange background'"
        )
    chosen = offered(gains)
    if not found.learnt:
        print("The words are a guess, because this taste is not learnt yet: palate taste show says why.")
    for choice in chosen:
        print(f"{choice.word} ({choice.kind}): {choice.gain:+.2f} standard deviations above plain prompts, "
              f"{counted(choice.pictures, 'picture')}")  # fmt: skip
    if not chosen:
        best = gains[0]
        print(f"no word is worth {GAIN} standard deviations; the best is {best.word} with {best.gain:+.2f}")
    if source_of(folder) == "emoji" and (learnable := unasked(chosen)):
        print(f"to learn that background where a prompt names none: palate train taste-emoji-words "
              f"reward.source.taste={in_shell(folder)} {in_shell(f'algorithm.context=[{learnable[0]}]')}")  # fmt: skip
    if prompt:
        print(printable(with_words(prompt, [choice.word for choice in chosen])))


def print_card(taste: Taste) -> None:
    """The verdict, how many votes there are, the words of both sides, the raters."""
    card = taste.card
    print(printable(str(card.get("verdict", "a mix of tastes"))))
    if "votes" in card:
        error = card["calibration_error"]
        print(f"{counted(card['votes'], 'vote')}, {card['ties']} of them ties; calibration error "
              + ("not known" if error is None else f"{error:.3f}"))  # fmt: skip
    perhaps = "" if taste.learnt else "perhaps "
    for side, names in (card.get("words") or {}).items():
        if names:
            print(f"{perhaps}{side}: {printable(', '.join(names))}")
    for side, title in (("liked", "most liked"), ("disliked", "least liked")):
        if files := card.get(side):
            print(f"{perhaps}{title}:", *(printable(file) for file in files[:3]), sep="\n  ")
    raters = card.get("raters") or {}
    if len(raters) > 1:
        if unfit := [printable(name) or "unnamed" for name, q in raters.items() if q == 0]:
            print(f"the votes of {', '.join(unfit)} do not fit what the others like, and do not count; "
                  "fit a taste of their own")  # fmt: skip
        print("quality of raters: " + ", ".join(f"{printable(name) or 'unnamed'} {q:g}" for name, q in raters.items()))


def _load(folder: Path, weights: str | None) -> Taste:
    """InputError: there is no taste, or its reward cannot be loaded."""
    remedy = "which this taste stands on; leave the option out"
    return Taste.load(folder, base=_reward(source_of(folder), weights, remedy))


def _reward(source: str, weights: str | None, remedy: str) -> Reward | None:
    """The reward of that name; None for the embedded one. InputError: it cannot be loaded, or needs no weights."""
    if source != "emoji":
        return load_reward(source, weights)
    if weights is not None:
        raise InputError(f"--weights: no weights are read for the embedded reward, {remedy}")
    return None
