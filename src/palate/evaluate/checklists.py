"""Pictures judged by the questions of their prompts: how much of it is there, whether all of it is, and by skill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate.data.checklists import Checklist
from palate.evaluate.measurement import mean_and_interval, round_floats
from palate.rewards.checklist import Picture, QuestionJudge, Score, means
from palate.runtime.errors import InputError, RewardServiceError
from palate.runtime.files import json_digest
from palate.runtime.images import to_pixels


def evaluate_checklists(
    images: Tensor | Sequence[Picture],
    prompts: Sequence[str],
    seeds: Sequence[int],
    checklists: Sequence[Checklist],
    judge: QuestionJudge,
    *,
    base: Tensor | Sequence[Picture] | None = None,
) -> dict[str, Any]:
    """Images (N, 3, H, W), or the pixels (H, W, 3) or file of each, image i drawn for prompts[i] with seeds[i], as JSON
    values: "metrics" like an evaluation's, "by_prompt", "rows" (per image, with its questions' scores in the order of
    the file), "unclear" answers by side.

    Metrics, 95 % intervals over prompts: arithmetic and geometric, the means over images of a prompt's two means;
    skill/NAME, the mean over all questions of a skill; arithmetic/KIND and geometric/KIND, of the prompts of a kind.
    `base`: the base model's images for the same noise; with it every metric has its base value and paired change.
    """
    known = {item.prompt: item for item in checklists}
    if unknown := [prompt for prompt in prompts if prompt not in known]:
        raise InputError(f"there are no questions for the prompt {unknown[0][:80]!r}; draw the prompts of the file")
    asked = [known[prompt] for prompt in prompts]
    pixels = [to_pixels(side) if isinstance(side, Tensor) else side for side in (images, base) if side is not None]
    scores = judge.scores(
        [(picture, question) for side in pixels for picture, item in zip(side, asked, strict=True)
         for question in item.questions]
    )  # fmt: skip
    size = len(scores) // len(pixels)
    sides = [_by_image(scores[k * size : (k + 1) * size], asked) for k in range(len(pixels))]
    unclear = [sum(not score.clear for image in side for score in image) for side in sides]
    if sum(unclear) == len(scores):
        raise RewardServiceError(
            f"checklist {judge.chat.url}: no answer could be read, of {len(scores)}; is {judge.chat.model} a model "
            "that sees pictures, and is its thinking switched off?"
        )
    names = ("result", "base")[: len(sides)]
    return round_floats({
        "judge": judge.chat.model,
        "asked": json_digest([known[prompt] for prompt in dict.fromkeys(prompts)])[:16],  # what tells the questions
        "images": len(images),
        "prompts": len(set(prompts)),
        "seeds": sorted({int(seed) for seed in seeds}),
        "questions": size,
        "unclear": dict(zip(names, unclear, strict=True)),
        "metrics": _metrics(sides, asked),
        "by_prompt": [{"prompt": prompt, "kind": known[prompt].kind, "questions": len(known[prompt].questions)}
                      for prompt in dict.fromkeys(prompts)],
        "rows": [_row(i, prompts[i], seeds[i], sides, asked[i]) for i in range(len(images))],
    })  # fmt: skip


def _by_image(scores: Sequence[Score], asked: Sequence[Checklist]) -> list[list[Score]]:
    found, place = [], 0
    for item in asked:
        found.append(list(scores[place : place + len(item.questions)]))
        place += len(item.questions)
    return found


def _metrics(sides: Sequence[list[list[Score]]], asked: Sequence[Checklist]) -> dict[str, dict[str, float]]:
    prompts = [item.prompt for item in asked]
    both = [  # (images, 2) of each side
        np.array([means(item.questions, _values(image)) for item, image in zip(asked, side, strict=True)])
        for side in sides
    ]
    columns: dict[str, tuple[list[np.ndarray], list[str]]] = {}
    for k, name in enumerate(("arithmetic", "geometric")):
        columns[name] = [side[:, k] for side in both], prompts
    flat = [np.array([value for image in side for value in _values(image)]) for side in sides]
    of_question = [(item.prompt, question.skill) for item in asked for question in item.questions]
    for skill in dict.fromkeys(skill for _, skill in of_question if skill):
        there = np.array([own == skill for _, own in of_question])
        columns[f"skill/{skill}"] = [side[there] for side in flat], [p for p, own in of_question if own == skill]
    for kind in dict.fromkeys(item.kind for item in asked if item.kind):
        there = np.array([item.kind == kind for item in asked])
        for k, name in enumerate(("arithmetic", "geometric")):
            told = [item.prompt for item in asked if item.kind == kind]
            columns[f"{name}/{kind}"] = [side[there, k] for side in both], told
    found = {}
    for name, (values, groups) in columns.items():
        own = [torch.from_numpy(side) for side in values]
        found[name] = mean_and_interval(own[0], own[1] if len(own) > 1 else None, groups)
    return found


def _row(i: int, prompt: str, seed: int, sides: Sequence[list[list[Score]]], item: Checklist) -> dict[str, Any]:
    told = []
    for side in sides:
        arithmetic, geometric = means(item.questions, _values(side[i]))
        told.append({"arithmetic": arithmetic, "geometric": geometric, "scores": _values(side[i])})
    return {"prompt": prompt, "seed": int(seed), **told[0]} | ({"base": told[1]} if len(told) > 1 else {})


def _values(scores: Sequence[Score]) -> list[float]:
    return [score.value for score in scores]
