"""Train the embedded detector on compositions: which things stand where, how large and in which colour.

    python tools/train_detector.py [--minutes 30]

Loss: focal loss of the middles (a Gaussian around each), cross-entropy of thing and colour and L1 of place at the cell
of each middle. A drawing in its own colours counts as red, blue, ... where most of it is (`nearest_paint`), as "none"
where nothing is coloured, and teaches nothing about colour in between. Half of each batch is composed afresh, and all
scenes are moved and mirrored at random (`shown.varied`). The same command resumes, and --minutes counts in all. At the
end it is checked on 2,000 compositions that no training saw.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pool
import torch
import torch.nn.functional as F
from data import ASSETS, Atlas, Composer, Scene, Thing
from progress import Progress
from recolour import to_oklab
from shown import varied, weathered
from torch import Tensor

from palate.models.vocabulary import vocabulary
from palate.rewards.detector import GRID, Cells, Detection, Detector

UNKNOWN = -100  # cross_entropy's own word for "no lesson"


def nearest_paint(main: Tensor, paints: Tensor) -> int:
    """Index of the paint (K, 3 sRGB) that a main colour (lightness, chroma, hue) is, or UNKNOWN where it is between."""
    if main.isnan().any():
        return UNKNOWN
    goals = to_oklab(paints[:, :, None, None])[..., 0, 0]
    own = torch.stack([main[0], main[1] * main[2].cos(), main[1] * main[2].sin()])
    apart = (goals - own).norm(dim=1)
    first, second = apart.topk(2, largest=False).values
    return int(apart.argmin()) if first < 0.6 * second and first < 0.12 else UNKNOWN


class Lessons:
    """The truth of scenes, as the network is to say it."""

    def __init__(self, atlas: Atlas):
        vocab = vocabulary()
        palette = torch.tensor(list(vocab.colours.values()), dtype=torch.float32) / 255
        colours = list(vocab.colours)
        self.paints = [colours.index(name) for name in vocab.paints]
        own = [nearest_paint(main, palette[self.paints]) for main in atlas.main]
        ink = (atlas.pixels[:, :3].amax((1, 2, 3)) == 0).tolist()  # line art in its own ink is black or white
        self.own = [len(self.paints) if line else paint for line, paint in zip(ink, own, strict=True)]

    def paint(self, thing: Thing) -> int:
        """Index among the paints, their number for none, or UNKNOWN."""
        return self.own[thing.drawing] if thing.paint is None else self.paints.index(thing.paint)

    def middles(self, scenes: Sequence[Scene]) -> Tensor:
        """(B, 16, 16): 1 at the cell of each middle, falling as a Gaussian around it."""
        centre = torch.arange(GRID) + 0.5
        maps = torch.zeros(len(scenes), GRID, GRID)
        for n, scene in enumerate(scenes):
            for thing in scene.things:
                column, row = _cell(thing)
                width = 0.7 + 0.9 * thing.scale
                x, y = (((centre - at - 0.5) / width).square() for at in (column, row))
                maps[n] = torch.maximum(maps[n], (-0.5 * (y[:, None] + x)).exp())
        return maps


def _cell(thing: Thing) -> tuple[int, int]:
    column, row = (min(GRID - 1, max(0, math.floor((at + 1) / 2 * GRID))) for at in (thing.x, thing.y))
    return column, row


def losses(cells: Cells, scenes: Sequence[Scene], lessons: Lessons) -> dict[str, Tensor]:
    """Focal loss per thing, and the others' means over things."""
    goal = lessons.middles(scenes)
    rows = [(n, thing, *_cell(thing)) for n, scene in enumerate(scenes) for thing in scene.things]
    index = torch.tensor([(n, row, column) for n, _, column, row in rows]).unbind(1)
    sure = cells.middle.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    there = goal == 1
    focal = torch.where(there, (1 - sure).square() * sure.log(), (1 - goal) ** 4 * sure.square() * (1 - sure).log())
    place = torch.tensor(
        [[(t.x + 1) / 2 * GRID - column - 0.5, (t.y + 1) / 2 * GRID - row - 0.5, t.scale] for _, t, column, row in rows]
    )
    n, row, column = index
    return {
        "middle": -focal.sum() / len(rows),
        "concept": F.cross_entropy(
            cells.concept[n, :, row, column].float(), torch.tensor([t.concept for _, t, _, _ in rows])
        ),
        "paint": F.cross_entropy(
            cells.paint[n, :, row, column].float(), torch.tensor([lessons.paint(t) for _, t, _, _ in rows])
        ),
        "place": F.l1_loss(cells.place[n, :, row, column].float(), place),
    }


def check(detector: Detector, lessons: Lessons, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """How often it is right: number of things; concept, colour (where it has one name) and relation of those found."""
    names, right = vocabulary().concepts, {"number": [], "number of kind": [], "found": [], "paint": [], "side": []}
    for part in torch.arange(len(images)).split(100):
        for n, found in zip(part.tolist(), detector.detect(images[part]), strict=True):
            things = scenes[n].things
            right["number"].append(len(found) == len(things))
            if scenes[n].kind == "count":
                name = names[things[0].concept]
                right["number of kind"].append(sum(d.concept == name for d in found) == len(things))
            for thing in things:
                match = _nearest(thing, found)
                right["found"].append(match is not None and match.concept == names[thing.concept])
                if match and (paint := lessons.paint(thing)) != UNKNOWN:
                    told = detector.paints.index(match.paint) if match.paint else len(detector.paints)
                    right["paint"].append(told == paint)
            if len(things) == 2 and scenes[n].kind == "two":
                pair = [next((d for d in found if d.concept == names[t.concept]), None) for t in things]
                axis = int(abs(things[0].x - things[1].x) < abs(things[0].y - things[1].y))
                true, told = ([(t.x, t.y)[axis] for t in some] for some in (things, pair)) if all(pair) else ([0], [])
                right["side"].append(bool(told) and (true[0] < true[1]) == (told[0] < told[1]))
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def _nearest(thing: Thing, found: Sequence[Detection]) -> Detection | None:
    near = min(found, key=lambda d: (d.x - thing.x) ** 2 + (d.y - thing.y) ** 2, default=None)
    return near if near and abs(near.x - thing.x) + abs(near.y - thing.y) < 0.35 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--chunks", type=int, help="of the pool, 2,000 images each; all if left out")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--pool", type=Path, default=pool.POOL)
    parser.add_argument("--vae", type=Path, default=Path(".cache/autoencoder/vae"))
    parser.add_argument("--work", type=Path, default=Path(".cache/rewards"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vocab, atlas = vocabulary(), Atlas.load()
    lessons, composer = Lessons(atlas), Composer(atlas)
    shown = weathered(args.pool, pool.ready(args.pool)[: args.chunks], args.vae, args.work / "weathered")
    detector = Detector(vocab.concepts, vocab.paints).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=args.lr, weight_decay=0.02)
    run = Progress(args.work / "detector.pt", {"detector": detector, "optimizer": optimizer}, args.minutes)
    for step in run:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * (0.51 + 0.49 * math.cos(math.pi * run.share))
        rng = np.random.default_rng((args.seed, step))
        part = shown.take(rng.integers(len(shown.scenes), size=args.batch - args.batch // 2))
        part = varied(part.with_fresh(composer, args.batch // 2, rng), rng)
        images = (part.images.float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            cells = detector(images)
        terms = losses(cells, part.scenes, lessons)
        loss = terms["middle"] + terms["concept"] + terms["paint"] + 2 * terms["place"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        run.log(terms)
    detector.save(args.assets / "detector")
    fresh = composer.compose(np.random.default_rng((99, 1)), 2000)
    print(check(Detector.load(args.assets / "detector"), lessons, fresh.images, fresh.scenes), flush=True)


if __name__ == "__main__":
    main()
