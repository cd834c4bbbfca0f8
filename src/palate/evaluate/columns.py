"""Every measurement of single images by a panel: one column per metric, one row per image."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from palate.evaluate.metrics import CLOSED_FORM, Images, cross_prompt_duplicates, label_correct, position_correct
from palate.evaluate.panel import EvaluationPanel
from palate.runtime.errors import InputError
from palate.runtime.phases import tell
from palate.runtime.progress import counted


class Columns(NamedTuple):
    """What is measured per image, one column per metric."""

    values: dict[str, Tensor]  # name -> (N,), NaN where the question does not arise
    features: Tensor  # (N, D)
    styles: list[str]  # what the classifier saw; empty if it knows no styles
    failed: dict[str, dict[int, str]]  # reward/<name> -> image -> why it has no value


@dataclass
class Place:
    """Where a network of the panel looks at images, and at how many at once: as far as its memory goes."""

    name: str
    device: torch.device
    images: int

    def ask(self, look: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]) -> Tensor:
        """look(images, prompts), one row per image, on the CPU. Images that do not fit on the device are halved
        in number, down to one; one that does not fit is left to the CPU."""
        while True:
            try:
                parts = [
                    look(images[i : i + self.images].to(self.device), prompts[i : i + self.images]).cpu()
                    for i in range(0, len(images), self.images)
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError:
                if self.device.type == "cpu":
                    raise
            gc.collect()  # out here the error's frames are gone, and with them what did not fit
            torch.cuda.empty_cache()
            if (now := min(self.images, len(images))) > 1:
                self.images = now // 2
            else:
                logging.getLogger("palate").warning(
                    "%s: one image does not fit on %s; the CPU computes it, which is slow", self.name, self.device
                )
                self.device, self.images = torch.device("cpu"), len(images)


@torch.no_grad()
def columns_of(images: Images, prompts: Sequence[str], panel: EvaluationPanel, batch_size: int = 64) -> Columns:
    """Every per-image measurement, in batches; rewards and the classifier's features on the panel's device."""
    classifier = panel.classifier
    places = {name: Place(f"reward {name}", panel.device, batch_size) for name in panel.rewards}
    looks = Place("the images' features", panel.device, batch_size)
    parts: list[dict[str, Tensor]] = []
    features, styles = [], []
    failed: dict[str, dict[int, str]] = {}
    for start in range(0, len(images), batch_size):
        tell("judging", start, len(images))
        batch, words = images[start : start + batch_size], list(prompts[start : start + batch_size])
        part = {}
        for name, reward in panel.rewards.items():
            part[f"reward/{name}"], why = _call(name, partial(places[name].ask, reward), batch, words)
            failed.setdefault(f"reward/{name}", {}).update({start + i: text for i, text in why.items()})
        part |= {name: measure(batch) for name, measure in CLOSED_FORM.items()}
        seen = classifier.style(batch).long().cpu() if classifier.styles else torch.zeros(0)
        free = torch.ones(len(batch), dtype=torch.bool)
        if panel.parse is not None:
            free = torch.tensor([panel.parse(prompt).style is None for prompt in words])
            part |= _what_prompts_name(panel, batch, words, seen)
        for index, name in enumerate(classifier.styles):  # only where the prompt leaves the style open
            part[f"style/{name}"] = torch.where(free, (seen == index).double(), math.nan)
        parts.append({name: value.detach().double().cpu() for name, value in part.items()})
        seen_as = looks.ask(lambda images, _: classifier.features(images), batch, words)
        features.append(seen_as.detach().double())
        styles += [classifier.styles[int(i)] for i in seen]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values["copy"] = cross_prompt_duplicates(images, prompts)
    return Columns(values, torch.cat(features), styles, {name: why for name, why in failed.items() if why})


def _what_prompts_name(
    panel: EvaluationPanel, images: Tensor, prompts: Sequence[str], styles: Tensor
) -> dict[str, Tensor]:
    """Whether each image shows what its prompt names, (B,) per kind of name, and `correct`: all of it at once."""
    assert panel.parse is not None, "asked only of a panel that reads prompts"
    captions, classifier = [panel.parse(prompt) for prompt in prompts], panel.classifier
    right = {
        "concept": label_correct(classifier.concept(images), classifier.concepts, [c.concept for c in captions]),
        "style_named": label_correct(styles, classifier.styles, [c.style for c in captions]),
    }
    if panel.background is not None:
        right["background"] = label_correct(panel.background(images), panel.colours, [c.background for c in captions])
    if panel.position is not None:
        right["position"] = position_correct(panel.position(images), [c.position for c in captions])
    answers = torch.stack(list(right.values())).double()
    nothing = answers.isnan().all(0)
    return right | {"correct": torch.where(nothing, math.nan, (answers != 0).all(0).double())}


def _call(
    name: str, reward: Callable[[Tensor, list[str]], Tensor], images: Tensor, prompts: list[str]
) -> tuple[Tensor, dict[int, str]]:
    """A reward's values, NaN where it has none, and by image why: it raised ValueError, or gave a number that is not
    finite. An image that spoils its batch is found by asking for each alone; any other error is not about an image."""
    try:
        values = reward(images, prompts)
    except ValueError as error:
        if len(images) == 1:
            return torch.full((1,), math.nan), {0: str(error)[:300]}
        alone = [_call(name, reward, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))]
        return torch.cat([value for value, _ in alone]), {i: why[0] for i, (_, why) in enumerate(alone) if why}
    except (RuntimeError, OSError) as error:
        text = f"reward {name!r} failed on {counted(len(images), 'image')}, the first of {prompts[0]!r}: {error}"
        try:
            told = type(error)(text)
        except TypeError:  # a class of somebody else's, which takes more than a text
            raise RuntimeError(text) from error
        raise told from error
    if values.shape != (len(images),):
        raise InputError(
            f"reward {name!r} returned shape {tuple(values.shape)}; expected ({len(images)},), one value per image"
        )
    why = {int(i): f"the value {float(values[i])} is not finite" for i in (~values.isfinite()).nonzero()}
    return torch.where(values.isfinite(), values, math.nan), why


def leave_out_failures(sides: dict[str, Columns]) -> list[tuple[str, str, int, str]]:
    """Blank on every side the values that one side lacks, so that means and pairs are of the same images: (metric,
    side, image, why) of each."""
    failed = [(name, side, i, why) for side, columns in sides.items() for name, images in columns.failed.items()
              for i, why in images.items()]  # fmt: skip
    for name, _, i, _ in failed:
        for columns in sides.values():
            columns.values[name][i] = math.nan
    for name, side, i, why in failed:
        if all(bool(columns.values[name].isnan().all()) for columns in sides.values()):
            name = name.removeprefix("reward/")
            raise InputError(
                f"reward {name!r} failed on every image, in image {i} of the {side} because {why}; "
                "fix it or leave it out"
            )
    return failed
