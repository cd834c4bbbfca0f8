"""The pictures that a recipe gives: which make a sample, in what order, and their latents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from palate.core import EncodesPictures, Model
from palate.data import Like, Pair, RecipeError, captioned_images, encode_images, preference_pairs, single_likes
from palate.data.buckets import Bucket, Size, assign
from palate.models.sizes import at_size
from palate.recipe.settings import Recipe
from palate.runtime.errors import InputError

ABSENT = -1  # in the place of a picture's number


@runtime_checkable
class SamplesPosterior(Protocol):
    """Settings of an algorithm that may draw latents from the encoder's Gaussian."""

    @property
    def posterior(self) -> bool: ...


@runtime_checkable
class MirrorsPairs(Protocol):
    """Settings of an algorithm that may train on every pair's mirror image as well."""

    @property
    def flip(self) -> bool: ...


@runtime_checkable
class KnowsTies(Protocol):
    """Settings of an algorithm that may learn from pairs without a preference."""

    @property
    def ties(self) -> str: ...


@runtime_checkable
class WeighsLikes(Protocol):
    """Settings of an algorithm in which a like and a dislike may count differently."""

    @property
    def desirable_weight(self) -> float: ...

    @property
    def undesirable_weight(self) -> float: ...


@dataclass(frozen=True)
class Pictures:
    """Given pictures: each file once, and the files of every sample, one or the preferred and the rejected one, of
    which one may be ABSENT."""

    captions: list[str]  # of each sample
    files: list[Path | bytes]
    samples: Sequence[tuple[int, ...]]
    mirrored: bool = False  # every sample's mirror image is a sample, too

    @property
    def prompts(self) -> list[str]:
        """One for each row of `latents`."""
        return self.captions * (2 if self.mirrored else 1)


def pictures_of(recipe: Recipe) -> Pictures | None:
    """Those of prompts.images, of prompts.pairs or of prompts.likes; None without any. Nothing is decoded.

    A liked picture is a preferred one without a rejected one, a disliked one the other way round. A tie that is kept
    stands there in both orders and every other pair twice, so that all weigh alike.
    """
    if recipe.prompts.images is not None:
        found = captioned_images(Path(recipe.prompts.images))
        return Pictures([text for _, text in found], [path for path, _ in found], [(k,) for k in range(len(found))])
    settings = recipe.algorithm
    mirrored = isinstance(settings, MirrorsPairs) and settings.flip
    if recipe.prompts.likes is not None:
        likes = kept_likes(recipe.prompts.likes, settings)
        sides = [(k, ABSENT) if one.like else (ABSENT, k) for k, one in enumerate(likes)]
        return Pictures([one.prompt for one in likes], [one.image for one in likes], sides, mirrored)
    if recipe.prompts.pairs is None:
        return None
    pairs = kept_pairs(recipe.prompts.pairs, settings)
    files: list[Path | bytes] = []
    captions, samples = [], []
    again = 2 if any(pair.preference == 0.5 for pair in pairs) else 1
    for k, pair in enumerate(pairs):
        files += [pair.first, pair.second]
        forth, back = (2 * k, 2 * k + 1), (2 * k + 1, 2 * k)
        orders = [forth if pair.preference > 0.5 else back] * again if pair.preference != 0.5 else [forth, back]
        samples += orders
        captions += [pair.prompt] * len(orders)
    return Pictures(captions, files, samples, mirrored)


def kept_pairs(source: str, settings: object) -> list[Pair]:
    """The pairs of a file that the algorithm learns from; says how many ties are left out.

    RecipeError: none is left.
    """
    pairs = list(preference_pairs(source))
    decided = [pair for pair in pairs if pair.preference != 0.5]
    ties = len(pairs) - len(decided)
    if ties and isinstance(settings, KnowsTies) and settings.ties == "equal":
        return pairs
    if not decided:
        raise RecipeError(f"prompts.pairs: {source} holds no pair with a preference")
    if ties:
        way = "; algorithm.ties=equal learns from them, too" if isinstance(settings, KnowsTies) else ""
        logging.getLogger("palate").warning(
            "prompts.pairs: %d of %d pairs are ties and are left out%s", ties, len(pairs), way
        )
    return decided


def kept_likes(source: str, settings: object) -> list[Like]:
    """The likes of a file; says so where all of them are of one kind, or one kind counts too little.

    RecipeError: there is none.
    """
    likes = list(single_likes(source))
    if not likes:
        raise RecipeError(f"prompts.likes: {source} holds no like")
    liked = sum(one.like for one in likes)
    said = logging.getLogger("palate").warning
    if liked in (0, len(likes)):
        here, missing = ("likes", "dislikes") if liked else ("dislikes", "likes")
        said(
            "prompts.likes: all %d are %s; with some %s as well it is learnt what makes the difference",
            len(likes), here, missing,
        )  # fmt: skip
    elif isinstance(settings, WeighsLikes) and (advice := rarer_weight(liked, len(likes) - liked, settings)):
        said("prompts.likes: %d likes and %d dislikes; KTO's authors let the rarer count more: %s",
             liked, len(likes) - liked, advice)  # fmt: skip
    return likes


def rarer_weight(liked: int, disliked: int, settings: WeighsLikes) -> str:
    """Which weight to set, and to what, for lambda_D n_D / (lambda_U n_U) to be in [1, 4/3] (KTO, arXiv 2402.01306,
    eq. 8); "" where it is, but for 1 % of rounding, and where likes and dislikes are as many."""
    desired, undesired = settings.desirable_weight * liked, settings.undesirable_weight * disliked
    if liked == disliked or 0.99 <= desired / undesired <= 1.35:
        return ""
    if liked < disliked:
        return f"algorithm.desirable_weight between {undesired / liked:.3g} and {4 / 3 * undesired / liked:.3g}"
    return f"algorithm.undesirable_weight between {0.75 * desired / disliked:.3g} and {desired / disliked:.3g}"


def latents_of(model: Model, pictures: Pictures, settings: object) -> Tensor:
    """(N, C, h, w) of images or (N, 2, C, h, w) of pairs and likes, encoded once; twice as many channels with
    posterior. An absent picture is NaN."""
    return _encoded(model, pictures, range(len(pictures.samples)), settings)


def buckets_of(model: Model, pictures: Pictures, settings: object, sizes: Sequence[Size]) -> list[Bucket]:
    """The samples of each of several sizes, encoded at it; each goes to the size that it loses the least to."""
    found, count = [], len(pictures.samples)
    for place, rows in assign(pictures.files, pictures.samples, sizes).items():
        with at_size(model, sizes[place], "prompts.sizes"):
            latents = _encoded(model, pictures, rows, settings)
        mirrored = [row + count for row in rows] if pictures.mirrored else []  # as `Pictures.prompts` has them
        found.append(Bucket(sizes[place], [*rows, *mirrored], latents))
    return found


def _encoded(model: Model, pictures: Pictures, rows: Sequence[int], settings: object) -> Tensor:
    """Latents of some samples at the model's size, then of their mirror images; a picture is encoded once for each."""
    if not isinstance(model, EncodesPictures):
        raise InputError(
            "prompts.images, prompts.pairs, prompts.likes: the model has no image_size to fit pictures to; give "
            "prompts.file"
        )
    posterior = isinstance(settings, SamplesPosterior) and settings.posterior
    used = sorted({k for row in rows for k in pictures.samples[row]} - {ABSENT})
    places, files = {k: place for place, k in enumerate(used)} | {ABSENT: len(used)}, [pictures.files[k] for k in used]
    chosen = torch.tensor([[places[k] for k in pictures.samples[row]] for row in rows])
    views: Sequence[bool] = (False, True) if pictures.mirrored else (False,)
    encoded = (encode_images(model, files, posterior=posterior, mirrored=view) for view in views)
    latents = torch.cat([torch.cat([found, torch.full_like(found[:1], torch.nan)])[chosen] for found in encoded])
    return latents[:, 0] if chosen.shape[1] == 1 else latents
