"""Build the sprite atlas and the vocabulary from freely licensed drawings.

    python tools/build_atlas.py [--packages .cache/packages] [--assets FOLDER]

Fetches the packages with `npm pack` (names and versions below), draws every emoji of every concept in every style at
64 x 64 RGBA, one drawing per source, and writes atlas/{sprites.webp, sprites.json, vocabulary.json} below the assets.
Deterministic; a package already fetched is reused. sprites.json names concept, style and source of each drawing, and
its main colour (of the drawing as it came) where one colour covers most of it, so that it can be turned to another.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
import torch
from concepts import CONCEPTS
from data import ASSETS
from lexicon import COLOURS, COUNTS, GLUE, PAINTS, POSITIONS, RELATIONS, SIZES, SYNONYMS
from PIL import Image
from recolour import main_colour

SIZE = 64
COLUMNS = 32  # drawings per row of the sheet
PACKAGES = {  # source: (npm package, version, licence)
    "fluent-3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "fluent-line": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
    "phosphor": ("@iconify-json/ph", "1.2.2", "MIT"),
}
STYLES = {
    "3d": ["fluent-3d"],
    "flat": ["fluent-flat"],
    "cartoon": ["noto", "noto-v1"],
    "outline": ["fluent-line", "phosphor"],
}
NAMES = ("unicode-emoji-json", "0.9.0", "MIT")
KEYWORDS = ("cldr-annotations-full", "48.2.0", "Unicode-3.0")
REJECTED: dict[str, set[str]] = {  # drawings that show another thing than the concept's other drawings
    "phosphor": {"mouse", "pepper", "phone", "scooter"},
}


class Drawing(NamedTuple):
    concept: str
    style: str
    source: str  # "package/emoji or icon"
    image: Image.Image


def fetch(name: str, version: str, folder: Path) -> tarfile.TarFile:
    """The package as npm serves it, unpacked in memory."""
    archive = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return tarfile.open(archive)


def read_json(archive: tarfile.TarFile, member: str) -> dict:
    return json.load(archive.extractfile(member))


def fit(image: Image.Image) -> Image.Image:
    """The drawing without its margins, centred and filling SIZE x SIZE."""
    image = image.convert("RGBA").crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = SIZE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas


def coarse(image: Image.Image) -> Image.Image:
    """The drawing in steps of four, so at most two of 255 away from what it was: its file is a quarter smaller."""
    values = np.asarray(image).astype(np.int32)
    return Image.fromarray(((values + 2) // 4 * 4).clip(0, 255).astype(np.uint8))


def draw(icons: dict, name: str) -> Image.Image | None:
    """The icon of that name in an iconify set, 256 pixels on its longer side; None where the set lacks it."""
    icon = icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent", name))
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)))).convert("RGBA")


def rendered(archive: tarfile.TarFile, emoji: str) -> Image.Image | None:
    """The 3D render of an emoji, which its package files under the code points, with or without the selector."""
    codes = "-".join(f"{ord(c):04x}" for c in emoji)
    members = set(archive.getnames())
    for name in (codes, codes.replace("-fe0f", ""), codes + "-fe0f"):
        if (member := f"package/assets/{name}.webp") in members:
            return Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
    return None


def drawings(folder: Path) -> list[Drawing]:
    """Every drawing of every concept, in the order of concepts, styles and sources. KeyError for a style without."""
    emoji_of = {
        row["name"]: (emoji, row["slug"].replace("_", "-"))
        for emoji, row in read_json(fetch(*NAMES[:2], folder), "package/data-by-emoji.json").items()
    }
    archives = {source: fetch(name, version, folder) for source, (name, version, _) in PACKAGES.items()}
    icons = {s: read_json(archive, "package/icons.json") for s, archive in archives.items() if s != "fluent-3d"}
    found = []
    for concept, names in CONCEPTS.items():
        for style, sources in STYLES.items():
            before = len(found)
            for source in sources:
                if concept in REJECTED.get(source, ()):
                    continue
                if source == "phosphor":
                    pictures = [(f"{concept}-bold", draw(icons[source], f"{concept}-bold"))]
                elif source == "fluent-3d":
                    pictures = [(name, rendered(archives[source], emoji_of[name][0])) for name in names]
                else:
                    pictures = [(name, draw(icons[source], emoji_of[name][1])) for name in names]
                found += [Drawing(concept, style, f"{source}/{n}", fit(p)) for n, p in pictures if p is not None]
            if len(found) == before:
                raise KeyError(f"no drawing of {concept} in style {style}")
    return found


def keywords(folder: Path) -> dict[str, list[str]]:
    """Single words that CLDR files under the first emoji of each concept."""
    emoji_of = {row["name"]: e for e, row in read_json(fetch(*NAMES[:2], folder), "package/data-by-emoji.json").items()}
    cldr = read_json(fetch(*KEYWORDS[:2], folder), "package/annotations/en/annotations.json")
    cldr = cldr["annotations"]["annotations"]
    found = {}
    for concept, names in CONCEPTS.items():
        emoji = emoji_of[names[0]]
        entry = cldr.get(emoji) or cldr.get(emoji.replace("\ufe0f", "")) or {}
        words = [phrase.lower() for phrase in entry.get("default", []) if re.fullmatch(r"[A-Za-z]+", phrase)]
        found[concept] = [word for word in words if word != concept]
    return found


def synonyms(found: dict[str, list[str]]) -> dict[str, str]:
    """Word -> what it stands for: ours, and CLDR's where only one concept claims it ("fruit" names none)."""
    known = {*CONCEPTS, *STYLES, *COLOURS, *GLUE, *SIZES, *POSITIONS, *COUNTS, *RELATIONS}
    chosen = {word: target for target, words in SYNONYMS.items() for word in words if word not in known}
    counts: dict[str, int] = {}
    for words in found.values():
        for word in set(words):
            counts[word] = counts.get(word, 0) + 1
    for concept, words in found.items():
        chosen |= {w: concept for w in words if counts[w] == 1 and w not in known and w not in chosen and len(w) > 2}
    return dict(sorted(chosen.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path(".cache/packages"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()
    folder = args.assets / "atlas"
    folder.mkdir(parents=True, exist_ok=True)

    sprites = drawings(args.packages)
    sheet = Image.new("RGBA", (SIZE * COLUMNS, SIZE * -(-len(sprites) // COLUMNS)))
    rows = []
    for number, sprite in enumerate(sprites):
        sheet.paste(coarse(sprite.image), (SIZE * (number % COLUMNS), SIZE * (number // COLUMNS)))
        pixels = torch.from_numpy(np.asarray(sprite.image, dtype=np.float32) / 255).permute(2, 0, 1)
        colour = None if sprite.style == "outline" else main_colour(pixels)
        rows.append([sprite.concept, sprite.style, sprite.source, colour and [round(value, 4) for value in colour]])
    sheet.save(folder / "sprites.webp", lossless=True, quality=100, method=6, exact=False)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "sprites.json").write_text(f'{{"columns": {COLUMNS}, "sprites": [\n{lines}\n]}}\n')

    turnable = {
        style: {row[0] for row in rows if row[1] == style and row[3] is not None} for style in ("3d", "flat", "cartoon")
    }
    table = {
        "concepts": list(CONCEPTS),
        "styles": list(STYLES),
        "colours": COLOURS,
        "sizes": SIZES,
        "positions": POSITIONS,
        "glue": GLUE,
        "synonyms": synonyms(keywords(args.packages)),
        "counts": COUNTS,
        "relations": RELATIONS,
        "paints": PAINTS,
        "turnable": [concept for concept in CONCEPTS if all(concept in names for names in turnable.values())],
        "max_words": 20,
    }
    (folder / "vocabulary.json").write_text(json.dumps(table, indent=1) + "\n")
    print(
        f"{len(CONCEPTS)} concepts, {len(sprites)} drawings, {sum(row[3] is not None for row in rows)} of them can be "
        f"turned, {len(table['turnable'])} concepts in every style; {len(table['synonyms'])} synonyms -> {folder}"
    )


if __name__ == "__main__":
    main()
