"""What the judges are trained on: the pool's images as samplers may leave them, and captions that are wrong of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pool
import torch
import torch.nn.functional as F
from data import Composer, Scene, Thing
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor

from palate.models.vocabulary import Caption, parse_prompt, plural, vocabulary
from palate.rewards.tasks import AXES

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)


def weather(images: Tensor, generator: torch.Generator, vae: AutoencoderTiny | None) -> Tensor:
    """Images as samplers may leave them: a third decoded, a third blurred, a third noisy, in all combinations."""

    def some(share: float) -> Tensor:
        return (torch.rand(len(images), 1, 1, 1, generator=generator) < share).float()

    if vae is not None:
        part = len(images) // 3
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            signed = (images[:part] * 2 - 1).contiguous(memory_format=torch.channels_last)
            latents = vae.encode(signed).latents.float()
            latents = latents + 0.2 * torch.rand(part, 1, 1, 1, generator=generator) * torch.randn(
                latents.shape, generator=generator
            )
            decoded = vae.decode(latents).sample.float().add(1).div(2).clamp(0, 1)
        images = torch.cat([decoded, images[part:]])
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, some(0.33) * torch.rand(len(images), 1, 1, 1, generator=generator))
    noise = 0.12 * torch.rand(len(images), 1, 1, 1, generator=generator) * some(0.33)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


class Shown(NamedTuple):
    """Weathered images of the pool and what they show."""

    images: Tensor  # (N, 3, 64, 64) uint8
    scenes: list[Scene]
    concept: Tensor  # (N,) of the first thing
    style: Tensor
    colour: Tensor

    @classmethod
    def of(cls, images: Tensor, scenes: list[Scene]) -> Shown:
        rows = [(scene.things[0].concept, scene.style, scene.background) for scene in scenes]
        return cls(images, scenes, *torch.tensor(rows).unbind(1))

    def take(self, rows: Sequence[int] | np.ndarray) -> Shown:
        rows = list(rows)
        return Shown.of(self.images[rows], [self.scenes[k] for k in rows])

    def with_fresh(self, composer: Composer, count: int, rng: np.random.Generator) -> Shown:
        """These and `count` composed anew, weathered but for the autoencoder: no pool is large enough to be the only
        source. A judge of 32,000 images is right on all of them and on .89 of fresh ones."""
        drawn = composer.compose(rng, count)
        images = weather(drawn.images, torch.Generator().manual_seed(int(rng.integers(2**31))), None)
        images = torch.cat([self.images, images.mul(255).round().byte()])
        return Shown.of(images, self.scenes + drawn.scenes)


@torch.no_grad()
def weathered(folder: Path, chunks: Sequence[int], vae_folder: Path, store: Path) -> Shown:
    """The pool's images, weathered once and kept per chunk; a third of them are decoded by the autoencoder."""
    store.mkdir(parents=True, exist_ok=True)
    vae, found = None, []
    for chunk in chunks:
        if not (path := store / f"weathered-{chunk}.safetensors").exists():
            vae = vae or AutoencoderTiny.from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
            generator = torch.Generator().manual_seed(chunk)
            order = torch.randperm(pool.CHUNK, generator=generator)
            clean = pool.images(folder, [chunk])[order].float() / 255
            images = torch.cat([weather(part, generator, vae).mul(255).round().byte() for part in clean.split(120)])
            pool.keep(path, {"images": images[order.argsort()]})
        found.append(load_file(path)["images"])
    return Shown.of(torch.cat(found), pool.scenes(folder, chunks))


def varied(part: Shown, rng: np.random.Generator) -> Shown:
    """The images moved by up to three pixels, half of them in the mirror, half of them nearer or further away, with
    what they then show."""
    count = len(part.scenes)
    turned = rng.random(count) < 0.5
    zoom = np.where(rng.random(count) < 0.5, rng.uniform(0.85, 1.1, count), 1.0)
    shift = rng.integers(-3, 4, (count, 2)) / 32  # of half the image's side
    sign = np.where(turned, -1.0, 1.0)
    back = np.zeros((count, 2, 3))  # from where a pixel is to where it was
    back[:, 0, 0], back[:, 1, 1] = sign / zoom, 1 / zoom
    back[:, 0, 2], back[:, 1, 2] = -sign * shift[:, 0] / zoom, -shift[:, 1] / zoom
    grid = F.affine_grid(torch.from_numpy(back).float(), list(part.images.shape), align_corners=False)
    images = F.grid_sample(part.images.float(), grid, padding_mode="border", align_corners=False).round().byte()
    rows = zip(part.scenes, sign.tolist(), zoom.tolist(), shift.tolist(), strict=True)
    return part._replace(images=images, scenes=[_moved(scene, *how) for scene, *how in rows])


def _moved(scene: Scene, sign: float, zoom: float, shift: list[float]) -> Scene:
    """The scene, mirrored where sign is -1, then zoomed and shifted; its caption names the other side then."""
    things = [
        thing._replace(
            x=sign * zoom * thing.x + shift[0],
            y=zoom * thing.y + shift[1],
            scale=zoom * thing.scale,
            angle=sign * thing.angle,
            flip=thing.flip != (sign < 0),
        )
        for thing in scene.things
    ]
    caption = scene.caption
    if sign < 0:
        caption = re.sub(r"\b(left|right)\b", lambda side: {"left": "right", "right": "left"}[side[1]], caption)
    return scene._replace(things=things, caption=caption)


@cache
def read(caption: str) -> Caption:
    return parse_prompt(caption)


def true_of(captions: list[str], shown: Shown) -> Tensor:
    """(images, captions) bool: every thing the caption names is so in the image."""
    vocab, parsed = vocabulary(), [read(caption) for caption in captions]
    colours = list(vocab.colours)
    concept = torch.tensor([vocab.concepts.index(c.concept) for c in parsed])
    style = torch.tensor([vocab.styles.index(c.style) if c.style else -1 for c in parsed])
    colour = torch.tensor([colours.index(c.background) if c.background else -1 for c in parsed])
    there = torch.zeros(len(shown.scenes), len(vocab.concepts), dtype=torch.bool)
    for n, scene in enumerate(shown.scenes):
        there[n, [thing.concept for thing in scene.things]] = True
    maybe = (
        there[:, concept]
        & ((style == -1) | (shown.style[:, None] == style))
        & ((colour == -1) | (shown.colour[:, None] == colour))
    )
    for n, k in maybe.nonzero().tolist():  # few: the rest is looked at one by one
        maybe[n, k] = bool(_all_true(parsed[k], shown.scenes[n]))
    return maybe


def _all_true(caption: Caption, scene: Scene) -> bool:
    """Things, colours, number, relation, side and size; where the scene leaves it open, as true."""
    vocab = vocabulary()
    colours, things = list(vocab.colours), scene.things

    def found(concept: str | None, paint: str | None) -> list[Thing]:
        same = [thing for thing in things if vocab.concepts[thing.concept] == concept]
        return [t for t in same if paint is None or t.paint is None or colours[t.paint] == paint]

    first = found(caption.concept, caption.paint)
    if not first or (caption.number and len(first) != caption.number):
        return False
    place = (first[0].x, first[0].y)
    if caption.position:
        axis, sign = AXES[{"top": "above", "bottom": "below"}.get(caption.position, caption.position)]
        if sign * place[axis] < 0.05:
            return False
    if caption.size and len(things) == 1 and (caption.size == "small") != (first[0].scale < 0.66):
        return False
    if caption.second:
        second = found(*caption.second)
        if not second:
            return False
        if caption.relation:
            axis, sign = AXES[caption.relation]
            return sign * (place[axis] - (second[0].x, second[0].y)[axis]) > 0.1
    return True


def wrong(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The scene's caption with a wrong style, a wrong background, a wrong concept, and something else that is wrong:
    the thing's colour, the number, the side, or the colours or places of two things exchanged."""
    vocab, caption = vocabulary(), scene.caption
    seen, true = read(caption), (vocab.styles[scene.style], list(vocab.colours)[scene.background])

    def other(among: Sequence[str], *than: str) -> str:
        return str(rng.choice([word for word in among if word not in than]))

    def swapped(text: str, one: str, two: str) -> str:
        return re.sub(rf"\b({one}|{two})", lambda m: two if m[1] == one else one, text)

    style = other(vocab.styles, true[0])
    styled = re.sub(rf"\b{true[0]}\b", style, caption) if seen.style else f"{style}. {caption}"
    colour = other(list(vocab.colours), true[1])
    if seen.background:
        head, _, tail = caption.rpartition(true[1])
        behind = f"{head}{colour}{tail}"
    else:
        behind = f"{caption} on a {colour} background"
    names = {vocab.concepts[thing.concept] for thing in scene.things}
    concept = other(vocab.concepts, *names)
    told = plural(seen.concept) if seen.number else seen.concept
    another = re.sub(rf"\b{told}\b", plural(concept) if seen.number else concept, caption, count=1)
    options = []
    if seen.paint and seen.second and seen.second.paint and seen.paint != seen.second.paint:
        options.append(swapped(caption.partition(" on ")[0], seen.paint, seen.second.paint))
    if seen.paint:
        options.append(caption.replace(f"{seen.paint} ", f"{other(vocab.paints, seen.paint)} ", 1))
    if seen.number:
        now = vocab.counts[seen.number - 2]
        options.append(caption.replace(now, other(vocab.counts, now), 1))
    side = seen.relation or seen.position
    opposite = {"left": "right", "above": "below", "top": "bottom"}
    opposite |= {b: a for a, b in opposite.items()}
    if side:
        options.append(re.sub(rf"\b{side}\b", opposite[side], caption, count=1))
    if not options:
        options.append(re.sub(rf"\b{told}\b", other(vocab.concepts, *names), caption, count=1))
    return [styled, behind, another, str(rng.choice(options))]
