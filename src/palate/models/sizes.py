"""Another image size for a while: train small and judge large, or train on several sizes in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from palate.core import DrawsOtherSizes, Model
from palate.models.facts import Facts
from palate.models.latents import ImageSize, factor_of, latent_shape, sides
from palate.runtime.errors import InputError

if TYPE_CHECKING:  # it loads diffusers, which whoever only looks at a size must not wait for
    from palate.models.repository import Repository


def shape_of(repository: Repository, facts: Facts, image_size: ImageSize) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of that size. InputError: the patches or the positions do not cover it."""
    denoiser, vae = repository.config(facts.denoiser), repository.config("vae")
    patch = facts.patch or denoiser.get("patch_size") or 1
    shape = latent_shape(vae, image_size, family=facts.name, patch=patch, fold=facts.layout.fold)
    if facts.largest is not None and max(shape[1:]) > (most := facts.largest(denoiser)):
        pixels = most * factor_of(vae) * facts.layout.fold
        raise InputError(f"model.image_size got {image_size}; this network's positions end at {pixels} pixels")
    return shape


class OtherSizes:
    """The part of a family over a diffusers folder that lets it draw other sizes: `palate.core.DrawsOtherSizes`."""

    parts: Any
    weights: Any
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]

    def shape_at(self, image_size: ImageSize) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of that size. InputError: the family cannot draw it."""
        return shape_of(self.parts.repository, self.parts.facts, image_size)

    @contextmanager
    def at_size(self, image_size: ImageSize) -> Iterator[None]:
        """Inside, noise, times and the network's call are those of that size, in pixels."""
        before = self.latent_shape, self.image_size
        self.latent_shape, self.image_size = self.shape_at(image_size), sides(image_size)
        try:
            yield
        finally:
            self.latent_shape, self.image_size = before


@contextmanager
def at_size(model: Model, image_size: ImageSize | None, key: str = "sample.image_size") -> Iterator[None]:
    """Inside, the model draws that size; None = its own. InputError: it has one size only, or cannot have that one."""
    if image_size is None:
        yield
        return
    if not isinstance(model, DrawsOtherSizes):
        raise InputError(f"{key}: {type(model).__name__} draws one size only; leave it out")
    try:
        size = model.at_size(image_size)
        with size:
            yield
    except InputError as error:
        raise InputError(str(error).replace("model.image_size", key)) from error


def largest(sizes: Any) -> ImageSize | None:
    """The size with the most pixels of a list of sizes; None for an empty one."""
    return max(sizes, key=lambda size: sides(size)[0] * sides(size)[1], default=None)
