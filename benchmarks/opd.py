"""Two tastes in one model: DiffusionOPD's student against its teachers and against the sum of their adapters.

    python benchmarks/opd.py [--seeds 0 1 2] [--jobs 2]
    python benchmarks/opd.py --quick                      # the mechanics, in a minute; its numbers mean nothing

One teacher is trained towards "3d" (srpo-emoji), one towards "outline" (srpo-emoji-outline). Animals, plants and food
belong to the first, every other thing to the second. The student (opd-emoji) learns each teacher on that teacher's
concepts. What is asked of every model: in how many pictures of a taste's own concepts the judge sees that taste's
style, in how many of the others' (which a taste of its own prompts leaves alone), and whether the concept is still
right. Merging adds the adapters' changes up, whole or at half weight; it has no prompts to choose by.

Writes RESULTS/opd.{json,md}. A row is a seed: two teachers, a student, five models judged from the same noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import crossed, spelled
from methods import PLAIN, parsed, slug, trained
from rows import Row, measured, write_table

from palate import recipe
from palate.evaluate import embedded_panel, generate, label_correct, pairs, quantise
from palate.models.merge import merge_adapters
from palate.models.vocabulary import parse_prompt, vocabulary

TASTES = {"3d": "srpo-emoji", "outline": "srpo-emoji-outline"}  # style -> the recipe of its teacher
STUDENT = "opd-emoji"
FIRST_THING = "car"  # in the vocabulary: before it animals, plants and food, the first taste's; from it on the second's
MERGED = {"merged, whole": (1.0, 1.0), "merged, half each": (0.5, 0.5)}
SEEDS_PER_PROMPT = (0, 1)


def owner(prompt: str) -> str:
    """The taste to which the prompt's concept belongs."""
    concepts = vocabulary().concepts
    return list(TASTES)[concepts.index(str(parse_prompt(prompt).concept)) >= concepts.index(FIRST_THING)]


@torch.no_grad()
def judged(model: Any, prompts: Sequence[str], weights: str = "policy") -> dict[str, list[float]]:
    """One value per prompt, means over its images: the share of each style, and concepts."""
    panel, (words, _) = embedded_panel(), pairs(prompts, SEEDS_PER_PROMPT)
    images = quantise(generate(model, prompts, SEEDS_PER_PROMPT, weights=weights))
    seen, judge = panel.classifier.style(images), panel.classifier
    right = label_correct(judge.concept(images), judge.concepts, [parse_prompt(word).concept for word in words])
    columns = {style: (seen == judge.styles.index(style)).double() for style in TASTES} | {"concept": right.double()}
    return {name: column.view(len(prompts), -1).mean(1).tolist() for name, column in columns.items()}


def row(seed: int, prompts: int, overrides: list[str]) -> dict[str, Any]:
    """Every model's measurements, per prompt."""
    asked = recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), prompts)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        folders = {style: Path(root) / style for style in TASTES}
        for style, source in TASTES.items():
            model = trained(recipe.read(source, [*PLAIN, *overrides, f"trainer.seed={seed}"]))
            if not found:
                found["base"] = judged(model, asked, "reference")
            found[f"teacher of {style}"] = judged(model, asked)
            model.save_adapter(folders[style])
        for name, weights in MERGED.items():
            found[name] = judged(merged(list(folders.values()), weights, Path(root) / name), asked)
        files = {style: Path(root) / f"{style}.txt" for style in TASTES}
        for style, file in files.items():
            own = [prompt for prompt in recipe.read_prompts("emoji-train") if owner(prompt) == style]
            file.write_text("\n".join(own) + "\n", "utf-8")
        teachers = {style: {"adapter": str(folders[style]), "file": str(files[style])} for style in TASTES}
        student = trained(STUDENT, [f"algorithm.teachers={json.dumps(named(teachers))}", *overrides,
                                    f"trainer.seed={seed}"])  # fmt: skip
        found["student"] = judged(student, asked)
    return {"seed": seed, "prompts": asked, "owners": [owner(prompt) for prompt in asked], "models": found}


def settings() -> str:
    """The fingerprints of all that is trained, which a row keeps."""
    return "-".join(recipe.fingerprint(recipe.read(source))[:8] for source in (*TASTES.values(), STUDENT))


def named(teachers: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Teachers under names that weights can have."""
    return {f"teacher_{style}": teacher for style, teacher in teachers.items()}


def merged(adapters: Sequence[Path], weights: Sequence[float], out: Path) -> Any:
    """The model with the weighted sum of the adapters."""
    rank = merge_adapters(list(adapters), list(weights), out)
    source = next(iter(TASTES.values()))
    return recipe.build_model(recipe.read(source, [f"model.start={out}", f"model.lora_rank={rank}"]))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By model: the number of seeds; with its interval the style's share on a taste's own concepts and on the others',
    and the concepts' change."""
    owners = np.array(rows[0]["owners"])
    result: dict[str, Any] = {}
    for name in rows[0]["models"]:
        told: dict[str, Any] = {"seeds": len(rows)}
        for style in TASTES:
            shares = np.array([found["models"][name][style] for found in rows], dtype=float)
            told[f"{style}, own"] = _share(shares[:, owners == style])
            told[f"{style}, others"] = _share(shares[:, owners != style])
        sides = [np.array([found["models"][side]["concept"] for found in rows], dtype=float) for side in (name, "base")]
        result[name] = told | {"concept": crossed(sides[0] - sides[1])}
    return result


def _share(values: np.ndarray) -> tuple[float, float, float]:
    """`crossed` of shares (seeds, prompts); the interval ends where shares do, at 0 and 1."""
    center, low, high = crossed(values)
    return center, max(low, 0.0), min(high, 1.0)


def table(result: dict[str, Any]) -> str:
    """The documentation's table."""
    columns = [f"{style}, {whose}" for style in TASTES for whose in ("own", "others")]
    lines = [f"| model | seeds | {' | '.join(f'{column} concepts' for column in columns)} | change of concepts |",
             "|---" * (3 + len(columns)) + "|"]  # fmt: skip
    for name, told in result.items():
        shares = (spelled(told[column], 2).replace("+", "") for column in columns)
        lines.append(f"| {name} | {told['seeds']} | {' | '.join(shares)} | {spelled(told['concept'], 2)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=104, help="two images each")
    parser.add_argument("--override", nargs="*", default=[], help="for every training")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.prompts = args.seeds[:1], 4
        args.override = [*args.override, "trainer.steps=1", "trainer.batch_size=2"]
    rows = [Row(args.results / f"{slug('opd', seed)}.json", row, (seed, args.prompts, args.override), recipe=settings())
            for seed in args.seeds]  # fmt: skip
    found = measured(rows, args.jobs, lambda made: {name: round(float(np.mean(told["concept"])), 3)
                                                    for name, told in made["models"].items()},
                     minutes=args.minutes)  # fmt: skip
    result = summary(found)
    (args.results / "opd.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(args.results / "opd.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
