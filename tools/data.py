"""Training data of the embedded assets: drawings composed on named backgrounds, with captions, made as they are needed.

Whatever a caption does not name is random: style, background, size, position, pose, the drawing among several of one
concept, and its colour. What can be named is what the atlas' vocabulary can say. Everything is a function of a seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from atlas import ASSETS, SIZE, Atlas, Samples, Scene, Thing, held_out_pairs, save_grid
from recolour import turn
from torch import Tensor

from palate.models.vocabulary import parse_prompt, plural, vocabulary

__all__ = ["ASSETS", "Atlas", "Composer", "Samples", "Scene", "Thing", "held_out_pairs", "save_grid"]

STYLE_PRIOR = {"3d": 0.14, "flat": 0.56, "cartoon": 0.15, "outline": 0.15}  # of captions without a style: default taste
SMALL, LARGE, UNNAMED = (0.42, 0.56), (0.80, 0.94), (0.62, 0.92)  # side of the drawing / side of the image
PAIRED, COUNTED = (0.42, 0.50), {2: (0.42, 0.50), 3: (0.38, 0.46), 4: (0.37, 0.44)}
TURNED = 0.3  # of the drawings that can be turned and whose colour is not named
TILTED, TILT = 0.35, math.radians(20)
MIX = {"one": 0.64, "two": 0.19, "count": 0.17}
WORDS = {2: "two", 3: "three", 4: "four"}


def describe(
    rng: np.random.Generator,
    subject: str,
    article: str,
    *,
    style: str | None,
    background: str | None,
    size: str | None = None,
    position: str | None = None,
    prefix: float = 0.2,
) -> str:
    """One of several ways to say it. `prefix` is how often the style stands in front as a control word."""
    words = [w for w in (size, style) if w]
    front, tail = "", f" at the {position}" if position else ""
    if style and rng.random() < prefix:
        words.remove(style)
        front = f"{style}. "
    elif style and rng.random() < 0.25:
        words.remove(style)
        tail += f", {style} style"
    if background:
        tail += f" on a {background} background" if rng.random() < 0.7 else f" on {background}"
    return f"{front}{article}{' '.join([*words, subject])}{tail}"


class Composer:
    """Draws scenes from the atlas, each with a caption that is true of it."""

    def __init__(
        self,
        atlas: Atlas,
        *,
        exclude: set[tuple[int, int]] = frozenset(),
        name_style: float = 0.7,
        prefix: float = 0.2,
        mix: dict[str, float] | None = None,
    ):
        self.atlas, self.vocab, self.exclude = atlas, vocabulary(), exclude
        self.name_style, self.prefix = name_style, prefix
        self.mix = (mix or MIX) if self.vocab.counts else {"one": 1.0}
        self.colours = list(self.vocab.colours)
        self.paints = [self.colours.index(name) for name in self.vocab.paints]
        self.prior = np.array([STYLE_PRIOR[style] for style in self.vocab.styles])

    def scene(self, rng: np.random.Generator) -> Scene:
        """One scene: of one thing, of two things, or of two to four of a kind."""
        kind = str(rng.choice(list(self.mix), p=np.array(list(self.mix.values())) / sum(self.mix.values())))
        named = rng.random() < self.name_style
        style = int(rng.integers(len(self.prior))) if named else int(rng.choice(len(self.prior), p=self.prior))
        background = int(rng.integers(len(self.colours)))
        name = {
            "style": self.vocab.styles[style] if named else None,
            "background": self.colours[background] if rng.random() < 0.75 else None,
            "prefix": self.prefix,
        }
        draw = {"one": self._one, "two": self._two, "count": self._count}[kind]
        caption, things = draw(rng, style, background, name)
        return Scene(kind, caption, style, background, things)

    def _concept(self, rng: np.random.Generator, style: int, others: tuple[int, ...] = ()) -> int:
        while True:
            concept = int(rng.integers(len(self.vocab.concepts)))
            if (concept, style) not in self.exclude and concept not in others:
                return concept

    def _drawing(
        self, rng: np.random.Generator, concept: int, style: int, background: int, chance: float
    ) -> tuple[int, int | None, str]:
        """A drawing, the colour it is turned to, and the word for that if the caption is to name it."""
        able = self.atlas.turnable.get((concept, style), [])
        named = bool(able) and rng.random() < chance
        drawing = int(rng.choice(able if named else self.atlas.rows[concept, style]))
        free = [paint for paint in self.paints if paint != background]
        line = self.vocab.styles[style] == "outline"
        if named or (drawing in able and rng.random() < TURNED * (0.5 if line else 1)):
            paint = int(rng.choice(free))
            return drawing, paint, f"{self.colours[paint]} " if named else ""
        return drawing, None, ""

    def _pose(self, rng: np.random.Generator) -> tuple[float, bool]:
        return (rng.uniform(-TILT, TILT) if rng.random() < TILTED else 0.0), bool(rng.random() < 0.5)

    def fulfil(self, rng: np.random.Generator, prompt: str) -> Scene:
        """A scene of one thing as the prompt asks for: concept, style and background; the rest is random."""
        asked = parse_prompt(prompt)
        style = self.vocab.styles.index(asked.style) if asked.style else int(rng.choice(len(self.prior), p=self.prior))
        background = self.colours.index(asked.background) if asked.background else int(rng.integers(len(self.colours)))
        while True:
            name = {"style": None, "background": None, "prefix": 0.0}
            _, things = self._one(rng, style, background, name, self.vocab.concepts.index(asked.concept))
            if asked.paint is None or things[0].paint == self.colours.index(asked.paint):
                return Scene("one", prompt, style, background, things)

    def _one(
        self, rng: np.random.Generator, style: int, background: int, name: dict, concept: int | None = None
    ) -> tuple[str, list[Thing]]:
        concept = self._concept(rng, style) if concept is None else concept
        drawing, paint, colour = self._drawing(rng, concept, style, background, 0.3)
        size = [*self.vocab.sizes, None, None, None, None, None][rng.integers(7)]
        position = str(rng.choice(self.vocab.positions)) if rng.random() < 0.3 else None
        low, high = SMALL if size == "small" else LARGE if size == "large" else UNNAMED
        scale = rng.uniform(low, min(high, 0.78) if position and size != "large" else high)
        room = 1 - scale
        x, y = rng.uniform(-room, room, 2)
        edge = rng.uniform(0.85, 1.0) * max(room, 0.24)
        if position in ("left", "right"):
            x = edge * (-1 if position == "left" else 1)
        if position in ("top", "bottom"):
            y = edge * (-1 if position == "top" else 1)
        article = "a " if rng.random() < 0.6 else ""
        subject = colour + self.vocab.concepts[concept]
        caption = describe(rng, subject, article, size=size, position=position, **name)
        return caption, [Thing(concept, drawing, paint, x, y, scale, *self._pose(rng))]

    def _two(self, rng: np.random.Generator, style: int, background: int, name: dict) -> tuple[str, list[Thing]]:
        first = self._concept(rng, style)
        second = self._concept(rng, style, (first,))
        chance = 0.5 if rng.random() < 0.4 else 0.0  # colours are named in four scenes of ten, often both
        chance = 1.0 if chance and rng.random() < 0.6 else chance
        drawn = [self._drawing(rng, concept, style, background, chance) for concept in (first, second)]
        scales = rng.uniform(*PAIRED, 2)
        side = str(rng.choice(["left", "right", "above", "below"]))
        sign, across = (-1 if side in ("left", "above") else 1), rng.uniform(-0.42, 0.42, 2)
        gap = scales.sum() / 2 + rng.uniform(0.0, max(0.0, 1 - scales.sum()))  # between the middles, of the image
        shift = rng.uniform(-1, 1) * max(0.0, 1 - gap - scales.sum() / 2)
        along = np.array([sign * gap, -sign * gap]) + shift
        places = [(a, c) if side in ("left", "right") else (c, a) for a, c in zip(along, across, strict=True)]
        things = [
            Thing(concept, drawing, paint, *place, float(scale), *self._pose(rng))
            for concept, (drawing, paint, _), place, scale in zip((first, second), drawn, places, scales, strict=True)
        ]
        subjects = [word + self.vocab.concepts[c] for c, (_, _, word) in zip((first, second), drawn, strict=True)]
        articles = ["a ", "a "] if rng.random() < 0.7 else ["", ""]
        if rng.random() < 0.4:
            between = "and"
        elif side in ("above", "below"):
            between = side
        else:
            between = f"to the {side} of" if rng.random() < 0.8 else f"{side} of"
        subject = f"{subjects[0]} {between} {articles[1]}{subjects[1]}"
        return describe(rng, subject, articles[0], **name), things

    def _count(self, rng: np.random.Generator, style: int, background: int, name: dict) -> tuple[str, list[Thing]]:
        number, concept = int(rng.integers(2, 5)), self._concept(rng, style)
        drawing, paint, colour = self._drawing(rng, concept, style, background, 0.3)
        scale = rng.uniform(*COUNTED[number])
        angle, flip = self._pose(rng)
        things = [Thing(concept, drawing, paint, x, y, scale, angle, flip) for x, y in self._places(rng, number, scale)]
        subject = f"{colour}{plural(self.vocab.concepts[concept])}"
        return describe(rng, f"{subject}", f"{WORDS[number]} ", **name), things

    def _places(self, rng: np.random.Generator, number: int, scale: float) -> list[tuple[float, float]]:
        """Middles of `number` squares of that side, in the image and not over each other."""
        grid = [(-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)]
        if number == 4:
            places = np.array(grid)
        elif number == 3:
            places = np.array([[(-0.5, -0.5), (0.5, -0.5), (0, 0.5)], [(0, -0.5), (-0.5, 0.5), (0.5, 0.5)]])
            places = places[rng.integers(2)] if rng.random() < 0.7 else np.array(grid)[rng.permutation(4)[:3]]
        else:
            places = np.array([[(-0.5, 0), (0.5, 0)], [(0, -0.5), (0, 0.5)], [grid[0], grid[3]], [grid[1], grid[2]]])
            places = places[rng.choice(4, p=[0.4, 0.3, 0.15, 0.15])]
        jitter = max(0.0, 0.5 - scale)
        return [(x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)) for x, y in places]

    def compose(self, rng: np.random.Generator, count: int) -> Samples:
        """`count` fresh images with captions and what is in them."""
        scenes = [self.scene(rng) for _ in range(count)]
        return Samples(
            self.paint(scenes),
            [scene.caption for scene in scenes],
            torch.tensor([scene.things[0].concept for scene in scenes]),
            torch.tensor([scene.style for scene in scenes]),
            torch.tensor([scene.background for scene in scenes]),
            scenes,
        )

    def paint(self, scenes: list[Scene]) -> Tensor:
        """The images (N, 3, 64, 64) of scenes; drawn at twice the size and halved, so that edges are smooth."""
        palette = torch.tensor(list(self.vocab.colours.values()), dtype=torch.float32) / 255
        owner = [n for n, scene in enumerate(scenes) for _ in scene.things]
        things = [thing for scene in scenes for thing in scene.things]
        background = palette[[scene.background for scene in scenes]]
        layers = self._layers(things, [scenes[n] for n in owner], palette)
        images = background[:, :, None, None].repeat(1, 1, SIZE, SIZE)
        for n, layer in zip(owner, layers, strict=True):
            images[n] = layer[:3] + (1 - layer[3]) * images[n]
        return images.clamp(0, 1)

    def _layers(self, things: list[Thing], scenes: list[Scene], palette: Tensor) -> Tensor:
        """Premultiplied RGBA (things, 4, 64, 64): each in its colour, place and pose."""
        drawings = self.atlas.pixels[[thing.drawing for thing in things]]
        line = torch.tensor([self.vocab.styles[scene.style] == "outline" for scene in scenes])
        turned = torch.tensor([thing.paint is not None for thing in things])
        goal = palette[[thing.paint or 0 for thing in things]]
        dark = palette @ torch.tensor([0.299, 0.587, 0.114]) < 0.45  # line art is drawn white on dark colours
        white = dark[[scene.background for scene in scenes]].float()[:, None].expand(-1, 3)
        ink = torch.where(turned[:, None], goal, white)
        drawings = torch.where(line[:, None, None, None], _inked(drawings, ink), drawings)
        if (recolour := turned & ~line).any():
            main = self.atlas.main[[thing.drawing for thing in things]]
            drawings[recolour] = turn(drawings[recolour], main[recolour], goal[recolour])
        drawings = torch.cat([drawings[:, :3] * drawings[:, 3:], drawings[:, 3:]], 1)
        theta = torch.stack([_placement(thing) for thing in things])
        grid = F.affine_grid(theta, [len(things), 4, 2 * SIZE, 2 * SIZE], align_corners=False)
        return F.avg_pool2d(F.grid_sample(drawings, grid, align_corners=False), 2)


def _inked(drawings: Tensor, ink: Tensor) -> Tensor:
    return torch.cat([ink[:, :, None, None].expand(-1, -1, SIZE, SIZE), drawings[:, 3:]], 1)


def _placement(thing: Thing) -> Tensor:
    """Output coordinates -> coordinates of the drawing, (2, 3) as affine_grid wants it."""
    cos, sin = math.cos(thing.angle) / thing.scale, math.sin(thing.angle) / thing.scale
    matrix = torch.tensor([[cos, sin], [-sin, cos]])
    if thing.flip:
        matrix[0] *= -1
    return torch.cat([matrix, -(matrix @ torch.tensor([[thing.x], [thing.y]], dtype=torch.float32))], 1)
