"""One sentence about an evaluation, warnings where something clearly went wrong, and notes without alarm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.runtime.progress import counted

CONCEPT_LIMIT = 0.03  # the verdict warns past such a fall of concept accuracy
DIVERSITY_LIMIT = 0.85  # and below this fraction of the base model's diversity
MIN_PROMPTS = 6  # all changes of fewer prompts have one sign by chance in more than 5 % of cases

Metrics = dict[str, dict[str, float]]


def verdict(
    metrics: Metrics,
    optimised: Sequence[str],
    heldout: str,
    failed: Sequence[dict[str, Any]] = (),
    *,
    num_prompts: int | None = None,
    may_fall: float = 0.0,
) -> dict[str, Any]:
    """{"text", "warnings", "notes"} from paired metrics. Only a change whose interval excludes 0 is "up" or "down" or
    warned of; of fewer than MIN_PROMPTS prompts nothing is, since such an interval says too little.

    may_fall: how far the held-out reward may fall without a warning, in its own units."""
    few = num_prompts is not None and num_prompts < MIN_PROMPTS
    first = metrics.get(f"reward/{optimised[0]}") if optimised else None
    held = metrics[f"reward/{heldout}"]
    concept, diversity = metrics.get("concept"), metrics.get("diversity")
    parts = []
    if first:
        parts.append(f"optimised reward {_direction(first, few)} ({first['base']:.3g} to {first['value']:.3g})")
    parts.append(f"held-out reward {_direction(held, few)} ({held['base']:.3g} to {held['value']:.3g})")
    if concept:
        parts.append(f"concept {concept['base']:.2f} to {concept['value']:.2f}")
    if diversity and diversity["base"] > 0:
        parts.append(f"diversity x {diversity['value'] / diversity['base']:.2f}")
    text = ", ".join(parts)
    warnings: list[str] = []
    on = counted(num_prompts or 0, "prompt")
    notes = [f"Measured on {on}, too few to tell a change from chance; use 8 or more."] if few else []
    if not few:
        for side in (_about_heldout(metrics, heldout, may_fall), _about_concept(concept), _about_diversity(metrics)):
            warnings += side[0]
            notes += side[1]
    return {"text": text[0].upper() + text[1:] + ".", "warnings": warnings + _about_failures(failed), "notes": notes}


def _direction(metric: dict[str, float], few: bool = False) -> str:
    if few:
        return "unchanged within the error"
    return "up" if metric["change_low"] > 0 else "down" if metric["change_high"] < 0 else "unchanged"


def over_optimised(metrics: Metrics, heldout: str, may_fall: float = 0.0) -> bool:
    """Whether the held-out reward says so; not where its fall is what a change of style makes of plain prompts."""
    return bool(_about_heldout(metrics, heldout, may_fall)[0])


def _about_heldout(metrics: Metrics, heldout: str, may_fall: float) -> tuple[list[str], list[str]]:
    """A held-out reward that fell means over-optimisation, unless its preference for the run's words rose by at least
    as much: the plain reward judges against prompts that name no style, so a change of style lowers it. So does a
    taste, which has no words to be judged by: its fall counts from `may_fall` on."""
    held, preferred = metrics[f"reward/{heldout}"], metrics.get(f"reward/{heldout}-relative")
    fell = _direction(held) == "down"
    if preferred and _direction(preferred) == "down":
        return ["The held-out reward's preference for the words fell: over-optimised; take an earlier checkpoint or "
                "regularise more."], []  # fmt: skip
    if not fell:
        return [], []
    if preferred and _direction(preferred) == "up" and preferred["change"] >= -held["change"]:
        return [], [
            f"The held-out reward of the plain prompts fell ({held['base']:.3g} to {held['value']:.3g}), as a change "
            "of style makes it: these prompts name no style. Its preference for the words rose "
            f"({preferred['base']:.3g} to {preferred['value']:.3g}), so the change is not the optimised reward's alone."
        ]
    if -held["change"] <= may_fall:
        return [], [
            f"The held-out reward of the plain prompts fell ({held['base']:.3g} to {held['value']:.3g}), by no more "
            f"than the {may_fall:.3g} that the run's guard lets it: a taste changes what these prompts leave open."
        ]
    return [f"The held-out reward fell ({held['base']:.3g} to {held['value']:.3g}): over-optimised; take an earlier "
            "checkpoint or regularise more."], []  # fmt: skip


def _about_concept(concept: dict[str, float] | None) -> tuple[list[str], list[str]]:
    if not concept or concept["change"] >= -CONCEPT_LIMIT:
        return [], []
    fell = f"Concept accuracy fell by {-concept['change']:.2f}, more than {CONCEPT_LIMIT}"
    return ([f"{fell}."], []) if _direction(concept) == "down" else ([], [f"{fell}, but within the error."])


def _about_diversity(metrics: Metrics) -> tuple[list[str], list[str]]:
    diversity, inside = metrics.get("diversity"), metrics.get("diversity_same_style")
    if not diversity or not diversity["base"] or diversity["value"] / diversity["base"] >= DIVERSITY_LIMIT:
        return [], []
    finding = f"The diversity per prompt is {diversity['value'] / diversity['base']:.2f} of the base model's"
    if _direction(diversity) != "down":
        return [], [f"{finding}, but within the error."]
    if inside and inside["base"] and (same := inside["value"] / inside["base"]) >= DIVERSITY_LIMIT:
        return [], [f"{finding} because fewer styles are mixed; within one style it is {same:.2f}."]
    return [f"{finding}, less than {DIVERSITY_LIMIT}."], []


def _about_failures(failed: Sequence[dict[str, Any]]) -> list[str]:
    warnings = []
    for name in dict.fromkeys(failure["metric"] for failure in failed):
        images = [failure for failure in failed if failure["metric"] == name]
        warnings.append(
            f"{name} failed on {counted(len(images), 'image')}, left out before and after: {images[0]['prompt']!r}, "
            f"seed {images[0]['seed']} ({images[0]['side']}), for one: {images[0]['why']}"
        )
    return warnings
