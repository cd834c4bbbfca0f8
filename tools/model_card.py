"""Write the model card of the embedded assets, src/palate/assets/README.md, from what lies beside it.

    python tools/model_card.py [--assets FOLDER] [--check]

Sizes come from the files, words from the vocabulary, figures from figures.json (`tools/evaluate_assets.py`). A figure
that was not measured is said to be so. --check writes nothing and ends with 1 where the card is another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from palate.models.vocabulary import Vocabulary

ASSETS = Path(__file__).resolve().parent.parent / "src/palate/assets"
SHARED = "the first model's words"  # the section of figures on the words that the first model knows
FIRST = "the first model"  # and what the first model's are, by the same judges
ROWS = [  # what, where its figure is, the bar
    ("encode and decode 256 fresh compositions, dB", ("autoencoder", "psnr"), ">= 33"),
    ("high-frequency (Laplacian) energy of them / of the originals", ("autoencoder", "energy"), ">= .90"),
    (
        "high-frequency energy of samples / of real compositions of the same prompts",
        ("styled", "high frequency"),
        ">= .85",
    ),
    ("concept right, trained (concept, style) pairs", ("styled", "concept"), ">= .97"),
    ("style right, same", ("styled", "style"), ">= .97"),
    ("background right, same", ("styled", "background"), ">= .98"),
    ("concept right, pairs never seen", ("unseen", "concept"), ">= .92"),
    ("style right, same", ("unseen", "style"), ">= .90"),
    ("no style word: concept right", ("unstyled", "concept"), ""),
    ("side named: the drawing is there", ("sides", "right"), ">= .95"),
    ("Frechet distance of 2,000 samples from 2,000 compositions, judge features", ("frechet", "distance"), ""),
    ("diversity of eight images inside a prompt, judge features", ("variety", "samples"), ""),
    ("diversity of eight real compositions of a prompt, judge features", ("variety", "real"), ""),
]
TASKS = ("single object", "two objects", "counting", "colours", "position", "binding", "mean")
TASK_BARS = {"counting": ">= .80", "two objects": ">= .75", "colours": ">= .90", "binding": ">= .60"}


def parameters(folder: Path) -> str:
    """Of all networks of an asset, in millions: "7.9 M"."""
    count = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return f"{count / 1e6:.1f} M"


def megabytes(assets: Path) -> float:
    """Of all that ships, but for the card itself."""
    files = [path for path in assets.rglob("*") if path.is_file() and path != assets / "README.md"]
    return sum(path.stat().st_size for path in files) / 1e6


def figure(figures: Mapping[str, Any], place: tuple[str, ...]) -> str:
    """The value at that place, three digits; "not measured" where it is not there."""
    value: Any = figures
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "not measured" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def quality(figures: Mapping[str, Any]) -> str:
    lines = [f"| {what} | {figure(figures, place)} | {bar or '-'} |" for what, place, bar in ROWS]
    shares = " / ".join(figure(figures, ("unstyled", style)) for style in ("3d", "flat", "cartoon", "outline"))
    lines.append(f"| no style word: share of 3d / flat / cartoon / outline | {shares} | - |")
    return "\n".join(lines)


def tasks(figures: Mapping[str, Any]) -> str:
    return "\n".join(f"| {t} | {figure(figures, ('tasks', t))} | {TASK_BARS.get(t, '-')} |" for t in TASKS)


def judged(figures: Mapping[str, Any]) -> str:
    rows = []
    for name, part in (
        ("judge (oracle for the background)", ("judges", "judge")),
        ("reward-emoji", ("judges", "emoji")),
        ("reward-heldout", ("judges", "emoji-heldout")),
    ):
        cells = [
            "-" if name.startswith("judge") and kind == "detail" else figure(figures, (*part, kind))
            for kind in ("concept", "style", "background", "detail")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def compared(figures: Mapping[str, Any]) -> str:
    """This model beside the first one, by the same judges, on the words that both know; each has unseen pairs of its
    own, which are left out."""
    places = [row for row in ROWS if row[1][0] in ("styled", "sides", "frechet", "variety")]
    return "\n".join(
        f"| {what} | {figure(figures, (FIRST, *place))} | {figure(figures, (SHARED, *place))} |"
        for what, place, _ in places
    )


def card(assets: Path) -> str:
    """The whole card."""
    table = json.loads((assets / "figures.json").read_text("utf-8"))
    vocab = Vocabulary(**json.loads((assets / "atlas/vocabulary.json").read_text("utf-8")))
    sprites = json.loads((assets / "atlas/sprites.json").read_text("utf-8"))["sprites"]
    sources = Counter(row[2].partition("/")[0] for row in sprites)
    found = {
        name: len(path.read_text("utf-8").splitlines())
        for path in (assets / "prompts").glob("emoji-*.txt")
        for name in [path.stem.removeprefix("emoji-").replace("-", "_")]
    }
    unet, text, vae = (parameters(assets / f"emoji/{part}") for part in ("unet", "text_encoder", "vae"))
    names = ("reward-emoji", "reward-heldout", "judge", "detector", "emoji-consistency")
    sizes = {name.replace("-", "_"): parameters(assets / name) for name in names}
    channels = json.loads((assets / "emoji/unet/config.json").read_text("utf-8"))["in_channels"]
    shape = {"unet": unet, "text": text, "vae": vae, "channels": channels, "total": f"{megabytes(assets):.1f}"}
    counts = {
        "concepts": len(vocab.concepts),
        "drawings": f"{len(sprites):,}",
        "turned": sum(row[3] is not None for row in sprites),
        "sources": ", ".join(f"{source} {count}" for source, count in sorted(sources.items())),
        "synonyms": len(vocab.synonyms),
        "max_words": vocab.max_words,
        "styles": len(vocab.styles),
        "held_out": found["heldout"] // len(vocab.colours),
    }
    parts = {"quality": quality(table), "tasks": tasks(table), "judged": judged(table), "compared": compared(table)}
    seen = {f"seen_{k.replace(' ', '_')}": figure(table, ("detector", k)) for k in DETECTED}
    return TEXT.format(**shape, **counts, **sizes, **{f"p_{k}": v for k, v in found.items()}, **parts, **seen)


DETECTED = ("number", "number of kind", "found", "paint", "side")
TEXT = (Path(__file__).with_name("model_card.md")).read_text("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the card is another")
    args = parser.parse_args()
    text, path = card(args.assets), args.assets / "README.md"
    if args.check:
        sys.exit(0 if path.is_file() and path.read_text("utf-8") == text else f"{path} is not what its figures say")
    path.write_text(text, "utf-8")
    print(path)


if __name__ == "__main__":
    main()
