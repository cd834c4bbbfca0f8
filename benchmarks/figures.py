"""The pictures of the documentation, from runs.

python benchmarks/figures.py hero runs/3d runs/cartoon runs/outline     # docs/images/hero.png, of evaluated runs
python benchmarks/figures.py demo runs/demo            # docs/images/demo.png: before, during, after
python benchmarks/figures.py steering [--steps 60] [--to flat]
    trains towards "3d", then, half-way, towards another style and away from "3d"; docs/images/steering.{svg,png}
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from palate.models.vocabulary import with_article
from palate.report import Line, Mark, chart, read_metrics
from palate.report.story import wanted_styles
from palate.runs import read_samples
from palate.runtime.images import to_pixels

IMAGES = Path("docs/images")
CSS = """<style>svg{background:#fff;font-family:sans-serif}text{font-size:12px;fill:#555}.grid{stroke:#e4e4e4}
.curve{fill:none;stroke-width:2}
.p0{stroke:#1b9e77}.p1{stroke:#777}.p2{stroke:#7570b3}.p3{stroke:#e6ab02}.accent{stroke:#c2410c}
.mark{stroke:#111;stroke-dasharray:3 3}
text.mark,text.name{stroke:none;fill:#111}circle{fill:#999;stroke:none}</style>"""


def standalone(svg: str) -> str:
    """A chart of the report as a file of its own."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", ">" + CSS, 1)


def sheet(run: Path, steps: list[str], path: Path, *, columns: int = 12, zoom: int = 2) -> None:
    """Rows are steps, columns prompts; the same noise in a column."""
    rows = [read_samples(run / "samples" / step)[0][:columns] for step in steps]
    side = rows[0].shape[-1] * zoom
    canvas = Image.new("RGB", (columns * (side + 4) - 4, len(rows) * (side + 4) - 4), "white")
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            tile = Image.fromarray(to_pixels(image))
            tile = tile.resize((side, side), Image.BICUBIC)
            canvas.paste(tile, (c * (side + 4), r * (side + 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)
    print(path)


def hero(runs: list[Path], prompts: list[str], path: Path, *, rows: int = 4, zoom: int = 3) -> None:
    """One row per prompt, base and each run's result from the same noise, labelled.

    Prompts that are not given are chosen by the evaluations: everything named is right in every column, the base is in
    no wanted style, and as many results as possible are in the style that their run asked for; one concept per row.
    """
    evaluations = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    wanted = [set(wanted_styles(evaluation)) for evaluation in evaluations]
    ranked = []
    for together in zip(*(evaluation["rows"] for evaluation in evaluations), strict=True):
        first = together[0]
        if len({(row["prompt"], row["seed"]) for row in together}) > 1:
            raise SystemExit("the runs were evaluated on other prompts or seeds: palate evaluate RUN RUN RUN")
        right = all(row.get("correct", 1.0) for row in together) and first["base"].get("correct", 1.0)
        turned = sum(row.get("style") in styles for row, styles in zip(together, wanted, strict=True))
        distance = sum(row.get("feature_distance", 0.0) for row in together)
        plain = not any(first["base"].get("style") in styles for styles in wanted)
        ranked.append(((bool(right), turned, plain, distance), first))
    ranked.sort(key=lambda item: item[0], reverse=True)
    chosen: dict[str, dict] = {}
    for _, row in ranked:
        concept = row["prompt"].split(" on ")[0]
        if row["prompt"] in prompts if prompts else concept not in chosen:
            chosen.setdefault(concept, row)
        if len(chosen) == (len(prompts) or rows):
            break
    names = ["base model", *(" + ".join(sorted(styles)) or run.name for run, styles in zip(runs, wanted, strict=True))]
    folders = [runs[0] / "evaluation/base", *(run / "evaluation/result" for run in runs)]
    tiles = [[Image.open(folder / row["file"]).convert("RGB") for folder in folders] for row in chosen.values()]
    labels = [re.sub(r"^an? (.*) on a (.*)$", _label, row["prompt"]) for row in chosen.values()]
    labelled(tiles, names, labels, path, zoom)


def _label(match: re.Match) -> str:
    return f"{with_article(match[1])}\non {with_article(match[2])}"


def labelled(tiles: list[list[Image.Image]], columns: list[str], rows: list[str], path: Path, zoom: int) -> None:
    """A sheet of pictures with a name over each column and before each row, whole; crisp at `zoom` times their size."""
    font = ImageFont.load_default(17)
    gap, head = 8, 30
    left = 16 + round(max(font.getlength(line) for name in rows for line in name.splitlines()))
    side = tiles[0][0].width * zoom
    canvas = Image.new(
        "RGB", (left + len(columns) * (side + gap) - gap, head + len(rows) * (side + gap) - gap), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for c, name in enumerate(columns):
        draw.text((left + c * (side + gap) + side // 2, head // 2 - 2), name, "#1d1f24", font, anchor="mm")
    for r, name in enumerate(rows):
        draw.multiline_text((4, head + r * (side + gap) + side // 2), name, "#1d1f24", font, anchor="lm", spacing=6)
        for c, tile in enumerate(tiles[r]):
            shown = tile.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(shown, (left + c * (side + gap), head + r * (side + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)
    print(path)


def demo(run: Path) -> None:
    steps = sorted(p.name for p in (run / "samples").iterdir())
    sheet(run, [steps[0], steps[len(steps) // 2], steps[-1]], IMAGES / "demo.png")


def steering(run: Path, steps: int, to: str) -> None:
    def palate(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "palate", *arguments], check=True)

    half = steps // 2
    palate(
        "train",
        "srpo-emoji",
        f"run.folder={run}",
        "--fresh",
        f"trainer.steps={half}",
        "trainer.preview_every=10",
        "trainer.guard.every=6",
        "trainer.guard.action=warn",
    )
    palate("steer", str(run), "--positive", to, "--negative", "3d")
    palate("resume", str(run), f"trainer.steps={steps}")
    rows = [row for row in read_metrics(run) if row.get("event") in ("evaluate", "guard")]
    shares = [
        Line(style, [(row["step"], row[f"style/{style}"]) for row in rows], style == "3d")
        for style in ("3d", "outline", "flat", "cartoon")
    ]
    swap = next(row["step"] for row in read_metrics(run) if row.get("event") == "steer")
    svg = str(chart("Style share", shares, [Mark(swap, f"words swapped: +{to} -3d", "steer")], unit_range=True))
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / "steering.svg").write_text(standalone(svg))
    names = sorted(p.name for p in (run / "samples").iterdir())
    sheet(run, [names[0], names[len(names) // 2], names[-1]], IMAGES / "steering.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["hero", "demo", "steering"])
    parser.add_argument("runs", type=Path, nargs="*", help="of hero three or so, of the others one")
    parser.add_argument("--prompt", action="append", default=[], help="of hero: a row's prompt; repeatable")
    parser.add_argument("--out", type=Path, default=IMAGES / "hero.png", help="of hero")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--to", default="flat", help="the second style of steering")
    args = parser.parse_args()
    if args.what == "hero":
        hero(args.runs or [Path("runs") / name for name in ("3d", "cartoon", "outline")], args.prompt, args.out)
    elif args.what == "demo":
        demo(args.runs[0] if args.runs else Path("runs/demo"))
    else:
        steering(args.runs[0] if args.runs else Path("runs/steering"), args.steps, args.to)


if __name__ == "__main__":
    main()
