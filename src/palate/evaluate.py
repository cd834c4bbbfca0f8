"""Fixed prompts x seeds, judged: rewards, concept, style and background, diversity in a prompt, drift from the base.

Everything is measured per image or per prompt first, so that two models that drew from the same noise are compared in
pairs and every mean has an interval. The optimised reward stands beside those that were not optimised: when the
first rises and the others fall, the run is over-optimised.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from palate.core import Cond, Model, Random, Reward
from palate.rewards import simple

CLOSED_FORM = {
    f.__name__: f
    for f in (simple.saturation, simple.brightness, simple.warmth, simple.colourfulness, simple.high_frequency)
}
CONCEPT_LIMIT, DIVERSITY_LIMIT = (
    0.03,
    0.85,
)  # the verdict warns past a fall of .03 and below .85 of the base's diversity


class Judge(Protocol):
    """A network that was never optimised against. Features for distances, and names for what it sees."""

    styles: list[str]
    concepts: list[str]

    def features(self, images: Tensor) -> Tensor: ...  # (B, D)
    def concept(self, images: Tensor) -> Tensor: ...  # (B,) index into concepts
    def style(self, images: Tensor) -> Tensor: ...  # (B,) index into styles


class Sampler(Protocol):
    """How an algorithm draws from its policy: `steps` evaluations without guidance, each with a noise of its own."""

    steps: int

    def __call__(self, model: Model, cond: Cond, noises: Sequence[Tensor], *, weights: str = "policy") -> Tensor: ...


class Caption(Protocol):
    """What a prompt asks for; None = not said."""

    concept: str | None
    style: str | None
    background: str | None


class Referee(NamedTuple):
    """Everyone who judges a run. `heldout` names the reward that no recipe may optimise."""

    rewards: dict[str, Reward]
    heldout: str
    judge: Judge
    parse: Callable[[str], Caption]
    background: Callable[[Tensor], Tensor]  # images -> (B,) index into colours
    colours: Sequence[str]


def embedded_referee() -> Referee:
    """The rewards, judge and background oracle that come with the package."""
    from palate.rewards import emoji

    rewards: dict[str, Reward] = {name: emoji.load_reward(name) for name in ("emoji", "emoji-heldout")}
    rewards["jpeg_size"] = simple.jpeg_size
    return Referee(rewards, "emoji-heldout", emoji.Judge(), emoji.parse_prompt, emoji.background, list(emoji.COLOURS))


# --- the metrics, as functions of tensors ---------------------------------------------------------------------------


def diversity(features: Tensor, groups: Sequence, labels: Sequence | None = None) -> Tensor:
    """(P,) mean pairwise cosine distance 1 - cos between the features (N, D) inside each group (a group = a prompt).

    0 = all alike, 1 = orthogonal. One value a group in order of first appearance; NaN for a group without a pair. With
    `labels` (a style an image) only pairs of equal label count: a model that was told to keep to one style loses the
    distance between styles by design, and this leaves it out.
    """
    unit = F.normalize(features.double(), dim=1)
    kinds = None if labels is None else torch.from_numpy(_labels(labels))
    values = []
    for rows in _members(groups):
        apart = (1 - unit[rows] @ unit[rows].T).clamp_min(0)  # rounding may leave -1e-16
        counted = ~torch.eye(len(rows), dtype=torch.bool)
        if kinds is not None:
            counted &= kinds[rows][:, None] == kinds[rows]
        values.append(apart[counted].mean())  # NaN without a pair
    return torch.stack(values)


def vendi(features: Tensor) -> float:
    """Vendi score (Friedman and Dieng 2023) of N feature rows under the cosine kernel K: exp(-sum l log l) over the
    eigenvalues l of K / N. The effective number of different images: 1 = all alike, N = all orthogonal."""
    unit = F.normalize(features.double(), dim=1)
    gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit  # the same non-zero eigenvalues
    values = torch.linalg.eigvalsh(gram / unit.shape[0])
    values = values[values > 1e-12]
    return float(torch.exp(-(values * values.log()).sum()))


def drift(images: Tensor, base_images: Tensor, features: Tensor, base_features: Tensor) -> dict[str, float]:
    """How far the images went from the base model's for the same noise: mean paired cosine distance of features, and
    the ratios (1 = unchanged) of mean saturation, mean colour per channel and high-frequency energy."""
    distance = 1 - F.cosine_similarity(features.double(), base_features.double(), dim=1)
    result = {"feature_distance": float(distance.clamp_min(0).mean())}
    means = {"saturation": (simple.saturation(images), simple.saturation(base_images))}
    for channel, name in enumerate(("red", "green", "blue")):
        means[name] = (images[:, channel], base_images[:, channel])
    means["high_frequency"] = (simple.high_frequency(images), simple.high_frequency(base_images))
    for name, (now, before) in means.items():
        result[f"{name}_ratio"] = (float(now.double().mean()) + 1e-9) / (float(before.double().mean()) + 1e-9)
    return result


def matches(predicted: Tensor, names: Sequence[str], wanted: Sequence[str | None]) -> Tensor:
    """(B,) 1 where names[predicted] is what was wanted, 0 where it is not, NaN where nothing was asked for."""
    return torch.tensor(
        [math.nan if want is None else float(names[int(i)] == want) for i, want in zip(predicted, wanted, strict=True)]
    )


def concept_accuracy(judge: Judge, images: Tensor, captions: Sequence[Caption]) -> float:
    """Share of the images whose concept the judge reads as the prompt says; NaN when no prompt names one."""
    return float(matches(judge.concept(images), judge.concepts, [c.concept for c in captions]).nanmean())


def background_accuracy(predicted: Tensor, colours: Sequence[str], captions: Sequence[Caption]) -> float:
    """Share of the images with the background that the prompt names; NaN when no prompt names one."""
    return float(matches(predicted, colours, [c.background for c in captions]).nanmean())


def style_share(judge: Judge, images: Tensor) -> dict[str, float]:
    """Share of the images that the judge assigns to each style. The shares sum to 1."""
    counts = torch.bincount(judge.style(images).long().cpu(), minlength=len(judge.styles))
    return {name: int(count) / len(images) for name, count in zip(judge.styles, counts, strict=True)}


def bootstrap_interval(
    values: Tensor,
    base: Tensor | None = None,
    *,
    groups: Sequence | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (N,), or of values - base in pairs. NaNs are left out.

    With two or more `groups` whole groups are resampled (images of one prompt are not independent)."""
    data = np.asarray(values, dtype=np.float64) - (0.0 if base is None else np.asarray(base, dtype=np.float64))
    labels = np.arange(len(data)) if groups is None or len(set(groups)) < 2 else _labels(groups)
    labels, data = labels[~np.isnan(data)], data[~np.isnan(data)]
    if not len(data):
        return math.nan, math.nan
    _, labels = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(labels, data), np.bincount(labels)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _labels(groups: Sequence) -> np.ndarray:
    """Integer labels in order of first appearance."""
    order: dict[Any, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups])


def _members(groups: Sequence) -> list[list[int]]:
    labels = _labels(groups)
    return [np.flatnonzero(labels == label).tolist() for label in range(labels.max(initial=-1) + 1)]


# --- judging a set of images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """`summary`: every metric with its interval. `rows`: one dict an image. Both are plain JSON values."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return plain({**self.summary, "rows": self.rows})


def plain(value: Any) -> Any:
    """JSON values with floats at 6 significant digits; NaN becomes None. So files are JSON and repeat bytewise."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def to_json(value: Any) -> str:
    """Deterministic text: sorted keys, rounded floats."""
    return json.dumps(plain(value), sort_keys=True, indent=1, allow_nan=False) + "\n"


class _Columns(NamedTuple):
    values: dict[str, Tensor]  # name -> (N,), NaN where the question does not arise
    features: Tensor  # (N, D)
    styles: list[str]  # what the judge saw


@torch.no_grad()
def _columns(images, prompts, *, rewards, judge, parse, background, colours, batch_size=64) -> _Columns:
    """Every per-image measurement, in batches."""
    parts: list[dict[str, Tensor]] = []
    features, styles = [], []
    for start in range(0, len(images), batch_size):
        batch, words = images[start : start + batch_size], list(prompts[start : start + batch_size])
        part = {f"reward/{name}": _call(name, reward, batch, words) for name, reward in rewards.items()}
        part |= {name: measure(batch) for name, measure in CLOSED_FORM.items()}
        seen = judge.style(batch).long().cpu()
        if parse is not None:
            captions = [parse(prompt) for prompt in words]
            part["concept"] = matches(judge.concept(batch), judge.concepts, [c.concept for c in captions])
            part["style_named"] = matches(seen, judge.styles, [c.style for c in captions])
            if background is not None:
                part["background"] = matches(background(batch), colours, [c.background for c in captions])
            free = torch.tensor([c.style is None for c in captions])
        else:
            free = torch.ones(len(batch), dtype=torch.bool)
        for index, name in enumerate(judge.styles):  # shares only where the prompt leaves the style open
            part[f"style/{name}"] = torch.where(free, (seen == index).double(), math.nan)
        parts.append({name: value.detach().double().cpu() for name, value in part.items()})
        features.append(judge.features(batch).detach().double().cpu())
        styles += [judge.styles[int(i)] for i in seen]
    return _Columns({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(features), styles)


def _call(name: str, reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    value = reward(images, prompts)
    if value.shape != (len(images),):
        raise ValueError(
            f"reward {name!r} returned shape {tuple(value.shape)}; expected ({len(images)},), one value an image"
        )
    if not bool(value.isfinite().all()):
        raise ValueError(
            f"reward {name!r} returned a value that is not finite for prompt "
            f"{prompts[int((~value.isfinite()).nonzero()[0])]!r}"
        )
    return value


def evaluate_images(
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    rewards: dict[str, Reward],
    judge: Judge,
    parse: Callable[[str], Caption] | None = None,
    background: Callable[[Tensor], Tensor] | None = None,
    colours: Sequence[str] = (),
    base: Tensor | None = None,
) -> Evaluation:
    """Judge images (N, 3, H, W), image i drawn for prompts[i] with seeds[i]. `base`: the base model's images for the
    same prompts and noise; with it every metric also has its base value and paired difference, and drift is measured.

    Metrics: reward/<name>; concept, background (share right); style/<name> (share where the prompt leaves it open),
    style_named (share right where it does not); diversity and vendi inside a prompt, diversity_same_style of the
    pairs of one style; closed-form image statistics.
    """
    if not len(images) == len(prompts) == len(seeds) or not len(images):
        raise ValueError(
            f"got {len(images)} images, {len(prompts)} prompts, {len(seeds)} seeds; expected one of each an image"
        )
    if base is not None and base.shape != images.shape:
        raise ValueError(
            f"base images have shape {tuple(base.shape)}; expected {tuple(images.shape)}, one for each image"
        )
    ask = {"rewards": rewards, "judge": judge, "parse": parse, "background": background, "colours": colours}
    now = _columns(images, prompts, **ask)
    before = None if base is None else _columns(base, prompts, **ask)

    metrics = {name: _metric(column, before and before.values[name], prompts) for name, column in now.values.items()}
    spread = _inside_prompts(now, prompts)
    spread_before = None if before is None else _inside_prompts(before, prompts)
    for name, column in spread.items():
        metrics[name] = _metric(column, spread_before and spread_before[name], None)
    summary: dict[str, Any] = {
        "images": len(images),
        "prompts": len(set(prompts)),
        "seeds": sorted(set(int(s) for s in seeds)),
        "metrics": {name: metric for name, metric in metrics.items() if not math.isnan(metric["value"])},
    }
    rows = [{"prompt": p, "seed": int(s), **_row(now, i)} for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))]
    if before is not None:
        summary["drift"] = drift(images, base, now.features, before.features)
        for i, row in enumerate(rows):
            row["base"] = _row(before, i)
            row["feature_distance"] = float(1 - F.cosine_similarity(now.features[i], before.features[i], dim=0))
    return Evaluation(plain(summary), plain(rows))


def _inside_prompts(columns: _Columns, prompts: Sequence[str]) -> dict[str, Tensor]:
    scores = [vendi(columns.features[rows]) if len(rows) > 1 else math.nan for rows in _members(prompts)]
    return {
        "diversity": diversity(columns.features, prompts),
        "diversity_same_style": diversity(columns.features, prompts, columns.styles),
        "vendi": torch.tensor(scores, dtype=torch.float64),
    }


def _metric(values: Tensor, base: Tensor | None, groups: Sequence[str] | None) -> dict[str, float]:
    low, high = bootstrap_interval(values, groups=groups)
    metric = {"value": float(values.nanmean()), "low": low, "high": high}
    if base is not None:
        base_low, base_high = bootstrap_interval(base, groups=groups)
        metric |= {"base": float(base.nanmean()), "base_low": base_low, "base_high": base_high}
        low, high = bootstrap_interval(values, base, groups=groups)
        metric |= {"change": float((values - base).nanmean()), "change_low": low, "change_high": high}
    return metric


def _row(columns: _Columns, i: int) -> dict[str, Any]:
    """One image's measurements; questions that do not arise for its prompt are left out."""
    values = {
        n: float(c[i]) for n, c in columns.values.items() if not n.startswith("style/") and not math.isnan(float(c[i]))
    }
    return {**values, "style": columns.styles[i]}


# --- drawing the images ---------------------------------------------------------------------------------------------


def pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """The rows of prompts x seeds, all seeds of the first prompt first, as `generate` draws them."""
    return [p for p in prompts for _ in seeds], [int(s) for _ in prompts for s in seeds]


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    weights: str = "policy",
    batch_size: int = 32,
    sampler: Sampler | None = None,
) -> Tensor:
    """Images (len(prompts) * len(seeds), 3, H, W) on the CPU, in the order of `pairs`. The noise is a function of
    (seed, index of the prompt) alone: every model and batch size starts from the same. None = the model's default;
    a `sampler` takes the place of steps and guidance."""
    words, _ = pairs(prompts, seeds)
    rows = [Random(int(s), 0, [i]) for i in range(len(prompts)) for s in seeds]
    noises = _noises(rows, "evaluate", model.latent_shape, sampler)
    return _draw(model, words, noises, steps=steps, guidance=guidance, weights=weights, batch_size=batch_size, sampler=sampler)


def _noises(rows: Sequence[Random], purpose: str, shape: Sequence[int], sampler: Sampler | None) -> list[Tensor]:
    """What sampling starts from, and for a sampler that needs more than one noise the others."""
    purposes = [purpose, *(f"{purpose}-{k}" for k in range(1, sampler.steps if sampler else 1))]
    return [torch.cat([row.normal(name, shape) for row in rows]) for name in purposes]


def _draw(model, prompts, noises, *, steps, guidance, weights, batch_size, sampler) -> Tensor:
    from palate.sampling import sample

    steps = model.default_steps if steps is None else steps
    guidance = model.default_guidance if guidance is None else guidance
    own = next((p.device for p in model.parameters("policy")), torch.device("cpu"))
    device = getattr(model, "device", own)  # a frozen model has no parameters to ask
    images = []
    for start in range(0, len(prompts), batch_size):
        cond = model.encode_prompts(list(prompts[start : start + batch_size]))
        parts = [noise[start : start + batch_size].to(device) for noise in noises]
        if sampler is None:
            latents = sample(model, cond, parts[0], steps, guidance=guidance, weights=weights)
        else:
            latents = sampler(model, cond, parts, weights=weights)
        images.append(model.decode(latents).float().cpu())
    return torch.cat(images)


def evaluate_model(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    referee: Referee | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    weights: str = "policy",
    base_weights: str | None = None,
) -> Evaluation:
    """Draw prompts x seeds and judge them; with `base_weights` ("reference") in pairs against those weights."""
    referee = referee or embedded_referee()
    images = quantise(generate(model, prompts, seeds, steps=steps, guidance=guidance, weights=weights))
    base = None
    if base_weights is not None:
        base = quantise(generate(model, prompts, seeds, steps=steps, guidance=guidance, weights=base_weights))
    return _referee_images(images, *pairs(prompts, seeds), referee=referee, base=base)


def _referee_images(images, prompts, seeds, *, referee: Referee, base) -> Evaluation:
    return evaluate_images(
        images,
        prompts,
        seeds,
        rewards=referee.rewards,
        judge=referee.judge,
        parse=referee.parse,
        background=referee.background,
        colours=referee.colours,
        base=base,
    )


@torch.no_grad()
def quick_check(
    model: Model, prompts: Sequence[str], ids: Sequence[int], *, seed: int, referee: Referee | None = None,
    sampler: Sampler | None = None,
) -> dict[str, float]:
    """Means for the training guard, of one image for each prompt, the noise a function of (seed, ids[i]). Keys: reward
    (the first of the referee's), heldout, concept, background, diversity, saturation, style/<name>; a question that no
    prompt asks is left out. Diversity is that of one style, and needs a prompt that occurs twice."""
    if len(prompts) != len(ids):
        raise ValueError(f"got {len(prompts)} prompts and {len(ids)} ids; expected one id an image")
    referee = referee or embedded_referee()
    noises = _noises([Random(seed, 0, ids)], "quick_check", model.latent_shape, sampler)
    images = _draw(model, prompts, noises, steps=None, guidance=None, weights="policy", batch_size=64, sampler=sampler)
    first = next(iter(referee.rewards))
    columns = _columns(
        images,
        prompts,
        rewards={name: referee.rewards[name] for name in (first, referee.heldout)},
        judge=referee.judge,
        parse=referee.parse,
        background=referee.background,
        colours=referee.colours,
    )
    values = columns.values
    result = {"reward": values[f"reward/{first}"], "heldout": values[f"reward/{referee.heldout}"]}
    result |= {name: values[name] for name in ("concept", "background", "saturation")}
    result["diversity"] = diversity(columns.features, prompts, columns.styles)
    result |= {name: column for name, column in values.items() if name.startswith("style/")}
    means = {name: float(column.nanmean()) for name, column in result.items()}
    return {name: float(f"{mean:.6g}") for name, mean in means.items() if not math.isnan(mean)}


# --- sample folders and run folders ---------------------------------------------------------------------------------


def quantise(images: Tensor) -> Tensor:
    """The images as an 8-bit PNG would give them back, so that drawn and stored images are judged alike."""
    return (images.clamp(0, 1) * 255).round() / 255


def write_samples(
    folder: str | Path, images: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, guidance: float, steps: int
) -> None:
    """PNGs 0000.png ... and index.jsonl, one row an image: {"file", "prompt", "seed", "guidance", "steps"}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    rows = []
    for i, (array, prompt, seed) in enumerate(zip(pixels, prompts, seeds, strict=True)):
        Image.fromarray(array).save(folder / f"{i:04d}.png")
        rows.append({"file": f"{i:04d}.png", "prompt": prompt, "seed": int(seed), "guidance": guidance, "steps": steps})
    _write(folder / "index.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def read_index(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of folder/index.jsonl, checked. Raises ValueError naming the file, line and remedy."""
    index = Path(folder) / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"{index} is missing; expected a sample folder such as runs/NAME/samples/step-000000")
    rows = []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            file, prompt, seed = row["file"], row["prompt"], row["seed"]
            good = isinstance(file, str) and isinstance(prompt, str) and isinstance(seed, int)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{index} line {number}: expected {{"file", "prompt", "seed", ...}}; got {line[:80]!r}'
            ) from error
        if not good or file != Path(file).name or file in ("", ".", ".."):
            raise ValueError(
                f"{index} line {number}: file must be a plain name, prompt a string, seed an integer; got {line[:80]!r}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{index} is empty; expected one row an image")
    return rows


def read_samples(folder: str | Path) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images (N, 3, H, W) in [0, 1] and the rows of index.jsonl. A missing or broken image: a ValueError names it."""
    folder = Path(folder)
    rows = read_index(folder)
    images = []
    for row in rows:
        path = folder / row["file"]
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except FileNotFoundError as error:
            raise ValueError(f"image {path} is missing, though index.jsonl lists it; sample again") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"image {path} cannot be read ({error}); sample again or remove its row from index.jsonl"
            ) from error
        if images and array.shape != images[0].shape:
            raise ValueError(
                f"image {path} is {array.shape[1]}x{array.shape[0]}; "
                f"expected {images[0].shape[1]}x{images[0].shape[0]} as the first"
            )
        images.append(array)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, rows


def check_same(rows: Sequence[dict], others: Sequence[dict], name: str, other_name: str) -> None:
    """Raise ValueError unless both hold the same (prompt, seed) in the same order; the message says which differ."""
    for i, (row, other) in enumerate(zip(rows, others, strict=False)):
        for key in ("prompt", "seed"):
            if row[key] != other[key]:
                raise ValueError(
                    f"{name} and {other_name} cannot be paired: {key} of row {i} is {row[key]!r} in the "
                    f"first, {other[key]!r} in the second; sample both with the same prompts and seeds"
                )
    if len(rows) != len(others):
        extra = list(islice((rows if len(rows) > len(others) else others), min(len(rows), len(others)), None))[0]
        raise ValueError(
            f"{name} and {other_name} cannot be paired: {len(rows)} and {len(others)} images; the first without a "
            f"partner is prompt {extra['prompt']!r} seed {extra['seed']}; sample both with the same prompts and seeds"
        )


def evaluate_samples(
    samples_folder: str | Path, *, base_folder: str | Path | None = None, referee: Referee | None = None
) -> dict[str, Any]:
    """Judge the PNGs of a folder, in pairs with `base_folder` when given. Returns the summary and the rows."""
    images, rows = read_samples(samples_folder)
    base = None
    if base_folder is not None:
        base, base_rows = read_samples(base_folder)
        check_same(rows, base_rows, str(samples_folder), str(base_folder))
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    referee = referee or embedded_referee()
    result = _referee_images(images, prompts, seeds, referee=referee, base=base).to_dict()
    for row, source in zip(result["rows"], rows, strict=True):
        row["file"] = source["file"]
    return result


def verdict(metrics: dict[str, dict[str, float]], optimised: Sequence[str], heldout: str) -> dict[str, Any]:
    """One sentence, and a list of warnings, from paired metrics. "up" and "down" only where the interval excludes 0."""

    def direction(metric: dict[str, float]) -> str:
        return "up" if metric["change_low"] > 0 else "down" if metric["change_high"] < 0 else "unchanged"

    parts, warnings = [], []
    first = metrics.get(f"reward/{optimised[0]}") if optimised else None
    held = metrics[f"reward/{heldout}"]
    if first:
        parts.append(f"optimised reward {direction(first)} ({first['base']:.3g} to {first['value']:.3g})")
    parts.append(f"held-out reward {direction(held)} ({held['base']:.3g} to {held['value']:.3g})")
    if direction(held) == "down":
        warnings.append("the held-out reward fell: over-optimised; take an earlier checkpoint or regularise more")
    if concept := metrics.get("concept"):
        parts.append(f"concept {concept['base']:.2f} to {concept['value']:.2f}")
        if concept["change"] < -CONCEPT_LIMIT:
            warnings.append(f"concept accuracy fell by {-concept['change']:.2f}, more than {CONCEPT_LIMIT}")
    spread = metrics.get("diversity")
    if spread and spread["base"] > 0:
        ratio = spread["value"] / spread["base"]
        parts.append(f"diversity x {ratio:.2f}")
        if ratio < DIVERSITY_LIMIT:
            warnings.append(
                f"diversity inside a prompt is {ratio:.2f} of the base model's, less than {DIVERSITY_LIMIT}"
            )
    text = ", ".join(parts)
    return {"text": text[0].upper() + text[1:] + ".", "warnings": warnings}


def words_in_force(run_folder: str | Path, recipe: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The (positive, negative) control words at the end of the run: the recipe's, changed by the steering events."""
    settings = recipe.get("algorithm") or {}
    words = {side: list(settings.get(side) or ()) for side in ("positive", "negative")}
    log = Path(run_folder) / "metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        row = json.loads(line)
        if row.get("event") == "steer":
            words |= {side: list(row[side]) for side in words if row.get(side) is not None}
    return words["positive"], words["negative"]


def _with_optimised(
    rewards: dict[str, Reward], heldout: str, recipe: dict[str, Any], words: tuple[list[str], list[str]]
) -> tuple[dict[str, Reward], list[str]]:
    """The rewards with what the run optimised among them, and its names, the objective itself first: a weighted sum
    for reward.weights, the mean relative reward over the pairs of control words when there are any. The held-out reward
    is asked for the same preference."""
    from palate.recipe import load_reward
    from palate.rewards.combine import semantic_relative, weighted

    settings = recipe.get("reward") or {}
    shares = settings.get("weights") or ({settings["name"]: 1.0} if settings.get("name") else {})
    rewards = dict(rewards)
    for name in shares:
        if name not in rewards:
            rewards[name] = load_reward(name)
    optimised = list(shares)
    if not optimised:
        return rewards, []
    objective, label = rewards[optimised[0]], optimised[0]
    if len(shares) > 1:
        objective, label = weighted({name: (share, rewards[name]) for name, share in shares.items()}), "weighted"
        rewards[label] = objective
        optimised.insert(0, label)
    positive, negative = words
    if positive or negative:
        chosen = [(p, n) for p in positive or [""] for n in negative or [""]]

        def relative(reward: Reward) -> Reward:
            return weighted({f"{p}|{n}": (1 / len(chosen), semantic_relative(reward, p, n)) for p, n in chosen})

        label = f"{label}-relative"
        rewards[label] = relative(objective)
        rewards[f"{heldout}-relative"] = relative(rewards[heldout])
        optimised.insert(0, label)
    return rewards, optimised


def evaluate_run(
    run_folder: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    model: Model | None = None,
    referee: Referee | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Any]:
    """Base model against the run's result on prompts x seeds from the same noise: every reward with the optimised one
    marked, a verdict, the images. Writes evaluation/{base,result}/ and evaluation.json into the run folder and returns
    the latter. None = what the recipe's evaluate section says."""
    run_folder = Path(run_folder)
    recipe = read_recipe(run_folder)
    settings = recipe.get("evaluate") or {}
    if model is None:
        model, sampler = _trained_model(run_folder)
    referee = referee or embedded_referee()
    prompts = list(prompts) if prompts is not None else _prompts(recipe)
    seeds = range(settings.get("seeds", 4)) if seeds is None else seeds
    words = words_in_force(run_folder, recipe)
    rewards, optimised = _with_optimised(referee.rewards, referee.heldout, recipe, words)

    how = recipe.get("sample") or {}
    steps = how.get("steps") or model.default_steps
    guidance = model.default_guidance if how.get("guidance") is None else how["guidance"]
    columns = pairs(prompts, seeds)
    folders = {"base": run_folder / "evaluation" / "base", "result": run_folder / "evaluation" / "result"}
    for side, weights in (("base", "reference"), ("result", "policy")):
        own = sampler if side == "result" else None  # a generator is judged beside its teacher, drawn in many steps
        images = generate(model, prompts, seeds, steps=steps, guidance=guidance, weights=weights, sampler=own)
        write_samples(folders[side], images, *columns, guidance=1.0 if own else guidance, steps=own.steps if own else steps)
    result = evaluate_samples(folders["result"], base_folder=folders["base"], referee=referee._replace(rewards=rewards))
    result |= {
        "optimised": optimised,
        "heldout": referee.heldout,
        "words": {"positive": words[0], "negative": words[1]},
        "verdict": verdict(result["metrics"], optimised, referee.heldout),
    }
    _write(run_folder / "evaluation.json", to_json(result))
    return result


def _prompts(recipe: dict[str, Any]) -> list[str]:
    """The recipe's evaluation prompts, spread over evaluate.file, else the preview's, else the training prompts."""
    from palate.recipe import read_prompts, spread

    settings, training = recipe.get("evaluate") or {}, recipe.get("prompts") or {}
    file = settings.get("file") or training.get("preview") or training.get("file")
    found = read_prompts(file) if file else training.get("list")
    if not found:
        raise ValueError(
            "the recipe names no prompts to evaluate on; set evaluate.file to a text file, one prompt a line"
        )
    return spread(found, settings.get("prompts", 64))


def read_recipe(run_folder: Path) -> dict[str, Any]:
    """The run's recipe as plain values. Raises ValueError when the folder is not a run."""
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected a run folder such as runs/NAME")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds {type(recipe).__name__}; expected a mapping")
    return recipe


def _trained_model(run_folder: Path) -> tuple[Model, Sampler | None]:
    """The recipe's model with the run's adapter, and how the algorithm draws from it."""
    from palate import recipe

    adapter = run_folder / "adapter"
    if not adapter.is_dir():
        raise ValueError(f"{adapter} is missing: the run has not finished; palate resume {run_folder}")
    plan = recipe.parse((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    model = recipe.build_model(plan)
    model.load_adapter(adapter)
    return model, getattr(recipe.build_algorithm(plan), "sampler", None)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
