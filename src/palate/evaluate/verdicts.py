"""One sentence about an evaluation, and its warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONCEPT_LIMIT = 0.03  # the verdict warns past such a fall of concept accuracy
DIVERSITY_LIMIT = 0.85  # and below this fraction of the base model's diversity


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
