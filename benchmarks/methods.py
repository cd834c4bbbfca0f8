"""What the comparisons share: the methods, one objective for all, a count of denoiser forwards, a measure.

The objective of every method is the same preference, (1 + k) R("style. prompt") - R("negative. prompt") with k = 4
(with k = 1 the concepts are lost before the style is there: docs/log.md). SRPO reads it as its control words, the
others as their reward. All adapt the same layers with the same rank, train the unguided prediction and are judged with
guidance, without a warm-up, and no method keeps a weight average, so that the weights which are trained are judged
(tasks.py says where a task has its own settings). Learning rates are those that `comparison.py tune` found and wrote
into RESULTS/tuned.json; otherwise the recipes'.

A run is a row of a table, a JSON file in RESULTS that is not made again (rows.py). --jobs 2 makes two at once, each
in a process of its own with one thread, which is how two cores do most; so a row's numbers do not depend on --jobs. A
run whose loss is not finite ends with what it had measured.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rows import tuned
from tasks import STYLE, TASKS, Task, needs_gradient
from torch import Tensor

from palate import recipe
from palate.core import Batch, Loss, Random, Reward, TwoTower
from palate.evaluate import EvaluationPanel, diversity, embedded_panel, generate, label_correct, pairs, quantise
from palate.models.vocabulary import known_words, vocabulary, with_article
from palate.path import Prediction
from palate.report import ticks
from palate.rewards.simple import high_frequency, saturation
from palate.train import NonFiniteError, Outcome, train

METHODS = {  # name -> recipe
    "SRPO": "srpo-emoji",
    "SQDF": "sqdf-emoji",
    "ReFL": "refl-emoji",
    "DRaFT-LV": "draft-emoji",
    "DDPO": "ddpo-emoji",
    "Flow-GRPO": "grpo-emoji",
    "DanceGRPO": "dance-grpo-emoji",
    "MixGRPO": "mix-grpo-emoji",
    "DiffusionNFT": "nft-emoji",
    "Diffusion-DPO": "dpo-emoji",
    "online DPO": "dpo-emoji-online",
    "DGPO": "dgpo-emoji",
    "AWM": "awm-emoji",
    "LeapAlign": "leap-emoji",
    "DRaFT-1": "draft-emoji",
    "Flow-GRPO released": "grpo-emoji-released",
}
WORDS = {"srpo": TASKS["style"].words}  # these read control words, not a reward made of them
QUICK = {
    "ddpo": ["algorithm.steps=3"],
    "flow_grpo": ["algorithm.steps=4", "algorithm.group=2"],
    "nft": ["algorithm.steps=3", "algorithm.group=2"],
    "dpo": ["algorithm.steps=3"],
    "dgpo": ["algorithm.steps=3", "algorithm.group=2"],
    "leap_align": ["algorithm.steps=3"],
}  # --quick, by family
FIXED = {
    "DRaFT-1": ["algorithm.n=0"],  # its recipe is DRaFT-LV
    "MixGRPO": ["algorithm.window_every=3"],  # its few updates then visit all levels, as its recipe's many do
    # alpha is twice the rank that all have, as its 64 of 32. Its rate of 3e-4 belongs to a model of 2.5 billion
    # parameters: in 4,000 forwards neither it nor twice as much moves this one. The search begins at grpo-emoji's.
    "Flow-GRPO released": ["model.lora_alpha=8", "trainer.lr=4e-3"],
}
PLAIN = ["trainer.ema_decay=0", "trainer.guard.every=0", "trainer.preview_every=0", "trainer.checkpoint_every=0"]
FAIR = [
    "model.lora_rank=4",
    "model.lora_targets=[attn2.to_k, attn2.to_v, time_emb_proj]",
    "trainer.warmup=0",
    "algorithm.guidance=1",
]


def available() -> list[str]:
    """The methods whose recipe this version has."""
    return [name for name, source in METHODS.items() if source in recipe.published()]


def first_rate(method: str) -> float:
    """The learning rate that a search begins with: the recipe's, or what is FIXED."""
    return recipe.read(METHODS[method], FIXED.get(method, [])).trainer.lr


class Counted:
    """A model that counts denoiser evaluations, batch rows x network calls: a guided predict runs the network twice."""

    def __init__(self, model: Any):
        self.model, self.counting = model, True
        self.forwards = self.differentiated = 0

    def predict(
        self, xt: Tensor, t: Tensor, cond: Any, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        if self.counting:
            rows = len(xt) * (1 if guidance == 1 else 2)
            self.forwards += rows
            self.differentiated += rows * torch.is_grad_enabled()
        return self.model.predict(xt, t, cond, guidance=guidance, weights=weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class CountedReward:
    """A reward that counts the images that it looks at; a two-tower one stays one."""

    def __init__(self, reward: Any):
        self.reward, self.images = reward, 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.images += len(images)
        return self.reward(images, prompts)


class CountedTowers(CountedReward):
    """Several texts that share one look at the images count it once."""

    @property
    def score(self) -> Callable[[Any, Sequence[str]], Tensor]:
        return self.reward.score

    @property
    def image_features(self) -> Callable[[Tensor], Any]:
        def features(images: Tensor) -> Any:
            self.images += len(images)
            return self.reward.image_features(images)

        return features


def counted(reward: Reward) -> Any:
    """The reward with a count of the images that it is shown."""
    return CountedTowers(reward) if isinstance(reward, TwoTower) else CountedReward(reward)


class Watched:
    """An algorithm, with a function of the step that is called after each of its updates."""

    def __init__(self, algorithm: Any, before: Callable[[], None], after: Callable[[int], None]):
        self.algorithm, self.before, self.after, self.trains = algorithm, before, after, algorithm.trains

    def step(self, model: Any, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        self.before()
        yield from self.algorithm.step(model, reward, batch, rng)
        self.after(rng.step)


class Referees(NamedTuple):
    """Who judges, on what, for which task. `base` are the base model's measurements from the same noise, filled at the
    first check."""

    panel: EvaluationPanel
    prompts: list[str]
    seeds: tuple[int, ...]
    base: dict[str, Any]
    task: Task = TASKS["style"]


@cache
def referees(count: int, seeds: tuple[int, ...], tuning: bool = False, task: str = "style") -> Referees:
    """Loaded once a process, with the base model's measurements. tuning: on prompts that no table uses."""
    own = TASKS[task].prompts
    if own is not None:
        prompts = recipe.evenly_spaced(own(tuning)[::-1] if tuning else own(False), count)
    elif tuning:
        prompts = beside_eval(count)
    else:
        prompts = recipe.evenly_spaced(recipe.read_prompts("emoji-eval"), count)
    return Referees(embedded_panel(), prompts, seeds, {}, TASKS[task])


def eval_like(count: int) -> list[str]:
    """emoji-eval, then more of "a CONCEPT on a COLOUR background" that no prompt list holds, spread over the rest."""
    ours = recipe.read_prompts("emoji-eval")
    known = {tuple(known_words(prompt)) for prompt in (*ours, *recipe.read_prompts("emoji-train"))}
    vocab = vocabulary()
    more = [
        f"{with_article(concept)} on {with_article(colour)} background"
        for colour in vocab.colours
        for concept in vocab.concepts
    ]
    free = [prompt for prompt in more if tuple(known_words(prompt)) not in known]  # whatever the article is
    return ours + recipe.evenly_spaced(free, count - len(ours)) if count > len(ours) else ours[:count]


def beside_eval(count: int) -> list[str]:
    """`count` prompts like those of emoji-eval that neither it nor emoji-train holds."""
    ours = len(recipe.read_prompts("emoji-eval"))
    return eval_like(ours + count)[ours:]


def with_style(prompt: str, style: str) -> str:
    """The prompt of one thing with the style named: "an apple on blue" is "a 3d apple on blue"."""
    return with_article(f"{style} {prompt.removeprefix('an ').removeprefix('a ')}")


objective = TASKS["style"].objective


@torch.no_grad()
def measure(model: Any, who: Referees, weights: str = "policy") -> dict[str, list[float]]:
    """One value a prompt (means over seeds): the optimised objective, the task's goal by what is held out, style share,
    concept, diversity inside the prompt and style (with two seeds), drift (judge's cosine distance from the base's
    image), colour cast and fine detail against the base's image, saturation; "again", the task's second look."""
    panel, (words, _) = who.panel, pairs(who.prompts, who.seeds)
    images = quantise(generate(model, who.prompts, who.seeds, weights=weights, guidance=who.task.guidance))
    found: dict[str, list[Tensor]] = {}
    optimised, goal = who.task.objective(panel.rewards["emoji"]), who.task.goal(panel.rewards[panel.heldout])
    again = who.task.again() if who.task.again is not None else None
    for start in range(0, len(images), 64):
        batch, text = images[start : start + 64], words[start : start + 64]
        seen = panel.classifier.style(batch)
        captions = [panel.parse(prompt) for prompt in text]
        for name, value in {
            "reward": optimised(batch, text),
            "heldout": goal(batch, text),
            "style": (seen == panel.classifier.styles.index(STYLE)).double(),
            "concept": label_correct(
                panel.classifier.concept(batch), panel.classifier.concepts, [c.concept for c in captions]
            ),
            "saturation": saturation(batch),
            "detail": high_frequency(batch),
            "colour": batch.mean((2, 3)),
            "kind": seen,
            "features": panel.classifier.features(batch),
            **({"again": again(batch, text)} if again is not None else {}),
        }.items():
            found.setdefault(name, []).append(value.double())
    columns = {name: torch.cat(parts) for name, parts in found.items()}
    features, kinds, colour = columns.pop("features"), columns.pop("kind"), columns.pop("colour")
    if "features" not in who.base:  # the first measurement is that of the base
        who.base.update(features=features, colour=colour)
    shift = colour - who.base["colour"]
    columns["cast"] = (shift - shift.mean(1, keepdim=True)).norm(dim=1)  # the grey part is no cast
    columns["drift"] = 1 - torch.nn.functional.cosine_similarity(features, who.base["features"], dim=1)
    rows = {name: column.view(len(who.prompts), -1).mean(1) for name, column in columns.items()}
    if len(who.seeds) > 1:
        rows["diversity"] = diversity(features, words, kinds.tolist())
    return {name: [round(float(x), 6) for x in values] for name, values in rows.items()}


class Check(NamedTuple):
    """Where a run stood after some updates."""

    updates: int
    forwards: int
    differentiated: int
    seconds: float  # of training, on this machine
    values: dict[str, list[float]]  # `measure`
    scored: int = 0  # images that the reward has looked at
    processor: float = 0.0  # seconds of the training, of all threads

    def mean(self, name: str) -> float:
        return float(np.nanmean(self.values[name]))


class Enough(Exception):
    """The run has what it needs."""


def whole(outcome: Outcome) -> Outcome:
    """The outcome of a run that went to its end; RuntimeError for one that a signal ended early, which is no row."""
    if outcome.exit_code:
        raise RuntimeError(f"stopped by a {outcome.reason} at step {outcome.step}; its row is not kept")
    return outcome


def plan_of(method: str, task: Task, overrides: Sequence[str] = ()) -> recipe.Recipe:
    """The recipe that the comparisons train."""
    source = METHODS[method]
    own = list(task.words) if recipe.read(source).algorithm.name in WORDS else []
    return recipe.read(source, [*own, *PLAIN, *FAIR, *FIXED.get(method, []), *task.fixed.get(method, []), *overrides])


@cache
def settings(method: str, task: str = "style") -> str:
    """The fingerprint of `plan_of`, which a row keeps beside its own overrides."""
    return recipe.fingerprint(plan_of(method, TASKS[task]))[:16]


def fingerprints(*names: str) -> str:
    """The fingerprints of recipes, which a row keeps."""
    return " ".join(recipe.fingerprint(recipe.read(name))[:16] for name in names)


def trained(plan: recipe.Recipe) -> Any:
    """The model after the recipe's training."""
    torch.manual_seed(plan.trainer.seed)  # LoRA's first weights
    parts = recipe.build(plan)
    with tempfile.TemporaryDirectory() as folder:
        whole(train(parts.model, parts.algorithm, parts.reward, parts.prompts, folder=folder, progress=False,
                    **vars(plan.trainer)))  # fmt: skip
    return parts.model


def watch(
    method: str,
    seed: int,
    who: Referees,
    *,
    budget: int,
    checks: int,
    overrides: Sequence[str] = (),
    done: Callable[[Check], bool] = lambda check: False,
    looked_at: Callable[[Any, str], None] | None = None,
) -> list[Check]:
    """Train the method from the base model for `budget` denoiser forwards and measure it `checks` times on the way, and
    once before; stops early when `done`, or when the loss is no longer finite. Forwards of the measuring do not count.
    looked_at: called with the model and the weights' name at each measurement.
    """
    source = METHODS[method]
    plan = plan_of(method, who.task, [*overrides, f"trainer.seed={seed}"])
    family = plan.algorithm.name
    torch.manual_seed(seed)  # LoRA's first weights
    parts = recipe.build(plan)
    model = Counted(parts.model)
    if family in WORDS and who.task.own_words:
        looked = reward = counted(parts.reward)
    elif who.task.soft is not None and needs_gradient(source):
        looked = reward = counted(who.task.soft())
    elif family in WORDS or who.task is not TASKS["style"]:
        looked = reward = counted(who.task.objective(parts.reward))
    else:
        looked = counted(parts.reward)
        reward = objective(looked)
    prompts = parts.prompts if who.task.prompts is None else who.task.prompts(True)
    found: list[Check] = []
    clock = {"trained": 0.0, "began": 0.0, "processor": 0.0, "cpu": 0.0}

    def check(updates: int) -> None:
        model.counting = False
        if "values" not in who.base:
            who.base["values"] = measure(model, who, weights="reference")
        values = measure(model, who) if updates else who.base["values"]
        if looked_at is not None:
            looked_at(model, "policy" if updates else "reference")
        model.counting = True
        found.append(
            Check(updates, model.forwards, model.differentiated, round(clock["trained"], 2), values, looked.images,
                  round(clock["processor"], 2))
        )  # fmt: skip

    def before() -> None:
        clock["began"], clock["cpu"] = time.perf_counter(), time.process_time()

    def after(step: int) -> None:
        clock["trained"] += time.perf_counter() - clock["began"]
        clock["processor"] += time.process_time() - clock["cpu"]
        if model.forwards >= budget * len(found) / checks:
            check(step)
            if model.forwards >= budget or done(found[-1]):
                raise Enough

    check(0)
    endless = {**vars(plan.trainer), "steps": 10**6}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough, NonFiniteError):
        whole(
            train(
                model,
                Watched(parts.algorithm, before, after),
                reward,
                prompts,
                folder=folder,
                progress=False,
                **endless,
            )
        )
    return found


def about(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean and, with more than one, the standard deviation of a sample."""
    deviation = f" ± {form.replace('+', '').format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + deviation


def small(method: str) -> list[str]:
    """Overrides of --quick: the least that still runs the method."""
    return ["trainer.batch_size=2", *QUICK.get(recipe.read(METHODS[method]).algorithm.name, [])]


def rate(method: str, results: Path, task: str = "style") -> float:
    """The learning rate that the task fixes; else what `comparison.py tune` found for it, for the style task, the
    recipe's."""
    if method in TASKS[task].fixed:
        return plan_of(method, TASKS[task]).trainer.lr
    found = tuned(results)
    return found.get(f"{task}: {method}") or found.get(f"style: {method}") or first_rate(method)


def slug(*parts: object) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else "_" for c in str(part)) for part in parts)


def scatter(
    title: str,
    x_name: str,
    y_name: str,
    series: dict[str, list[tuple[float, float]]],
    lines: dict[str, list[tuple[float, float]]],
) -> str:
    """An SVG of points and of lines, a colour and a mark for each name."""
    width, height, left, right, top, bottom = 760, 440, 70, 170, 44, 56
    colours = ("#c2410c", "#1b9e77", "#7570b3", "#e6ab02", "#377eb8", "#666", "#a6761d", "#e7298a", "#66a61e", "#111")
    every = [p for points in [*series.values(), *lines.values()] for p in points if all(map(math.isfinite, p))]
    spans = []
    for axis in (0, 1):
        low, high = min(p[axis] for p in every), max(p[axis] for p in every)
        pad = max((high - low) * 0.06, 1e-6)
        spans.append((low - pad, high + pad))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        return (
            round(left + (width - left - right) * (point[0] - x0) / (x1 - x0), 1),
            round(height - bottom - (height - top - bottom) * (point[1] - y0) / (y1 - y0), 1),
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#444"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="{left}" y="22" font-size="14">{title}</text>'
        f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">{x_name}</text>'
        f'<text transform="translate(16 {height / 2}) rotate(-90)" text-anchor="middle">{y_name}</text>'
    ]
    for value in ticks(*spans[0]):
        x, _ = place((value, spans[1][0]))
        out.append(
            f'<line x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}" stroke="#e4e4e4"/>'
            f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{value:g}</text>'
        )
    for value in ticks(*spans[1]):
        _, y = place((spans[0][0], value))
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>'
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        )
    for i, name in enumerate(series):
        colour = colours[i % len(colours)]
        path = " ".join(f"{x},{y}" for x, y in (place(p) for p in lines.get(name, []) if all(map(math.isfinite, p))))
        if path:
            out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        for x, y in (place(p) for p in series[name] if all(map(math.isfinite, p))):
            shape = (
                f'<circle cx="{x}" cy="{y}" r="3.4"'
                if i % 2 == 0
                else f'<rect x="{x - 3}" y="{y - 3}" width="6" height="6"'
            )
            out.append(f'{shape} fill="{colour}" fill-opacity=".75"/>')
        y = top + 8 + 18 * i
        out.append(
            f'<rect x="{width - right + 16}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{width - right + 32}" y="{y}">{name}</text>'
        )
    return "".join([*out, "</svg>\n"])


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those that every benchmark takes; --quick leaves the real results alone."""
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--jobs", type=int, default=2, help="rows at once, in processes of one thread; 0: in this one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no row is begun later than this")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs; results go to a scratch folder")
    args = parser.parse_args()
    if args.quick:
        args.results = Path(tempfile.mkdtemp(prefix="palate-quick-"))
    return args
