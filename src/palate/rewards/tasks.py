"""Six tasks in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513) on the embedded model's own words.

A prompt names what must be there: one thing, two things, how many of a kind, in which colour, on which side of another,
or two things in a colour each. The detector says what is there. An image is right when all that its prompt names is so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from palate.models.vocabulary import Caption, Vocabulary, parse_prompt, plural, vocabulary, with_article
from palate.rewards.detector import Detection, Detector
from palate.runtime.errors import InputError

TASKS = ("single object", "two objects", "counting", "colours", "position", "binding")
PER_TASK = 24
MARGIN = 0.2  # between two middles along the axis that the prompt names; the image is 2 wide
PLACES = ("to the left of", "to the right of", "above", "below")
AXES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}


def task_prompts(per_task: int = PER_TASK, seed: int = 0, vocab: Vocabulary | None = None) -> dict[str, list[str]]:
    """`per_task` different prompts of each task, a function of the seed. InputError where the words are missing."""
    vocab = vocab or vocabulary()
    if not (vocab.counts and vocab.relations and vocab.paints):
        raise InputError("the embedded vocabulary has no words for counts, places and colours of things")
    rng = Random(seed)

    def concepts(count: int, among: Sequence[str]) -> list[str]:
        """Shuffled rounds of all of them, so that each appears about equally often."""
        found: list[str] = []
        while len(found) < count:
            found += rng.sample(list(among), len(among))
        return found[:count]

    def pairs(among: Sequence[str]) -> list[tuple[str, str]]:
        firsts = concepts(per_task, among)
        return [(first, rng.choice([other for other in among if other != first])) for first in firsts]

    def paints() -> list[str]:
        return rng.sample(list(vocab.paints), 2)

    countable = [concept for concept in vocab.concepts if not concept.endswith("s")]
    return {
        "single object": [with_article(concept) for concept in concepts(per_task, vocab.concepts)],
        "two objects": [f"{with_article(first)} and {with_article(second)}" for first, second in pairs(vocab.concepts)],
        "counting": [
            f"{vocab.counts[k % len(vocab.counts)]} {plural(concept)}"
            for k, concept in enumerate(concepts(per_task, countable))
        ],
        "colours": [
            with_article(f"{vocab.paints[k % len(vocab.paints)]} {concept}")
            for k, concept in enumerate(concepts(per_task, vocab.turnable))
        ],
        "position": [
            f"{with_article(first)} {PLACES[k % len(PLACES)]} {with_article(second)}"
            for k, (first, second) in enumerate(pairs(vocab.concepts))
        ],
        "binding": [
            f"{with_article(f'{paint} {first}')} and {with_article(f'{other} {second}')}"
            for (first, second), (paint, other) in ((pair, paints()) for pair in pairs(vocab.turnable))
        ],
    }


GENEVAL_TAGS = dict(zip(("single_object", "two_object", "counting", "colors", "position", "color_attr"), TASKS,
                         strict=True))  # fmt: skip
GENEVAL_PLACES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def geneval_prompts(rows: Sequence[Mapping[str, Any]], vocab: Vocabulary | None = None) -> dict[str, list[str]]:
    """The prompts of GenEval's metadata (`palate.data.geneval`) that the embedded model has the words for, by task, in
    its own words: "a photo of a dog left of a car" is "a dog to the left of a car". InputError: there are none."""
    vocab = vocab or vocabulary()
    found: dict[str, list[str]] = {}
    for row in rows:
        prompt = _geneval_prompt(row, vocab)
        if prompt is not None:
            found.setdefault(GENEVAL_TAGS[row["tag"]], []).append(prompt)
    if not found:
        raise InputError("the embedded vocabulary has the words for no prompt of this metadata")
    return {task: list(dict.fromkeys(found[task])) for task in TASKS if task in found}


def _geneval_prompt(row: Mapping[str, Any], vocab: Vocabulary) -> str | None:
    """None where a word is missing, a thing cannot have its colour, or the tag is unknown."""
    things = row["include"]
    names = [vocab.synonyms.get(thing["class"], thing["class"]) for thing in things]
    paints = [thing.get("color") for thing in things]
    if row["tag"] not in GENEVAL_TAGS or not all(name in vocab.concepts for name in names):
        return None
    if any(paint and (paint not in vocab.paints or name not in vocab.turnable)
           for paint, name in zip(paints, names, strict=True)):  # fmt: skip
        return None
    phrases = [with_article(f"{paint} {name}" if paint else name) for paint, name in zip(paints, names, strict=True)]
    number = things[0]["count"]
    if number > 1:
        return f"{vocab.counts[number - 2]} {plural(names[0])}" if number - 2 < len(vocab.counts) else None
    if "position" in things[-1]:
        place = GENEVAL_PLACES.get(things[-1]["position"][0])
        return f"{phrases[1]} {place} {phrases[0]}" if place and vocab.relations and len(phrases) == 2 else None
    if len(phrases) > 1 and not vocab.relations:
        return None  # single drawings only
    return " and ".join(phrases)


def captions_of(prompts: Sequence[str], reward: str) -> list[Caption]:
    """What each prompt names. InputError, which names the reward: nothing, so that no picture could meet it."""
    captions = [parse_prompt(prompt) for prompt in prompts]
    for caption, prompt in zip(captions, prompts, strict=True):
        if caption.concept is None:
            raise InputError(f"{reward}: the prompt {prompt[:60]!r} names no thing; name one")
    return captions


def requirements(caption: Caption, found: Sequence[Detection]) -> list[bool]:
    """Whether each thing that the prompt names is so: things, how many, their colours, their relation.

    Where a thing was found several times the surest one counts, but for the number.
    """
    named = [(caption.concept, caption.paint)] + ([caption.second] if caption.second else [])
    things = [next((thing for thing in found if thing.concept == concept), None) for concept, _ in named]
    met = [thing is not None for thing in things]
    met += [
        thing is not None and thing.paint == paint for thing, (_, paint) in zip(things, named, strict=True) if paint
    ]
    if caption.number:
        met.append(sum(thing.concept == caption.concept for thing in found) == caption.number)
    if caption.relation:
        axis, sign = AXES[caption.relation]
        both = len(things) == 2 and None not in things
        met.append(both and sign * (_place(things[0], axis) - _place(things[1], axis)) > MARGIN)
    return met


def _place(thing: Detection | None, axis: int) -> float:
    return float("nan") if thing is None else (thing.x, thing.y)[axis]


class TaskReward:
    """How much of its prompt an image fulfils, in [0, 1]; has no gradient.

    strict: 1 if everything, else 0, as GenEval's own score; otherwise the fraction of what is named, which tells a
    policy gradient more.
    """

    def __init__(self, detector: Detector | None = None, *, strict: bool = False):
        self.detector = detector or load_detector()
        self.strict = strict

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) for images (B, 3, 64, 64) in [0, 1]. InputError: a prompt names no thing, or one that is unknown."""
        captions = captions_of(prompts, "emoji-tasks")
        met = [
            requirements(caption, found) for caption, found in zip(captions, self.detector.detect(images), strict=True)
        ]
        values = [float(all(row)) if self.strict else sum(row) / len(row) for row in met]
        return torch.tensor(values, dtype=images.dtype, device=images.device)


def load_tasks(name: str = "emoji-tasks") -> TaskReward:
    """The reward of that name. InputError where these assets hold no detector."""
    return TaskReward()


def task_scores(prompts: dict[str, list[str]], right: dict[str, Sequence[float]]) -> dict[str, float]:
    """Share of images that are right per task, and their mean over the tasks; `right` has one value per image."""
    scores = {task: sum(right[task]) / len(right[task]) for task in prompts}
    return scores | {"mean": sum(scores.values()) / len(scores)}


def load_detector() -> Detector:
    """The embedded detector. InputError where these assets have none."""
    folder = Path(str(files("palate") / "assets/detector"))
    if not folder.is_dir():
        raise InputError("the embedded assets hold no detector; tools/train_detector.py makes one")
    return Detector.load(folder)
