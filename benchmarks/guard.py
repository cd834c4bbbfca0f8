"""Does the guard stop a run that over-optimises before it has forgotten the concepts?

    python benchmarks/guard.py [--seeds 0 1 2] [--methods SRPO DRaFT-LV SQDF] [--jobs 2]
    python benchmarks/guard.py --measures images          # the same runs under the guard that asks no judge
    python benchmarks/guard.py --quick                    # the mechanics, in minutes; its numbers mean nothing

Each method on its own objective with nothing that holds it back: --factor times its learning rate, no anchor, no KL, no
weight average. The guard looks every --every steps at 96 images of emoji-eval and stops at a fall of concept accuracy
of .05 (or of the held-out reward, or of diversity); what counts is the checkpoint that it keeps. That one is judged
here on prompts that neither the training nor the guard has seen, two images each, in pairs with the base model; beside
it the same run without a guard, as many updates again as the guarded one made.

Two things follow from what the guard is: it can only stop at a step where it looks, and it sees 96 images, on which a
share moves by about .03 by chance. So the kept checkpoint's interval is the answer, not its mean alone.

With --measures images the guard is that of models without a judge (`palate.evaluate.monitor`, its default limits, 48
images): the judge still reads the guard's pictures, for the table alone. Beside the runs that over-optimise stands one
that does not, the recipe srpo-emoji as it is: the guard has to let it go to its end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from methods import FAIR, METHODS, WORDS, beside_eval, objective, parsed, rate, slug, whole
from rows import Row, made_in, measured, write_table

from palate import recipe
from palate.evaluate import bootstrap_interval, embedded_panel, generate, label_correct, pairs, quantise
from palate.evaluate.monitor import ImageMonitor
from palate.models.vocabulary import parse_prompt
from palate.train import train

LIMIT = 0.05
GOOD = "srpo-emoji"  # a run that does not over-optimise
UNHELD = {"SRPO": ["algorithm.reference_penalty=0"], "SQDF": ["algorithm.alpha_kl=0"], "DRaFT-LV": []}


def build_plan(method: str, overrides: list[str]) -> recipe.Recipe:
    source = METHODS[method]
    return recipe.read(
        source,
        [
            *WORDS.get(recipe.read(source).algorithm.name, []),
            *FAIR,
            *UNHELD[method],
            "trainer.ema_decay=0",
            "trainer.preview_every=0",
            "trainer.checkpoint_every=0",
            *overrides,
        ],
    )


def build(method: str, seed: int, lr: float, overrides: list[str]):
    plan = build_plan(method, [f"trainer.lr={lr}", f"trainer.seed={seed}", *overrides])
    torch.manual_seed(seed)
    parts = recipe.build(plan)
    return plan, parts, parts.reward if plan.algorithm.name in WORDS else objective(parts.reward)


def settings(method: str) -> str:
    """The fingerprint of what is trained, which a row keeps."""
    plan = recipe.read(GOOD) if method == GOOD else build_plan(method, [])
    return recipe.fingerprint(plan)[:16]


@torch.no_grad()
def concepts(model, prompts: list[str], weights: str = "policy") -> torch.Tensor:
    """(N,) 1 where the judge reads the concept that the prompt names."""
    judge, (words, _) = embedded_panel().classifier, pairs(prompts, (0, 1))
    images = quantise(generate(model, prompts, (0, 1), weights=weights))
    seen = torch.cat([judge.concept(part) for part in images.split(64)])
    return label_correct(seen, judge.concepts, [parse_prompt(word).concept for word in words]).double()


@cache
def base_concepts(prompts: int) -> tuple[list[str], torch.Tensor]:
    """The prompts to judge on, and `concepts` of the base model, once a process."""
    words = beside_eval(prompts)
    return words, concepts(recipe.build(recipe.read("srpo-emoji")).model, words, "reference")


def over_optimise(
    method: str, seed: int, lr: float, every: int, steps: int, prompts: int, overrides: list[str]
) -> dict:
    held_out, base = base_concepts(prompts)
    guard = [
        f"trainer.guard.every={every}",
        "trainer.guard.prompts=96",
        f"trainer.guard.concept_drop={LIMIT}",
        "trainer.guard.action=stop",
        "trainer.guard.best=null",
    ]
    found: dict = {"method": method, "seed": seed, "lr": lr}
    with tempfile.TemporaryDirectory() as folder:
        plan, parts, reward = build(method, seed, lr, [*guard, *overrides, f"trainer.steps={steps}"])
        outcome = whole(
            train(
                parts.model,
                parts.algorithm,
                reward,
                parts.prompts,
                folder=folder,
                progress=False,
                preview=parts.preview_prompts,
                **vars(plan.trainer),
            )
        )
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        checks = [row for row in log if row["event"] == "guard"]
        found |= {
            "stopped": outcome.reason.startswith("guard"),
            "step": outcome.step,
            "why": outcome.reason,
            "kept": checks[-1]["best_step"] if checks else 0,
            "seen": [[row["step"], row["concept"]] for row in checks],
        }
        kept = concepts(parts.model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        free_of = [override for override in overrides if not override.startswith("trainer.guard.")]
        plan, parts, reward = build(
            method, seed, lr, ["trainer.guard.every=0", *free_of, f"trainer.steps={2 * outcome.step}"]
        )
        whole(
            train(
                parts.model, parts.algorithm, reward, parts.prompts, folder=folder, progress=False, **vars(plan.trainer)
            )
        )
        free = concepts(parts.model, held_out)
    words, _ = pairs(held_out, (0, 1))
    low, high = bootstrap_interval(kept, base, groups=words)
    return found | {
        "base": float(base.mean()),
        "guarded": float(kept.mean()),
        "unguarded": float(free.mean()),
        "change_low": low,
        "change_high": high,
        "images": len(base),
    }


class Witness:
    """A model whose images are kept as they are drawn, for a judge that the guard does not ask."""

    def __init__(self, model):
        self.model, self.images = model, []

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.images.append(self.model.decode(latents))
        return self.images[-1]

    def __getattr__(self, name: str):
        return getattr(self.model, name)


def without_judge(method: str, seed: int, lr: float, every: int, steps: int, overrides: list[str]) -> dict:
    """A run under the image guard: where it stopped, why, and what the judge sees in the pictures of each look."""
    guard = [
        f"trainer.guard.every={every}",
        "trainer.guard.prompts=48",
        "trainer.guard.action=stop",
        "trainer.guard.best=null",
        f"trainer.steps={steps}",
    ]
    if method == GOOD:
        plan = recipe.read(GOOD, [*guard, f"trainer.seed={seed}", "trainer.preview_every=0", *overrides])
        torch.manual_seed(seed)
        parts = recipe.build(plan)
        reward = parts.reward
    else:
        plan, parts, reward = build(method, seed, lr, [*guard, *overrides])
    monitor, judge, seen = ImageMonitor(seed=seed, tower=parts.tower), embedded_panel().classifier, []

    def look(model, prompts, ids) -> dict[str, float]:
        witness = Witness(model)
        values = monitor(witness, prompts, ids)
        read = judge.concept(torch.cat(witness.images))
        right = label_correct(read, judge.concepts, [parse_prompt(prompt).concept for prompt in prompts])
        seen.append({"concept": float(right.double().mean()), **values})
        return values

    with tempfile.TemporaryDirectory() as folder:
        outcome = whole(
            train(
                parts.model,
                parts.algorithm,
                reward,
                parts.prompts,
                folder=folder,
                progress=False,
                preview=parts.preview_prompts,
                check=look,
                **vars(plan.trainer),
            )
        )
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    checks = [row for row in log if row["event"] == "guard"]
    return {
        "method": method,
        "seed": seed,
        "stopped": outcome.reason.startswith("guard"),
        "step": outcome.step,
        "why": outcome.reason,
        "kept": checks[-1]["best_step"],
        "seen": [[row["step"], values] for row, values in zip(checks, seen, strict=True)],
    }


def images_table(rows: list[dict], results: Path) -> str:
    """The image guard's runs beside what the judged guard did with the same ones."""
    lines = [
        "| run | the judged guard stopped after | without a judge, stopped after | why | kept step "
        "| concept in its 48 pictures: base, kept, at the stop |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        judged = [found for _, found in made_in(results, f"{slug('guard', row['method'], row['seed'])}-*.json")]
        before = judged[0]["step"] if judged else "not stopped"
        concept = {step: values["concept"] for step, values in row["seen"]}
        stop = f"{row['step']}" if row["stopped"] else f"not stopped ({row['step']})"
        why = row["why"].removeprefix("guard: ") if row["stopped"] else "-"
        lines.append(
            f"| {row['method']}, seed {row['seed']} | {before} | {stop} | {why} | {row['kept']} "
            f"| {concept[0]:.3f}, {concept[row['kept']]:.3f}, {concept[row['step']]:.3f} |"
        )
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    lines = [
        "| run | stopped by the guard, after updates | kept step | concept: base | kept checkpoint (change, 95 %) "
        "| without a guard, twice the updates | fell by less than .05, by the whole interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        change = row["guarded"] - row["base"]
        stopped = f"{row['why'].removeprefix('guard: ')}, {row['step']}" if row["stopped"] else f"no ({row['step']})"
        lines.append(
            f"| {row['method']}, seed {row['seed']} | {stopped} | {row['kept']} | {row['base']:.3f} "
            f"| {row['guarded']:.3f} ({change:+.3f}, {row['change_low']:+.3f} to {row['change_high']:+.3f}) "
            f"| {row['unguarded']:.3f} | {_verdict(row)} |"
        )
    good = sum(_verdict(row) == "yes" for row in rows)
    worst = min((row["guarded"] - row["base"] for row in rows), default=float("nan"))
    idle = sum(row["kept"] == 0 for row in rows)
    lines += [
        "",
        f"{good} of {len(rows)} runs kept a trained checkpoint that lost less than {LIMIT}, by its whole interval; "
        f"{idle} were put back to the base model before any look had passed; the worst change {worst:+.3f}; without a "
        f"guard {np.mean([row['unguarded'] - row['base'] for row in rows]):+.3f} on average.",
    ]
    return "\n".join(lines)


def _verdict(row: dict) -> str:
    """Whether the kept checkpoint fell by less than LIMIT, by the lower end of its change's interval."""
    if row["kept"] == 0:
        return "the base itself"
    return "yes" if row["change_low"] > -LIMIT else "no"


def image_rows(args: argparse.Namespace) -> list[Row]:
    """The runs that over-optimise, then the good one, for --measures images."""
    good = (GOOD, 0, 0.0, 25 if not args.quick else 1, 50 if not args.quick else 1, args.override)
    runs = [
        (method, seed, args.factor * rate(method, args.results), args.every, args.steps, args.override)
        for seed in args.seeds
        for method in args.methods
    ]
    return [
        Row(
            args.results / f"{slug('guard-images', method, seed)}.json",
            without_judge,
            (method, seed, *rest),
            recipe=settings(method),
        )
        for method, seed, *rest in [*runs, good]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(UNHELD), choices=list(UNHELD))
    parser.add_argument("--factor", type=float, default=3.0, help="times the tuned, or the recipe's, learning rate")
    parser.add_argument("--every", type=int, default=2, help="steps between two looks of the guard")
    parser.add_argument("--steps", type=int, default=60, help="at most")
    parser.add_argument("--measures", choices=["judge", "images"], default="judge", help="what the guard looks at")
    parser.add_argument("--prompts", type=int, default=96, help="to judge on, two images each")
    parser.add_argument("--override", nargs="*", default=[], help="for every run")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.every, args.steps, args.prompts = args.seeds[:1], 1, 1, 4
        args.override += ["trainer.batch_size=2", "trainer.guard.prompts=4"]
    if args.measures == "images":
        text = images_table(measured(image_rows(args), args.jobs, minutes=args.minutes), args.results)
        write_table(args.results / "guard-images.md", text)
        print(text)
        return
    rows = [
        Row(
            args.results / f"{slug('guard', method, seed, args.factor)}.json",
            over_optimise,
            (
                method,
                seed,
                args.factor * rate(method, args.results),
                args.every,
                args.steps,
                args.prompts,
                args.override,
            ),
            recipe=settings(method),
        )
        for seed in args.seeds
        for method in args.methods
    ]
    text = table(measured(rows, args.jobs, minutes=args.minutes))
    write_table(args.results / "guard.md", text)
    print(text)


if __name__ == "__main__":
    main()
