"""A set of images measured by a panel: every metric per image or per prompt, its interval, its paired change."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.core import Model, Random, Sampler
from palate.evaluate.columns import Columns, columns_of, leave_out_failures
from palate.evaluate.metrics import Images, bootstrap_interval, diversity, drift, members, vendi
from palate.evaluate.panel import EvaluationPanel, embedded_panel
from palate.evaluate.samples import (
    Drawing,
    check_same,
    draw,
    generate,
    noises_of,
    open_samples,
    pairs,
)
from palate.runtime.errors import InputError
from palate.runtime.images import quantise
from palate.runtime.progress import counted


@dataclass(frozen=True)
class Evaluation:
    """`summary`: every metric with its interval. `rows`: one dict per image. Both are plain JSON values."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Summary and rows in one dictionary, as evaluation.json holds them."""
        return round_floats({**self.summary, "rows": self.rows})


def round_floats(value: Any) -> Any:
    """JSON values with floats at 6 significant digits; NaN becomes None. So files are JSON and repeat bytewise."""
    if isinstance(value, dict):
        return {str(key): round_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_floats(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def to_json(value: Any) -> str:
    """Deterministic text: sorted keys, rounded floats."""
    return json.dumps(round_floats(value), sort_keys=True, indent=1, allow_nan=False) + "\n"


def evaluate_images(
    images: Images,
    prompts: Sequence[str],
    seeds: Sequence[int],
    panel: EvaluationPanel,
    *,
    base: Images | None = None,
) -> Evaluation:
    """Measure images (N, 3, H, W), image i drawn for prompts[i] with seeds[i]. `base`: the base model's images for the
    same prompts and noise; with it every metric also has its base value and paired difference, and drift is measured.

    Metrics: reward/<name>; concept, background, position (fraction right where the prompt names one), style_named (the
    same of the style), correct (all that the prompt names is right); style/<name> (fraction where it is left open);
    diversity and vendi inside a prompt, diversity_same_style of the pairs of one style; copy (fraction of images that
    another prompt has too); closed-form image statistics.

    An image that a reward fails on (`failed`) is left out of that reward on both sides; InputError where none is left.
    """
    if not len(images) == len(prompts) == len(seeds) or not len(images):
        got = f"{counted(len(images), 'image')}, {counted(len(prompts), 'prompt')}, {counted(len(seeds), 'seed')}"
        raise InputError(f"got {got}; expected one of each per image")
    if base is not None and tuple(base.shape) != tuple(images.shape):
        raise InputError(
            f"base images have shape {tuple(base.shape)}; expected {tuple(images.shape)}, one for each image"
        )
    now = columns_of(images, prompts, panel)
    before = None if base is None else columns_of(base, prompts, panel)
    failed = leave_out_failures({"result": now} if before is None else {"base": before, "result": now})
    inside = _inside_prompts(now, prompts)
    inside_before = None if before is None else _inside_prompts(before, prompts)
    metrics = {
        name: mean_and_interval(column, before.values[name] if before else None, prompts)
        for name, column in now.values.items()
    }
    for name, column in inside.items():
        metrics[name] = mean_and_interval(column, inside_before[name] if inside_before else None, None)
    by_prompt = [{"prompt": p, **_at(inside, i)} for i, p in enumerate(dict.fromkeys(prompts))]
    summary: dict[str, Any] = {
        "images": len(images),
        "prompts": len(set(prompts)),
        "seeds": sorted({int(s) for s in seeds}),
        "metrics": {name: metric for name, metric in metrics.items() if not math.isnan(metric["value"])},
        "by_prompt": by_prompt,
        "failed": [
            {"metric": name, "side": side, "image": i, "prompt": prompts[i], "seed": int(seeds[i]), "why": why}
            for name, side, i, why in failed
        ],
    }
    rows = [{"prompt": p, "seed": int(s), **_row(now, i)} for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))]
    if base is not None and before is not None and inside_before is not None:
        summary["drift"] = drift(images, base, now.features, before.features)
        for i, entry in enumerate(by_prompt):
            entry["base"] = _at(inside_before, i)
        for i, row in enumerate(rows):
            row["base"] = _row(before, i)
            row["feature_distance"] = float(1 - F.cosine_similarity(now.features[i], before.features[i], dim=0))
    return Evaluation(round_floats(summary), round_floats(rows))


def mean_and_interval(values: Tensor, base: Tensor | None, groups: Sequence[str] | None) -> dict[str, float]:
    """Mean of values (N,) with its interval; with `base`, its mean and the paired change, each with its own."""
    low, high = bootstrap_interval(values, groups=groups)
    metric = {"value": float(values.nanmean()), "low": low, "high": high}
    if base is not None:
        base_low, base_high = bootstrap_interval(base, groups=groups)
        metric |= {"base": float(base.nanmean()), "base_low": base_low, "base_high": base_high}
        low, high = bootstrap_interval(values, base, groups=groups)
        metric |= {"change": float((values - base).nanmean()), "change_low": low, "change_high": high}
    return metric


class HowDrawn(TypedDict, total=False):
    """How pictures are sampled; what is left out is the model's own."""

    steps: int | None
    guidance: float | None


def evaluate_model(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    panel: EvaluationPanel | None = None,
    weights: str = "policy",
    base_weights: str | None = None,
    **how: Unpack[HowDrawn],
) -> Evaluation:
    """Draw prompts x seeds and measure them; with `base_weights` ("reference") in pairs against those weights. how:
    steps and guidance, None = the model's own."""
    images = quantise(generate(model, prompts, seeds, weights=weights, **how))
    base = None
    if base_weights is not None:
        base = quantise(generate(model, prompts, seeds, weights=base_weights, **how))
    return evaluate_images(images, *pairs(prompts, seeds), panel or embedded_panel(), base=base)


def evaluate_samples(
    samples_folder: str | Path, *, base_folder: str | Path | None = None, panel: EvaluationPanel | None = None
) -> dict[str, Any]:
    """Measure the PNGs of a folder, in pairs with `base_folder` when given. Returns the summary and the rows."""
    images, rows = open_samples(samples_folder)
    base = None
    if base_folder is not None:
        base, base_rows = open_samples(base_folder)
        check_same(rows, base_rows, str(samples_folder), str(base_folder))
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    result = evaluate_images(images, prompts, seeds, panel or embedded_panel(), base=base).to_dict()
    for row, source in zip(result["rows"], rows, strict=True):
        row["file"] = source["file"]
    for failure in result["failed"]:
        failure["file"] = rows[failure["image"]]["file"]
    return result


@torch.no_grad()
def measure_for_guard(
    model: Model,
    prompts: Sequence[str],
    ids: Sequence[int],
    *,
    seed: int,
    panel: EvaluationPanel | None = None,
    sampler: Sampler | None = None,
) -> dict[str, float]:
    """Means for the training guard, of one image for each prompt, the noise a function of (seed, ids[i]). Keys: reward
    (the first of the panel's), heldout, concept, background, diversity, saturation, style/<name>; a question that no
    prompt asks is left out. Diversity is that of one style, and needs a prompt that occurs twice."""
    if len(prompts) != len(ids):
        raise InputError(
            f"got {counted(len(prompts), 'prompt')} and {counted(len(ids), 'id')}; expected one id per image"
        )
    panel = panel or embedded_panel()
    # the purpose keeps the name that the function once had: it decides the noise
    noises = noises_of([Random(seed, 0, ids)], "quick_check", model.latent_shape, sampler)
    images = draw(model, prompts, noises, Drawing(batch_size=64, sampler=sampler))
    first = next(iter(panel.rewards))
    rewards = {name: panel.rewards[name] for name in (first, panel.heldout)}
    columns = columns_of(images, prompts, panel._replace(rewards=rewards))
    for name, why in columns.failed.items():
        i = min(why)
        raise InputError(f"reward {name.removeprefix('reward/')!r} failed for prompt {prompts[i]!r}: {why[i]}")
    values = columns.values
    result = {"reward": values[f"reward/{first}"], "heldout": values[f"reward/{panel.heldout}"]}
    result |= {name: values[name] for name in ("concept", "background", "saturation") if name in values}
    result["diversity"] = diversity(columns.features, prompts, columns.styles or None)
    result |= {name: column for name, column in values.items() if name.startswith("style/")}
    means = {name: float(column.nanmean()) for name, column in result.items()}
    return {name: float(f"{mean:.6g}") for name, mean in means.items() if not math.isnan(mean)}


def _at(columns: dict[str, Tensor], i: int) -> dict[str, Any]:
    return {name: float(column[i]) for name, column in columns.items()}


def _inside_prompts(columns: Columns, prompts: Sequence[str]) -> dict[str, Tensor]:
    scores = [vendi(columns.features[rows]) if len(rows) > 1 else math.nan for rows in members(prompts)]
    same = {"diversity_same_style": diversity(columns.features, prompts, columns.styles)} if columns.styles else {}
    return {
        "diversity": diversity(columns.features, prompts),
        **same,
        "vendi": torch.tensor(scores, dtype=torch.float64),
    }


def _row(columns: Columns, i: int) -> dict[str, Any]:
    """One image's measurements; questions that do not arise for its prompt are left out."""
    values: dict[str, Any] = {
        n: float(c[i]) for n, c in columns.values.items() if not n.startswith("style/") and not math.isnan(float(c[i]))
    }
    return values | ({"style": columns.styles[i]} if columns.styles else {})
