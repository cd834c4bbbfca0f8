"""What the pictures of a recipe, captioned ones, pairs or single likes, ask of its algorithm."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from palate.core import ReadsImages
from palate.recipe.settings import AlgorithmSettings, PromptSettings


@runtime_checkable
class ReadsPairs(Protocol):
    """An algorithm that learns from preference pairs, if the attribute is true."""

    reads_pairs: bool


@runtime_checkable
class ChoosesLoss(Protocol):
    """Settings of an algorithm whose loss compares two pictures or, as "kto", judges each by itself."""

    @property
    def loss(self) -> str: ...


@runtime_checkable
class Pretrains(Protocol):
    """Settings of an algorithm that learns from given images with this weight."""

    @property
    def pretrain(self) -> float: ...


@runtime_checkable
class ComparesErrors(Protocol):
    """Settings of an algorithm with a safeguard, which as "output" compares the errors of a pair, as "parameters" the
    gradients of the network."""

    @property
    def safeguard(self) -> str: ...


@runtime_checkable
class TracksNoise(Protocol):
    """Settings of an algorithm that may noise each picture with the noise that it was made from, noise = "tracked"."""

    @property
    def noise(self) -> str: ...


def check_prompts(prompts: PromptSettings, mistakes: list[str]) -> None:
    """Add to `mistakes` what is wrong unless exactly one source of prompts is given."""
    sources = {"file": prompts.file, "list": prompts.list, "images": prompts.images, "pairs": prompts.pairs,
               "likes": prompts.likes}  # fmt: skip
    given = [f"prompts.{key}" for key, value in sources.items() if value is not None]
    if len(given) != 1:
        mistakes.append(
            f"prompts: give exactly one of {', '.join(f'prompts.{key}' for key in sources)}; got "
            f"{' and '.join(given) or 'none'}" + (f"; take one away, as {given[0]}=null" if given else "")
        )


def check_pictures(prompts: PromptSettings, settings: AlgorithmSettings, kind: Any, mistakes: list[str]) -> None:
    """Add to `mistakes` what an algorithm, a class with its settings, cannot do with the pictures that are given."""
    name, reads_pairs = settings.name, isinstance(kind, ReadsPairs) and kind.reads_pairs
    if prompts.pairs is not None and not reads_pairs:
        mistakes.append(f"prompts.pairs: {name} does not read pairs, only dpo does; give prompts.file")
    if prompts.likes is not None and not (reads_pairs and isinstance(settings, ChoosesLoss)):
        mistakes.append(
            f"prompts.likes: {name} does not read likes, only dpo with algorithm.loss=kto does; give prompts.file"
        )
    elif prompts.likes is not None and isinstance(settings, ChoosesLoss) and settings.loss != "kto":
        mistakes.append(
            f"prompts.likes: algorithm.loss={settings.loss} compares two pictures of a prompt, and a like is of one; "
            "set algorithm.loss=kto, or give prompts.pairs"
        )
    if prompts.likes is not None and isinstance(settings, ComparesErrors) and settings.safeguard == "output":
        mistakes.append(
            "algorithm.safeguard: output compares the two pictures of a pair, and a like is of one; set it to "
            "parameters or off"
        )
    given = "pairs" if prompts.pairs is not None else "likes" if prompts.likes is not None else ""
    if given and isinstance(settings, TracksNoise) and settings.noise == "tracked":
        mistakes.append(
            f"algorithm.noise: tracked needs the noise of each picture, which {given} lack; set it to fresh"
        )
    if prompts.images is not None and reads_pairs:
        mistakes.append(
            f"prompts.images: {name} reads pairs of images; give prompts.pairs, or prompts.file to draw them"
        )


def check_images_read(prompts: PromptSettings, settings: AlgorithmSettings, kind: Any, mistakes: list[str]) -> None:
    """Add to `mistakes` that the algorithm would not look at the captioned images that are given."""
    name = settings.name
    if prompts.images is None:
        return
    if isinstance(kind, ReadsImages) and not kind.reads_images:
        mistakes.append(
            f"prompts.images: {name} draws its own images; only srpo, and refl with algorithm.pretrain above 0, learn "
            "from given ones; give prompts.file or prompts.list"
        )
    elif isinstance(settings, Pretrains) and not settings.pretrain:
        mistakes.append(
            f"prompts.images: {name} learns from given images with algorithm.pretrain above 0 only; set it, or give "
            "prompts.file or prompts.list"
        )
