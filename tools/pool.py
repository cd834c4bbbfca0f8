"""A pool of compositions on disk, made once and shared by the autoencoder, the judges and the base model.

    python tools/pool.py [--chunks 30] [--pool .cache/pool]

Chunk k is a function of the seed and k alone: 2,000 images (uint8) in chunk-k.safetensors, their scenes in
chunk-k.json. A chunk that exists is kept, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from data import Atlas, Composer, Scene, Thing
from safetensors.torch import load_file, save_file
from torch import Tensor

CHUNK = 2000
POOL = Path(".cache/pool")


def make(folder: Path, chunk: int, composer: Composer, seed: int = 0) -> None:
    """Write one chunk; its scenes last, which makes it count as there."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [composer.compose(np.random.default_rng((seed, chunk, part)), 100) for part in range(CHUNK // 100)]
    images = torch.cat([part.images for part in samples]).mul(255).round().byte()
    save_file({"images": images}, folder / f"chunk-{chunk}.safetensors")
    scenes = [scene for part in samples for scene in part.scenes]
    draft = folder / f"chunk-{chunk}.part"
    draft.write_text(json.dumps([[*scene[:4], [list(thing) for thing in scene.things]] for scene in scenes]))
    draft.rename(folder / f"chunk-{chunk}.json")


def keep(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write what is made once, to a draft first: a kill leaves it absent, so that the next command makes it."""
    draft = path.with_suffix(".part")
    save_file(tensors, draft)
    draft.rename(path)


def images(folder: Path, chunks: Sequence[int]) -> Tensor:
    """(2000 per chunk, 3, 64, 64) uint8."""
    return torch.cat([load_file(folder / f"chunk-{chunk}.safetensors")["images"] for chunk in chunks])


def scenes(folder: Path, chunks: Sequence[int]) -> list[Scene]:
    """What the images of the same chunks show."""
    rows = [row for chunk in chunks for row in json.loads((folder / f"chunk-{chunk}.json").read_text())]
    return [Scene(*row[:4], [Thing(*thing) for thing in row[4]]) for row in rows]


def ready(folder: Path) -> list[int]:
    """The chunks that are there, in order."""
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("chunk-*.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--pool", type=Path, default=POOL)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    composer, there = Composer(Atlas.load()), set(ready(args.pool))
    for chunk in range(args.chunks):
        if chunk not in there:
            make(args.pool, chunk, composer, args.seed)
            print(f"chunk {chunk}", flush=True)


if __name__ == "__main__":
    main()
