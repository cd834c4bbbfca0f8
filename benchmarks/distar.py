"""One-step generators on the embedded model: one against its teacher, and DI* beside DI++ and SIM.

    python benchmarks/distar.py teacher FOLDER              # of `palate export RUN --format one-step`; or emoji-1step
    python benchmarks/distar.py family START --seeds 0 1 2  # START is what model.start takes: emoji-1step, RUN/adapter
    python benchmarks/distar.py blackbox [START]            # towards a reward that can only be asked: small files
    python benchmarks/distar.py table                       # print what has been measured, and draw it
    ... --jobs 2                                            # rows at once, a process of one thread each
    ... --updates 60                                        # shorter rows of the family
    ... --quick                                             # the mechanics, in minutes; its numbers mean nothing

teacher: the generator in one evaluation against the base model in 8 steps with guidance (16 evaluations), from the same
noise: 512 prompts without a style word (those of emoji-eval and their like, none of them trained on) and 512 with one
(emoji-styled), judged by what was not optimised; the Frechet distance of the judge's features to the teacher's images,
beside that of a second set of the teacher's; and seconds an image, both in one process of one thread, in turn.

family: the same generator trained on with each objective, at equal updates of generator and assistant; measured on the
way. In the first --alone steps only the assistant learns, since it begins as the reference. SIM has no reward: what it
keeps is what the divergence alone keeps.

blackbox: distar-emoji-blackbox from the generator: its pictures' true score and concepts against the generator's
before, and against the best of eight of those, which is what asking eight times gives without any training; the same
noise.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from methods import (
    PLAIN,
    Counted,
    CountedReward,
    Enough,
    Watched,
    about,
    eval_like,
    fingerprints,
    parsed,
    scatter,
    slug,
    whole,
)
from rows import ASSETS, Row, content, made, made_in, measured, write_table
from scipy import stats

from palate import recipe
from palate.evaluate import (
    diversity,
    embedded_panel,
    evaluate_images,
    frechet_distance,
    generate,
    label_correct,
    pairs,
    quantise,
)
from palate.rewards.learned import BlackBox
from palate.rewards.simple import jpeg_size
from palate.sampling import sample
from palate.train import train

FAMILY = {
    "DI*": ["algorithm.divergence=distar"],
    "DI++ (kl)": ["algorithm.divergence=kl"],
    "SIM (no reward)": ["algorithm.divergence=distar", "algorithm.reward_scale=0"],
}
JUDGED = ("concept", "style_named", "background", "correct", "reward/emoji-heldout", "reward/emoji")
BARS = {"concept": -0.02, "style_named": -0.03, "reward/emoji-heldout": 0.0}  # least change against the teacher
LEAST_BACKGROUND, LEAST_FASTER = 0.97, 15.0  # least share of right backgrounds; least ratio of the teacher's time
KEYS = ("reward", "heldout", "concept", "background", "diversity", "frechet")


def packaged(source: str) -> tuple[str, ...]:
    """The generator that a row needs besides the model, where it is one of the package."""
    return (source,) if (ASSETS / source).is_dir() else ()


def features(judge, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([judge.features(part) for part in images.split(64)])


# ------------------------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def against_teacher(folder: str, count: int, repeats: int) -> dict:
    from palate.export import load_one_step, one_step_folder
    from palate.models.emoji import EmojiModel

    found = one_step_folder(folder)
    if found is None:
        raise ValueError(f"{folder} holds no generator.json; expected what palate export --format one-step writes")
    (student, sampler), teacher = load_one_step(found), EmojiModel.load(training="none")
    panel, result = embedded_panel(), {}
    panel.rewards.pop("jpeg_size")
    for name, prompts in (("plain", eval_like(count)), ("styled", recipe.read_prompts("emoji-styled")[:count])):
        theirs, again = (quantise(generate(teacher, prompts, (seed,))) for seed in (0, 1))
        ours = quantise(generate(student, prompts, (0,), sampler=sampler))
        judged = evaluate_images(ours, *pairs(prompts, (0,)), panel, base=theirs).summary
        rows = {key: judged["metrics"][key] for key in JUDGED if key in judged["metrics"]}
        of = [features(panel.classifier, images) for images in (ours, theirs, again)]
        result[name] = {
            "prompts": len(prompts),
            **rows,
            "frechet": frechet_distance(of[0], of[1]),
            "frechet_of_the_teacher": frechet_distance(of[2], of[1]),
        }
    few = recipe.evenly_spaced(eval_like(count), 64)
    for side, model, how in (("teacher", teacher, None), ("generator", student, sampler)):
        images = quantise(generate(model, few, (0, 1, 2, 3), sampler=how))
        spread = diversity(features(panel.classifier, images), pairs(few, (0, 1, 2, 3))[0])
        result[f"diversity_{side}"] = float(spread.nanmean())
    return result | {"seconds": clock(teacher, student, sampler, repeats)}


def of_median(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median, by the ranks that a fair coin reaches so often; the extremes of fewer than six."""
    outside = max(int(stats.binom.ppf(0.025, len(values), 0.5)) - 1, 0)  # values left out at each end
    ordered = np.sort(values)
    return float(ordered[outside]), float(ordered[len(values) - 1 - outside])


def clock(teacher, student, sampler, repeats: int) -> dict[str, float]:
    """Median seconds an image of both, from a prompt to pixels and of the denoiser alone, in batches of 1 and 16."""
    found = {}
    for batch in (1, 16):
        words = eval_like(16)[:batch]
        noise, cond = torch.randn(batch, *teacher.latent_shape), teacher.encode_prompts(words)

        def many(decode: bool, noise=noise, words=words, cond=cond) -> None:
            own = teacher.encode_prompts(words) if decode else cond
            x = sample(teacher, own, noise, teacher.default_steps, guidance=teacher.default_guidance)
            teacher.decode(x) if decode else None

        def one(decode: bool, noise=noise, words=words, cond=cond) -> None:
            x = sampler(student, student.encode_prompts(words) if decode else cond, [noise])
            student.decode(x) if decode else None

        for name, decode in (("network", False), ("image", True)):
            times: dict[str, list[float]] = {"teacher": [], "generator": []}
            for turn in range(repeats + 1):
                for side, draw in (("teacher", many), ("generator", one)):
                    began = time.perf_counter()
                    draw(decode)
                    if turn:  # the first is a warm-up
                        times[side].append((time.perf_counter() - began) / batch)
            medians = {side: statistics.median(values) for side, values in times.items()}
            found |= {f"{side}, {name}, batch {batch}": value for side, value in medians.items()}
            found[f"ratio, {name}, batch {batch}"] = medians["teacher"] / medians["generator"]
            ends = zip(("low", "high"), of_median(np.divide(times["teacher"], times["generator"])), strict=True)
            found |= {f"ratio, {name}, batch {batch}, {end}": value for end, value in ends}
    return found


def verdict(low: float, high: float, least: float) -> str:
    """What a 95 % interval says of a bar: met, not met, or open, which is what claims.py says of the same numbers."""
    return "met" if low >= least else "not met" if high < least else "open"


def teacher_table(results: Path) -> str:
    """A table for each generator that has a row; a bar is judged by its interval's ends."""
    parts = []
    for path, found in made_in(results, "distar-teacher-*.json"):
        lines = [
            f"| {path.stem.removeprefix('distar-teacher-')} | teacher, 16 evaluations | generator, 1 evaluation "
            "| change (95 %) | bar |",
            "|---|---|---|---|---|",
        ]
        for name in ("plain", "styled"):
            own = found[name]
            for key in (key for key in JUDGED if key in own):
                m = own[key]
                least = BARS.get(key)
                bar = ""
                if least is not None:
                    bar = f"change >= {least:+.2f}: {verdict(m['change_low'], m['change_high'], least)}"
                if key == "background":
                    bar = f">= {LEAST_BACKGROUND:g}: {verdict(m['low'], m['high'], LEAST_BACKGROUND)}"
                lines.append(
                    f"| {key}, {own['prompts']} prompts ({name}) | {m['base']:.3f} | {m['value']:.3f} "
                    f"| {m['change']:+.3f} ({m['change_low']:+.3f} to {m['change_high']:+.3f}) | {bar} |"
                )
            lines.append(
                f"| Frechet distance to the teacher's images ({name}) | {own['frechet_of_the_teacher']:.4f} "
                f"(other noise) | {own['frechet']:.4f} | | reported |"
            )
        before, after = found["diversity_teacher"], found["diversity_generator"]
        lines.append(f"| diversity inside a prompt | {before:.3f} | {after:.3f} | x {after / before:.2f} | |")
        seconds = found["seconds"]
        for what, batch in (("image", 1), ("image", 16), ("network", 1), ("network", 16)):
            ratio, low, high = (seconds[f"ratio, {what}, batch {batch}{end}"] for end in ("", ", low", ", high"))
            times = [1000 * seconds[f"{side}, {what}, batch {batch}"] for side in ("teacher", "generator")]
            name = "prompt to pixels" if what == "image" else "denoiser alone"
            lines.append(
                f"| ms per image, {name}, batch {batch} | {times[0]:.1f} | {times[1]:.1f} "
                f"| x {ratio:.1f} ({low:.1f} to {high:.1f}) faster "
                f"| >= {LEAST_FASTER:g}: {verdict(low, high, LEAST_FASTER)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------------- family


@cache
def teacher_features(prompts: tuple[str, ...], seeds: tuple[int, ...]) -> torch.Tensor:
    from palate.models.emoji import EmojiModel

    return features(embedded_panel().classifier, quantise(generate(EmojiModel.load(training="none"), prompts, seeds)))


@torch.no_grad()
def judge(model, sampler, prompts: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, float]:
    panel, (words, _) = embedded_panel(), pairs(prompts, seeds)
    images = quantise(generate(model, prompts, seeds, sampler=sampler))
    seen, captions = features(panel.classifier, images), [panel.parse(word) for word in words]
    columns: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(images), 64):
        part, text, asked = (x[start : start + 64] for x in (images, words, captions))
        for name, value in {
            "reward": panel.rewards["emoji"](part, text),
            "heldout": panel.rewards[panel.heldout](part, text),
            "concept": label_correct(
                panel.classifier.concept(part), panel.classifier.concepts, [c.concept for c in asked]
            ),
            "background": label_correct(panel.background(part), panel.colours, [c.background for c in asked]),
        }.items():
            columns.setdefault(name, []).append(value.double())
    means = {name: float(torch.cat(parts).nanmean()) for name, parts in columns.items()}
    return means | {
        "diversity": float(diversity(seen, words).nanmean()),
        "frechet": frechet_distance(seen, teacher_features(prompts, seeds)),
    }


def train_on(start: str, seed: int, alone: int, updates: int, checks: int, prompts: int, overrides: list[str]) -> dict:
    """`updates` of the generator after `alone` steps of the assistant; measured before, and `checks` times after."""
    plan = recipe.read(
        "distar-emoji",
        [
            f"model.start={start}",
            "algorithm.reward_start_step=0",
            f"algorithm.assistant_warmup_steps={alone}",
            *PLAIN,
            *overrides,
            f"trainer.seed={seed}",
        ],
    )
    torch.manual_seed(seed)
    parts = recipe.build(plan)
    model, points = Counted(parts.model), []
    words, seeds = tuple(recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), prompts)), (0, 1, 2, 3)
    clock = {"trained": 0.0, "began": 0.0}

    def check(updated: int) -> None:
        model.counting = False
        points.append(
            {
                "updates": updated,
                "forwards": model.forwards,
                "seconds": round(clock["trained"], 1),
                **judge(model, plan.algorithm.generator, words, seeds),
            }
        )
        model.counting = True

    def before() -> None:
        clock["began"] = time.perf_counter()

    def after(step: int) -> None:
        clock["trained"] += time.perf_counter() - clock["began"]
        updated = step - alone
        if updated >= updates * len(points) / checks:
            check(updated)
        if updated >= updates:
            raise Enough

    check(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        whole(
            train(
                model,
                Watched(parts.algorithm, before, after),
                parts.reward,
                parts.prompts,
                folder=folder,
                progress=False,
                **{**vars(plan.trainer), "steps": alone + updates + 1},
            )
        )
    return {"start": start, "alone": alone, "points": points}


def family_rows(args: argparse.Namespace) -> list[Row]:
    return [
        Row(
            args.results / f"{slug('distar', 'family', name, seed, args.updates)}.json",
            train_on,
            (args.source, seed, args.alone, args.updates, args.checks, args.prompts, [*overrides, *args.override]),
            packaged(args.source),
            fingerprints("distar-emoji"),
        )
        for seed in args.seeds
        for name, overrides in FAMILY.items()
    ]


def family_table(args: argparse.Namespace) -> str:
    """Ends of the runs, mean and standard deviation over seeds; all points as an SVG beside the results."""
    lines = [
        f"| after {args.updates} updates | seeds | reward | held-out reward | concept | background | diversity "
        "| Frechet distance | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    series: dict[str, list[tuple[float, float]]] = {}
    for name in FAMILY:
        paths = [args.results / f"{slug('distar', 'family', name, seed, args.updates)}.json" for seed in args.seeds]
        paths = [path for path in paths if content(path) is not None]
        found = [made(path)["points"] for path in paths]
        for path, points in zip(paths, found, strict=True):
            if points[-1]["updates"] < args.updates:
                raise ValueError(
                    f"{path} ends after {points[-1]['updates']} updates of {args.updates}; delete it and measure again"
                )
        if not found:
            continue
        if not series:
            lines.append("| start | | " + " | ".join(f"{found[0][0][key]:.3f}" for key in KEYS) + " | |")
        series[name] = [(point["reward"], point["diversity"]) for points in found for point in points]
        ends = [points[-1] for points in found]
        cells = [about([end[key] for end in ends]) for key in KEYS]
        lines.append(
            f"| {name} | {len(found)} | " + " | ".join(cells) + f" | {np.mean([e['seconds'] for e in ends]):.0f} |"
        )
    if not series:
        return ""
    path = args.results / "distar-family.svg"
    path.write_text(scatter("Diversity over reward, on the way", "reward", "diversity inside a prompt", series, {}))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ blackbox


@torch.no_grad()
def looked(model, sampler, prompts: list[str], seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """True scores and concepts, (prompts, seeds) each."""
    panel, (words, _) = embedded_panel(), pairs(prompts, seeds)
    images = quantise(generate(model, prompts, seeds, sampler=sampler))
    asked = [panel.parse(word).concept for word in words]
    right = label_correct(panel.classifier.concept(images), panel.classifier.concepts, asked)
    scores = -jpeg_size(images) / 1000
    return (scores.view(len(prompts), -1).double().numpy(), right.view(len(prompts), -1).double().numpy())


def towards_a_black_box(start: str, seed: int, prompts: int, draws: int, overrides: list[str]) -> dict:
    """Per prompt: the score and the concepts after training and before, and the best of `draws` before."""
    plan = recipe.read(
        "distar-emoji-blackbox", [f"model.start={start}", *PLAIN, *overrides, f"trainer.seed={seed}"]
    )  # fmt: skip
    torch.manual_seed(seed)
    parts = recipe.build(plan)
    words, seeds = recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), prompts), tuple(range(draws))
    sampler, asked = plan.algorithm.generator, CountedReward(parts.reward.reward)
    reward = BlackBox(asked, parts.reward.features)
    before, concept_before = looked(parts.model, sampler, words, seeds)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        whole(train(parts.model, parts.algorithm, reward, parts.prompts, folder=folder, progress=False,
                    **vars(plan.trainer)))  # fmt: skip
    spent = time.process_time() - began
    after, concept = looked(parts.model, sampler, words, seeds)
    rows = {"score": after, "score before": before, "concept": concept, "concept before": concept_before}
    means = {name: values.mean(1).round(6).tolist() for name, values in rows.items()}
    return {"seed": seed, "prompts": words, "best of 8": before.max(1).round(6).tolist(), "asked": asked.images,
            "processor_seconds": round(spent, 1), **means}  # fmt: skip


def blackbox_table(results: Path) -> str:
    """Means over seeds and prompts; the interval is of the difference to the best of eight."""
    found = [row for _, row in made_in(results, "distar-blackbox-[0-9]*.json")]
    if not found:
        return ""
    lines = ["| seed | kilobytes before | best of 8 before | after | concepts before | after | images asked about "
             "| processor seconds |", "|---" * 8 + "|"]  # fmt: skip
    for row in found:
        kilobytes = (f"{-np.mean(row[key]):.3f}" for key in ("score before", "best of 8", "score"))
        concepts = (f"{np.nanmean(row[key]):.3f}" for key in ("concept before", "concept"))
        lines.append(f"| {row['seed']} | {' | '.join(kilobytes)} | {' | '.join(concepts)} | {row['asked']:,} "
                     f"| {row['processor_seconds']:.0f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["teacher", "family", "blackbox", "table"])
    parser.add_argument("source", nargs="?", help="teacher: the generator's folder; family: model.start")
    parser.add_argument("--count", type=int, default=512, help="teacher: prompts of each kind")
    parser.add_argument("--repeats", type=int, default=15, help="teacher: of each timing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=200, help="family: of the generator")
    parser.add_argument("--alone", type=int, default=50, help="family: steps of the assistant alone, at first")
    parser.add_argument("--checks", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=104, help="family: evaluation prompts, four images each")
    parser.add_argument("--override", nargs="*", default=[], help="for every row, while tuning")
    args = parsed(parser)
    if args.quick:
        args.count, args.repeats, args.prompts = 6, 1, 4
        args.seeds, args.updates, args.alone, args.checks = [0], 1, 1, 1
        args.override.append("trainer.batch_size=2")
    if args.what in ("teacher", "family") and args.source is None:
        parser.error(f"{args.what}: name the generator")
    if args.what == "teacher":
        measured(
            [
                Row(
                    args.results / f"{slug('distar', 'teacher', args.source.strip('/'))}.json",
                    against_teacher,
                    (args.source, args.count, args.repeats),
                    packaged(args.source),
                )
            ],
            min(args.jobs, 1),
            lambda found: found["seconds"],
        )
    if args.what == "family":
        measured(family_rows(args), args.jobs, lambda found: found["points"][-1], minutes=args.minutes)
    if args.what == "blackbox":
        quick = ["trainer.steps=1", "algorithm.head_first=2", "algorithm.head_queries=2",
                 "algorithm.assistant_warmup_steps=0"] if args.quick else []  # fmt: skip
        more, source = [*quick, *args.override], args.source or "emoji-1step"
        rows = [Row(args.results / f"{slug('distar', 'blackbox', seed)}.json", towards_a_black_box,
                    (source, seed, args.prompts, 8, more), packaged(source), fingerprints("distar-emoji-blackbox"))
                for seed in args.seeds]  # fmt: skip
        measured(rows, args.jobs, lambda found: {"asked": found["asked"], "score": float(np.mean(found["score"]))},
                 minutes=args.minutes)  # fmt: skip
    tables = {
        "distar-teacher": teacher_table(args.results),
        "distar-family": family_table(args),
        "distar-blackbox": blackbox_table(args.results),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        if text:
            write_table(args.results / f"{name}.md", text)
            print(text + "\n")


if __name__ == "__main__":
    main()
