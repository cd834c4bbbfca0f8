"""Fixed prompts x seeds, judged: rewards, what the prompt asks for, diversity in a prompt, drift from the base.

Everything is measured per image or per prompt first, so that two models that drew from the same noise are compared in
pairs and every mean has an interval. The optimised reward stands beside those that were not optimised: when the
first rises and the others fall, the run is over-optimised. What lies on disk is `palate.runs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palate.core import Cond, Model, Random, Reward
from palate.rewards import simple
from palate.runtime.errors import InputError

CLOSED_FORM = {
    f.__name__: f
    for f in (simple.saturation, simple.brightness, simple.warmth, simple.colourfulness, simple.high_frequency)
}
CONCEPT_LIMIT, DIVERSITY_LIMIT = (
    0.03,
    0.85,
)  # the verdict warns past a fall of .03, and below .85 of the base's diversity
COPY = 0.05  # root mean square difference of the pixels below which two images are the same picture
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis and sign of a centre (x, y)


class Judge(Protocol):
    """A network that was never optimised against. Features for distances, and names for what it sees; it may know no
    names, and is then asked for none."""

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
    position: str | None  # one of SIDES; read only where there is an oracle of it


class Referee(NamedTuple):
    """Everyone who judges a run. `heldout` names the reward that no recipe may optimise."""

    rewards: dict[str, Reward]
    heldout: str
    judge: Judge
    parse: Callable[[str], Caption] | None = None  # None: prompts ask for nothing that could be checked
    background: Callable[[Tensor], Tensor] | None = None  # images -> (B,) index into colours
    colours: Sequence[str] = ()
    position: Callable[[Tensor], Tensor] | None = (
        None  # images -> (B, 2) centre (x, y) in [-1, 1], NaN where there is none
    )


def embedded_referee() -> Referee:
    """The rewards, judge and background oracle that come with the package."""
    from palate.rewards import emoji

    rewards: dict[str, Reward] = {name: emoji.load_reward(name) for name in ("emoji", "emoji-heldout")}
    rewards["jpeg_size"] = simple.jpeg_size
    judge, colours = emoji.Judge(), list(emoji.COLOURS)
    return Referee(rewards, "emoji-heldout", judge, emoji.parse_prompt, emoji.background, colours, emoji.position)


class _Tower:
    """The image tower of a reward as a judge that knows no names."""

    styles: ClassVar[list[str]] = []
    concepts: ClassVar[list[str]] = []

    def __init__(self, reward: Reward):
        self.features = reward.image_features


def published_referee(heldout: str, reward: Reward) -> Referee:
    """For any model: a two-tower reward that was not optimised. Its image features give distances and diversity; what a
    prompt asks for is not checked."""
    return Referee({heldout: reward, "jpeg_size": simple.jpeg_size}, heldout, _Tower(reward))


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


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """|m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of the means m, n and covariances C, D of two sets of feature rows (N, F),
    (M, F): the squared 2-Wasserstein distance of the Gaussians that fit them (what FID is with Inception's features).

    Both sets' sampling noise adds to it, so compare numbers of equal N only, best beside that of two sets of one model.
    """
    (m, c), (n, d) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (features, others))
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp_min(0).sqrt().sum()  # tr (C D)^(1/2)
    return float(((m - n).square().sum() + c.trace() + d.trace() - 2 * cross).clamp_min(0))


def drift(images: Tensor, base_images: Tensor, features: Tensor, base_features: Tensor) -> dict[str, float]:
    """How far the images went from the base model's for the same noise: mean paired cosine distance of features, the
    colour cast (length of the mean colour's change, less its grey part), and the ratios (1 = unchanged) of mean
    saturation, mean colour per channel and high-frequency energy."""
    distance = 1 - F.cosine_similarity(features.double(), base_features.double(), dim=1)
    result = {"feature_distance": float(distance.clamp_min(0).mean())}
    shift = (images.double() - base_images.double()).mean((0, 2, 3))  # (3,)
    result["colour_cast"] = float((shift - shift.mean()).norm())
    means = {"saturation": (simple.saturation(images), simple.saturation(base_images))}
    for channel, name in enumerate(("red", "green", "blue")):
        means[name] = (images[:, channel], base_images[:, channel])
    means["high_frequency"] = (simple.high_frequency(images), simple.high_frequency(base_images))
    for name, (now, before) in means.items():
        result[f"{name}_ratio"] = (float(now.double().mean()) + 1e-9) / (float(before.double().mean()) + 1e-9)
    return result


def copies(images: Tensor, groups: Sequence) -> Tensor:
    """(N,) 1 where another group (prompt) holds the same picture: root mean square difference below COPY, at no more
    than 32 x 32 pixels. A model with one image for every prompt has 1 throughout. NaN when there is one group."""
    small = F.adaptive_avg_pool2d(images.double(), min(32, *images.shape[-2:])).flatten(1)
    near = torch.cdist(small, small) / small.shape[1] ** 0.5 < COPY
    labels = torch.from_numpy(_labels(groups))
    elsewhere = labels[:, None] != labels
    return torch.where(elsewhere.any(1), (near & elsewhere).any(1).double(), math.nan)


def placed(centres: Tensor, wanted: Sequence[str | None]) -> Tensor:
    """(B,) 1 where the centre (B, 2) lies on the side of the middle that was wanted, 0 where it does not or nothing was
    drawn (NaN), NaN where no side was asked for. Chance is one half."""
    found = []
    for centre, side in zip(centres.tolist(), wanted, strict=True):
        axis, sign = SIDES[side] if side else (0, 0)
        found.append(float(centre[axis] * sign > 0) if side else math.nan)
    return torch.tensor(found)


def matches(predicted: Tensor, names: Sequence[str], wanted: Sequence[str | None]) -> Tensor:
    """(B,) 1 where names[predicted] is what was wanted, 0 where it is not, NaN where nothing was asked for."""
    return torch.tensor(
        [math.nan if want is None else float(names[int(i)] == want) for i, want in zip(predicted, wanted, strict=True)]
    )


def concept_accuracy(judge: Judge, images: Tensor, captions: Sequence[Caption]) -> float:
    """Share of the images whose concept the judge reads as the prompt says; NaN when no prompt names one."""
    return float(matches(judge.concept(images), judge.concepts, [c.concept for c in captions]).nanmean())


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
    styles: list[str]  # what the judge saw; empty if it knows no styles
    failed: dict[str, dict[int, str]]  # reward/<name> -> image -> why it has no value


@torch.no_grad()
def _columns(images: Tensor, prompts: Sequence[str], referee: Referee, batch_size: int = 64) -> _Columns:
    """Every per-image measurement, in batches."""
    judge = referee.judge
    parts: list[dict[str, Tensor]] = []
    features, styles = [], []
    failed: dict[str, dict[int, str]] = {}
    for start in range(0, len(images), batch_size):
        batch, words = images[start : start + batch_size], list(prompts[start : start + batch_size])
        part = {}
        for name, reward in referee.rewards.items():
            part[f"reward/{name}"], why = _call(name, reward, batch, words)
            failed.setdefault(f"reward/{name}", {}).update({start + i: text for i, text in why.items()})
        part |= {name: measure(batch) for name, measure in CLOSED_FORM.items()}
        seen = judge.style(batch).long().cpu() if judge.styles else torch.zeros(0)
        free = torch.ones(len(batch), dtype=torch.bool)
        if referee.parse is not None:
            captions = [referee.parse(prompt) for prompt in words]
            free = torch.tensor([c.style is None for c in captions])
            asked = {"concept": matches(judge.concept(batch), judge.concepts, [c.concept for c in captions])}
            asked["style_named"] = matches(seen, judge.styles, [c.style for c in captions])
            if referee.background is not None:
                colours = referee.background(batch)
                asked["background"] = matches(colours, referee.colours, [c.background for c in captions])
            if referee.position is not None:
                asked["position"] = placed(referee.position(batch), [c.position for c in captions])
            answers = torch.stack(list(asked.values())).double()
            nothing = answers.isnan().all(0)
            part |= asked | {"correct": torch.where(nothing, math.nan, (answers != 0).all(0).double())}
        for index, name in enumerate(judge.styles):  # shares only where the prompt leaves it open
            part[f"style/{name}"] = torch.where(free, (seen == index).double(), math.nan)
        parts.append({name: value.detach().double().cpu() for name, value in part.items()})
        features.append(judge.features(batch).detach().double().cpu())
        styles += [judge.styles[int(i)] for i in seen]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values["copy"] = copies(images, prompts)
    return _Columns(values, torch.cat(features), styles, {name: why for name, why in failed.items() if why})


def _call(name: str, reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[int, str]]:
    """A reward's values, NaN where it has none, and by image why: it raised ValueError, or gave a number that is not
    finite. An image that spoils its batch is found by asking for each alone; any other error is not about an image."""
    try:
        values = reward(images, prompts)
    except ValueError as error:
        if len(images) == 1:
            return torch.full((1,), math.nan), {0: str(error)[:300]}
        alone = [_call(name, reward, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))]
        return torch.cat([value for value, _ in alone]), {i: why[0] for i, (_, why) in enumerate(alone) if why}
    except (RuntimeError, OSError) as error:
        raise type(error)(
            f"reward {name!r} failed on {len(images)} images, the first of {prompts[0]!r}: {error}"
        ) from error
    if values.shape != (len(images),):
        raise InputError(
            f"reward {name!r} returned shape {tuple(values.shape)}; expected ({len(images)},), one value an image"
        )
    why = {int(i): f"the value {float(values[i])} is not finite" for i in (~values.isfinite()).nonzero()}
    return torch.where(values.isfinite(), values, math.nan), why


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
    position: Callable[[Tensor], Tensor] | None = None,
    base: Tensor | None = None,
) -> Evaluation:
    """Judge images (N, 3, H, W), image i drawn for prompts[i] with seeds[i]. `base`: the base model's images for the
    same prompts and noise; with it every metric also has its base value and paired difference, and drift is measured.

    Metrics: reward/<name>; concept, background, position (share right where the prompt names one), style_named (the
    same of the style), correct (all that the prompt names is right); style/<name> (share where it is left open);
    diversity and vendi inside a prompt, diversity_same_style of the pairs of one style; copy (share of images that
    another prompt has too); closed-form image statistics.

    An image that a reward fails on (`failed`) is left out of that reward on both sides; ValueError where none is left.
    """
    if not len(images) == len(prompts) == len(seeds) or not len(images):
        raise InputError(
            f"got {len(images)} images, {len(prompts)} prompts, {len(seeds)} seeds; expected one of each an image"
        )
    if base is not None and base.shape != images.shape:
        raise InputError(
            f"base images have shape {tuple(base.shape)}; expected {tuple(images.shape)}, one for each image"
        )
    referee = Referee(rewards, "", judge, parse, background, colours, position)
    now = _columns(images, prompts, referee)
    before = None if base is None else _columns(base, prompts, referee)
    failed = _leave_out_failures({"result": now} if before is None else {"base": before, "result": now})

    metrics = {name: measured(column, before and before.values[name], prompts) for name, column in now.values.items()}
    spread = _inside_prompts(now, prompts)
    spread_before = None if before is None else _inside_prompts(before, prompts)
    for name, column in spread.items():
        metrics[name] = measured(column, spread_before and spread_before[name], None)
    inside = [{"prompt": p, **_at(spread, i)} for i, p in enumerate(dict.fromkeys(prompts))]
    summary: dict[str, Any] = {
        "images": len(images),
        "prompts": len(set(prompts)),
        "seeds": sorted(set(int(s) for s in seeds)),
        "metrics": {name: metric for name, metric in metrics.items() if not math.isnan(metric["value"])},
        "by_prompt": inside,
        "failed": [
            {"metric": name, "side": side, "image": i, "prompt": prompts[i], "seed": int(seeds[i]), "why": why}
            for name, side, i, why in failed
        ],
    }
    rows = [{"prompt": p, "seed": int(s), **_row(now, i)} for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))]
    if before is not None:
        summary["drift"] = drift(images, base, now.features, before.features)
        for i, entry in enumerate(inside):
            entry["base"] = _at(spread_before, i)
        for i, row in enumerate(rows):
            row["base"] = _row(before, i)
            row["feature_distance"] = float(1 - F.cosine_similarity(now.features[i], before.features[i], dim=0))
    return Evaluation(plain(summary), plain(rows))


def _leave_out_failures(sides: dict[str, _Columns]) -> list[tuple[str, str, int, str]]:
    """Blank on every side the values that one side lacks, so that means and pairs are of the same images: (metric,
    side, image, why) of each."""
    failed = [(name, side, i, why) for side, columns in sides.items() for name, images in columns.failed.items()
              for i, why in images.items()]  # fmt: skip
    for name, _, i, _ in failed:
        for columns in sides.values():
            columns.values[name][i] = math.nan
    for name, side, i, why in failed:
        if all(bool(columns.values[name].isnan().all()) for columns in sides.values()):
            name = name.removeprefix("reward/")
            raise InputError(
                f"reward {name!r} failed on every image, in image {i} of the {side} because {why}; "
                "mend it or leave it out"
            )
    return failed


def _at(columns: dict[str, Tensor], i: int) -> dict[str, float]:
    return {name: float(column[i]) for name, column in columns.items()}


def _inside_prompts(columns: _Columns, prompts: Sequence[str]) -> dict[str, Tensor]:
    scores = [vendi(columns.features[rows]) if len(rows) > 1 else math.nan for rows in _members(prompts)]
    same = {"diversity_same_style": diversity(columns.features, prompts, columns.styles)} if columns.styles else {}
    return {"diversity": diversity(columns.features, prompts), **same,
            "vendi": torch.tensor(scores, dtype=torch.float64)}  # fmt: skip


def measured(values: Tensor, base: Tensor | None, groups: Sequence[str] | None) -> dict[str, float]:
    """Mean of values (N,) with its interval; with `base`, its mean and the paired change, each with its own."""
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
    return values | ({"style": columns.styles[i]} if columns.styles else {})


def verdict(
    metrics: dict[str, dict[str, float]], optimised: Sequence[str], heldout: str, failed: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
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
    for name in dict.fromkeys(failure["metric"] for failure in failed):
        images = [failure for failure in failed if failure["metric"] == name]
        warnings.append(
            f"{name} failed on {len(images)} images, left out before and after: {images[0]['prompt']!r}, seed "
            f"{images[0]['seed']} ({images[0]['side']}), for one: {images[0]['why']}"
        )
    text = ", ".join(parts)
    return {"text": text[0].upper() + text[1:] + ".", "warnings": warnings}


# --- drawing the images ---------------------------------------------------------------------------------------------


def pairs(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """The rows of prompts x seeds, all seeds of the first prompt first, as `generate` draws them."""
    return [p for p in prompts for _ in seeds], [int(s) for _ in prompts for s in seeds]


def quantise(images: Tensor) -> Tensor:
    """The images as an 8-bit PNG would give them back, so that drawn and stored images are judged alike."""
    return (images.clamp(0, 1) * 255).round() / 255


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
    return _draw(
        model, words, noises, steps=steps, guidance=guidance, weights=weights, batch_size=batch_size, sampler=sampler
    )


def _noises(rows: Sequence[Random], purpose: str, shape: Sequence[int], sampler: Sampler | None) -> list[Tensor]:
    """What sampling starts from, and for a sampler that needs more than one noise the others."""
    purposes = [purpose, *(f"{purpose}-{k}" for k in range(1, sampler.steps if sampler else 1))]
    return [torch.cat([row.normal(name, shape) for row in rows]) for name in purposes]


def _draw(model, prompts, noises, *, steps, guidance, weights, batch_size, sampler) -> Tensor:
    from palate.sampling import sample

    if sampler is None:
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
    return referee_images(images, *pairs(prompts, seeds), referee=referee, base=base)


def referee_images(
    images: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, referee: Referee, base: Tensor | None = None
) -> Evaluation:
    """`evaluate_images` by everyone whom the referee brings."""
    judges = referee._asdict()
    del judges["heldout"]
    return evaluate_images(images, prompts, seeds, base=base, **judges)


@torch.no_grad()
def quick_check(
    model: Model,
    prompts: Sequence[str],
    ids: Sequence[int],
    *,
    seed: int,
    referee: Referee | None = None,
    sampler: Sampler | None = None,
) -> dict[str, float]:
    """Means for the training guard, of one image for each prompt, the noise a function of (seed, ids[i]). Keys: reward
    (the first of the referee's), heldout, concept, background, diversity, saturation, style/<name>; a question that no
    prompt asks is left out. Diversity is that of one style, and needs a prompt that occurs twice."""
    if len(prompts) != len(ids):
        raise InputError(f"got {len(prompts)} prompts and {len(ids)} ids; expected one id an image")
    referee = referee or embedded_referee()
    noises = _noises([Random(seed, 0, ids)], "quick_check", model.latent_shape, sampler)
    images = _draw(model, prompts, noises, steps=None, guidance=None, weights="policy", batch_size=64, sampler=sampler)
    first = next(iter(referee.rewards))
    rewards = {name: referee.rewards[name] for name in (first, referee.heldout)}
    columns = _columns(images, prompts, referee._replace(rewards=rewards))
    for name, why in columns.failed.items():
        i = min(why)
        raise InputError(f"reward {name.removeprefix('reward/')!r} failed for prompt {prompts[i]!r}: {why[i]}")
    values = columns.values
    result = {"reward": values[f"reward/{first}"], "heldout": values[f"reward/{referee.heldout}"]}
    result |= {name: values[name] for name in ("concept", "background", "saturation") if name in values}
    result["diversity"] = diversity(columns.features, prompts, columns.styles or None)
    result |= {name: column for name, column in values.items() if name.startswith("style/")}
    means = {name: float(column.nanmean()) for name, column in result.items()}
    return {name: float(f"{mean:.6g}") for name, mean in means.items() if not math.isnan(mean)}
