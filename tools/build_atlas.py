"""Build the sprite atlas and the vocabulary from freely licensed emoji packages.

    python tools/build_atlas.py [--packages .cache/packages]

Fetches the packages with `npm pack` (names and versions below), draws every concept in every style at 64 x 64 RGBA
and writes src/palate/assets/atlas/{sprites.webp, vocabulary.json}. Deterministic; a package already fetched is reused.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import resvg_py
from concepts import CONCEPTS
from PIL import Image

ASSETS = Path(__file__).parent.parent / "src/palate/assets/atlas"
SIZE = 64
PACKAGES = {  # style: (npm package, version, licence)
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "cartoon": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "outline": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
}
NAMES = ("unicode-emoji-json", "0.9.0", "MIT")
KEYWORDS = ("cldr-annotations-full", "48.2.0", "Unicode-3.0")

COLOURS = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "gray": (140, 140, 145),
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (249, 220, 92),
    "green": (59, 165, 93),
    "blue": (52, 120, 220),
    "purple": (136, 84, 208),
    "pink": (248, 165, 194),
}
SYNONYMS = {  # words people type for what the model knows; CLDR adds the concepts' own
    "3d": ["glossy", "shiny", "rendered", "render", "realistic", "plastic", "clay", "volumetric", "shaded", "soft"],
    "flat": ["minimal", "minimalist", "minimalistic", "simple", "vector", "2d", "plain"],
    "cartoon": ["cartoonish", "comic", "comics", "toon", "drawn", "noto", "illustration", "illustrated"],
    "outline": ["outlined", "line", "lineart", "sketch", "contour", "monochrome", "stencil", "ink", "silhouette"],
    "gray": ["grey"],
    "purple": ["violet"],
    "red": ["crimson", "scarlet"],
    "blue": ["azure", "navy"],
    "pink": ["rosy"],
    "yellow": ["golden"],
    "white": ["snowy"],
    "black": ["dark"],
    "green": ["emerald"],
    "small": ["little", "tiny", "mini"],
    "large": ["big", "huge", "giant"],
    "left": ["leftmost"],
    "right": ["rightmost"],
    "top": ["upper", "above"],
    "bottom": ["lower", "below"],
    "dog": ["puppy", "doggy"],
    "cat": ["kitten", "kitty"],
    "rabbit": ["bunny"],
    "cow": ["cattle"],
    "bee": ["honeybee"],
    "fir": ["pine", "tree", "evergreen"],
    "donut": ["doughnut"],
    "burger": ["hamburger"],
    "teddy": ["plush"],
    "bulb": ["lightbulb", "lamp"],
    "fire": ["flame"],
    "car": ["automobile"],
    "gift": ["present"],
    "house": ["home"],
    "pumpkin": ["halloween"],
    "tangerine": ["mandarin", "clementine"],
    "corn": ["maize"],
    "cherry": ["cherries"],
    "grapes": ["grape"],
    "eggplant": ["aubergine"],
    "sailboat": ["boat", "yacht"],
    "ladybug": ["ladybird"],
    "crocodile": ["alligator"],
    "turtle": ["tortoise"],
    "horse": ["pony"],
    "pig": ["piglet"],
    "fish": ["trout"],
}
GLUE = ["a", "on", "background", "style", "at", "the"]


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


def draw(icons: dict, slug: str) -> Image.Image:
    width, height = icons.get("width", 16), icons.get("height", 16)
    body = icons["icons"][slug]["body"].replace("currentColor", "#000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)))).convert("RGBA")


def synonyms(concept: str, emoji: str, cldr: dict) -> list[str]:
    """Single words that CLDR files under this emoji, and ours."""
    entry = cldr.get(emoji) or cldr.get(emoji.replace("\ufe0f", "")) or {}
    words = [w.lower() for phrase in entry.get("default", []) for w in [phrase] if re.fullmatch(r"[A-Za-z]+", phrase)]
    return [w for w in words if w != concept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path(".cache/packages"))
    folder = parser.parse_args().packages

    emoji_of = {
        row["name"]: (emoji, row["slug"].replace("_", "-"))
        for emoji, row in read_json(fetch(*NAMES[:2], folder), "package/data-by-emoji.json").items()
    }
    cldr = read_json(fetch(*KEYWORDS[:2], folder), "package/annotations/en/annotations.json")
    cldr = cldr["annotations"]["annotations"]
    archives = {style: fetch(name, version, folder) for style, (name, version, _) in PACKAGES.items()}
    icons = {style: read_json(archive, "package/icons.json") for style, archive in archives.items() if style != "3d"}

    atlas = Image.new("RGBA", (SIZE * len(PACKAGES), SIZE * len(CONCEPTS)))
    found: dict[str, list[str]] = {}
    for row, (concept, name) in enumerate(CONCEPTS.items()):
        emoji, slug = emoji_of[name]
        codes = "-".join(f"{ord(c):04x}" for c in emoji)
        for column, style in enumerate(PACKAGES):
            if style == "3d":
                members = set(archives[style].getnames())
                member = next(
                    m
                    for m in (f"package/assets/{c}.webp" for c in (codes, codes.replace("-fe0f", ""), codes + "-fe0f"))
                    if m in members
                )
                picture = Image.open(io.BytesIO(archives[style].extractfile(member).read()))
            else:
                picture = draw(icons[style], slug)
            atlas.paste(fit(picture.convert("RGBA")), (SIZE * column, SIZE * row))
        found[concept] = synonyms(concept, emoji, cldr)

    known = (
        set(CONCEPTS) | set(PACKAGES) | set(COLOURS) | set(GLUE) | {"small", "large", "left", "right", "top", "bottom"}
    )
    chosen = {word: target for target, words in SYNONYMS.items() for word in words}
    counts: dict[str, int] = {}
    for words in found.values():
        for word in set(words):
            counts[word] = counts.get(word, 0) + 1
    for concept, words in found.items():  # an ambiguous keyword ("fruit") names no concept
        chosen |= {w: concept for w in words if counts[w] == 1 and w not in known and w not in chosen and len(w) > 2}

    ASSETS.mkdir(parents=True, exist_ok=True)
    atlas.save(ASSETS / "sprites.webp", lossless=True, quality=100, method=6, exact=False)
    (ASSETS / "vocabulary.json").write_text(
        json.dumps(
            {
                "concepts": list(CONCEPTS),
                "styles": list(PACKAGES),
                "colours": COLOURS,
                "sizes": ["small", "large"],
                "positions": ["left", "right", "top", "bottom"],
                "glue": GLUE,
                "synonyms": dict(sorted(chosen.items())),
            },
            indent=1,
        )
        + "\n"
    )
    print(f"{len(CONCEPTS)} concepts x {len(PACKAGES)} styles, {len(chosen)} synonyms -> {ASSETS}")


if __name__ == "__main__":
    main()
