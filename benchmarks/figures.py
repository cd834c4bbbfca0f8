"""The pictures of the documentation, from runs.

python benchmarks/figures.py demo runs/demo            # docs/images/demo.png: before, during, after
python benchmarks/figures.py steering [--steps 60] [--to flat]
    trains towards "3d", then, half-way, towards another style and away from "3d"; docs/images/steering.{svg,png}
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from palate.report import Line, Mark, chart, read_metrics
from palate.runs import read_samples

IMAGES = Path("docs/images")
STYLE = """<style>svg{background:#fff;font-family:sans-serif}text{font-size:12px;fill:#555}.grid{stroke:#e4e4e4}
.curve{fill:none;stroke-width:2}
.p0{stroke:#1b9e77}.p1{stroke:#777}.p2{stroke:#7570b3}.p3{stroke:#e6ab02}.accent{stroke:#c2410c}
.mark{stroke:#111;stroke-dasharray:3 3}
text.mark,text.name{stroke:none;fill:#111}circle{fill:#999;stroke:none}</style>"""


def sheet(run: Path, steps: list[str], path: Path, *, columns: int = 12, zoom: int = 2) -> None:
    """Rows are steps, columns prompts; the same noise in a column."""
    rows = [read_samples(run / "samples" / step)[0][:columns] for step in steps]
    side = rows[0].shape[-1] * zoom
    canvas = Image.new("RGB", (columns * (side + 4) - 4, len(rows) * (side + 4) - 4), "white")
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            tile = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
            tile = tile.resize((side, side), Image.BICUBIC)
            canvas.paste(tile, (c * (side + 4), r * (side + 4)))
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
    svg = re.sub(r"<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', svg, count=1)
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / "steering.svg").write_text(svg.replace(">", ">" + STYLE, 1))
    names = sorted(p.name for p in (run / "samples").iterdir())
    sheet(run, [names[0], names[len(names) // 2], names[-1]], IMAGES / "steering.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["demo", "steering"])
    parser.add_argument("run", type=Path, nargs="?", default=None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--to", default="flat", help="the second style of steering")
    args = parser.parse_args()
    if args.what == "demo":
        demo(args.run or Path("runs/demo"))
    else:
        steering(args.run or Path("runs/steering"), args.steps, args.to)


if __name__ == "__main__":
    main()
