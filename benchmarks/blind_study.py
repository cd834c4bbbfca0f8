"""Does the win rate of a blind study have the interval that it claims? Simulated studies, page to result.

    python benchmarks/blind_study.py [--studies 100] [--pairs 40]
    python benchmarks/blind_study.py --quick              # the mechanics, on eight plain pictures

Two embedded results, the base model and the shipped one-step generator, draw emoji-eval twice. A scripted voter likes
colourful pictures: it looks at a page's two pictures as the page holds them, takes the better one with the probability
of Davidson's model (1970, ties included), and its choices are written as the page's button writes them. They are read
back, matched with the key and scored by the very functions of `palate compare`. Since the taste is known, so is the
true win rate over all pairs; an interval of 95 % should hold it in about 95 of 100 studies. Counted beside it is
Wilson's interval of the same rate, which takes choices as independent and knows no ties.

Writes RESULTS/blind_study.{json,md}.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from methods import parsed
from PIL import Image
from rows import write_table

from palate import recipe
from palate.cli.model_source import load_source
from palate.evaluate import generate, pairs, write_samples
from palate.evaluate.intervals import wilson
from palate.report import study
from palate.runs import read_samples
from palate.runtime.images import to_pixels

Taste = Callable[[np.ndarray], float]  # pixels (H, W, 3) -> utility


class Voter(NamedTuple):
    """A taste, how sharply it decides, and how readily it sees no difference."""

    taste: Taste
    sharpness: float
    ties: float

    def chances(self, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
        """The probabilities of the first and of a tie: weights e^u, e^v and ties e^((u + v) / 2)."""
        apart = self.sharpness * (self.taste(first) - self.taste(second))
        win, loss, tie = math.exp(apart / 2), math.exp(-apart / 2), self.ties
        return win / (win + loss + tie), tie / (win + loss + tie)


class Setting(NamedTuple):
    """A kind of study."""

    name: str
    sharpness: float
    ties: float
    people: int


SETTINGS = [
    Setting("clear taste, few ties", 12.0, 0.1, 1),
    Setting("faint taste, many ties", 3.0, 2.0, 1),
    Setting("clear taste, three people on each page", 12.0, 0.3, 3),
]


class _Page(HTMLParser):
    """The study's name and the pictures of a page, in their order."""

    def __init__(self, text: str):
        super().__init__()
        self.study, self.pictures = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if "data-study" in told:
            self.study = str(told["data-study"])
        if tag == "img":
            data = base64.b64decode(str(told["src"]).split(",")[1])
            self.pictures.append(np.asarray(Image.open(io.BytesIO(data))))


def colourfulness(pixels: np.ndarray) -> float:
    """Mean distance of the channels from their mean, in [0, 1]."""
    exact = pixels.astype(float) / 255
    return float(np.abs(exact - exact.mean(2, keepdims=True)).mean())


def vote(page: Path, voter: Voter, session: str, rng: np.random.Generator) -> str:
    """What the page's download button would save after the voter has gone through it."""
    seen = _Page(page.read_text("utf-8"))
    lines = []
    for number in range(len(seen.pictures) // 2):
        left, tie = voter.chances(*seen.pictures[2 * number : 2 * number + 2])
        drawn = rng.random()
        choice = "left" if drawn < left else "tie" if drawn < left + tie else "right"
        row = {"study": seen.study, "session": session, "pair": number, "choice": choice, "seconds": 1.0}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def true_rate(run_a: Path, run_b: Path, voter: Voter) -> float:
    """The win rate of a over all pairs, a tie counting half."""
    first, second = (to_pixels(read_samples(run / "evaluation" / "result")[0]) for run in (run_a, run_b))
    chances = [voter.chances(a, b) for a, b in zip(first, second, strict=True)]
    return float(np.mean([win + tie / 2 for win, tie in chances]))


def simulate(
    run_a: Path, run_b: Path, setting: Setting, *, studies: int, count: int, taste: Taste = colourfulness, seed: int = 0
) -> dict[str, float]:
    """How many of the studies' intervals hold the truth; the rates' mean; and what Wilson's interval would hold."""
    voter = Voter(taste, setting.sharpness, setting.ties)
    truth, rng = true_rate(run_a, run_b, voter), np.random.default_rng(seed)
    held, held_wilson, rates, ties, widths = 0, 0, [], 0, []
    for number in range(studies):
        with tempfile.TemporaryDirectory() as folder:
            page, _ = study.write_study(
                run_a, run_b, page=Path(folder) / "page.html", count=count, seed=1_000_003 * seed + number
            )
            files = []
            for person in range(setting.people):
                files.append(Path(folder) / f"choices-{person}.jsonl")
                files[-1].write_text(vote(page, voter, f"person-{person}", rng))
            found = study.score(study.read_choices(files), study.find_key(files))
        held += found["low"] <= truth <= found["high"]
        low, high = wilson(found["wins"]["a"] + found["ties"] / 2, found["choices"])
        held_wilson += low <= truth <= high
        rates.append(found["win_rate"])
        ties += found["ties"]
        widths.append(found["high"] - found["low"])
    return {
        "studies": studies,
        "choices": count * setting.people,
        "truth": truth,
        "rate": float(np.mean(rates)),
        "ties": ties / (studies * count * setting.people),
        "width": float(np.mean(widths)),
        "held": held,
        "held_wilson": held_wilson,
    }


def embedded_results(folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Path, Path]:
    """Two runs' folders: the base model's pictures and the one-step generator's, from the same noise."""
    runs = folder / "base", folder / "one-step"
    for run, source in zip(runs, ("emoji", "emoji-1step"), strict=True):
        model, sampler = load_source(source)
        images = generate(model, prompts, seeds, sampler=sampler)
        write_samples(run / "evaluation" / "result", images, *pairs(prompts, seeds), guidance=1.0, steps=1)
    return runs


def plain_results(folder: Path) -> tuple[Path, Path]:
    """Plain colours, for --quick and the tests: a's are more colourful."""
    runs = folder / "a", folder / "b"
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(40)]
    for run, more in zip(runs, (0.1, 0.0), strict=True):
        red = torch.tensor(0.4 + more + 0.2 * rng.random(80), dtype=torch.float32)
        images = torch.stack([red, red * 0 + 0.4, red * 0 + 0.4], 1)[:, :, None, None].expand(-1, 3, 8, 8)
        write_samples(run / "evaluation" / "result", images, *pairs(prompts, (0, 1)), guidance=1.0, steps=1)
    return runs


def table(found: dict[str, dict[str, float]]) -> str:
    """The documentation's table."""
    lines = [
        "| study | choices | true win rate | mean of the studies | ties | width of the interval | holds the truth "
        "| Wilson's would |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['choices']} | {row['truth']:.3f} | {row['rate']:.3f} | {row['ties']:.0%} "
            f"| {row['width']:.2f} | {row['held']} of {row['studies']} | {row['held_wilson']} of {row['studies']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=100, help="of each kind")
    parser.add_argument("--pairs", type=int, default=40, help="on each page")
    args = parsed(parser)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.studies, runs = 4, plain_results(Path(folder))
        else:
            runs = embedded_results(Path(folder), recipe.read_prompts("emoji-eval"), (0, 1))
        found = {
            setting.name: simulate(*runs, setting, studies=args.studies, count=args.pairs, seed=k)
            for k, setting in enumerate(SETTINGS)
        }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "blind_study.json").write_text(json.dumps(found, indent=1) + "\n")
    write_table(args.results / "blind_study.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
