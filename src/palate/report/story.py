"""An evaluation in one sentence and three gauges: what was wanted, what was kept, what it cost.

Limits and warnings are those of the verdict (`palate.evaluate`); here they only become words and colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from palate.evaluate import CONCEPT_LIMIT, DIVERSITY_LIMIT, mean_and_interval
from palate.evaluate.verdicts import MIN_PROMPTS, over_optimised
from palate.models.vocabulary import vocabulary
from palate.report.html import direction, number
from palate.report.tables import change, metric_name
from palate.runtime.progress import counted

TASTE = "taste"  # the reward's name where a person's taste was optimised
STAYED = 0.05  # of the base's variety, by which it may change and is still said to have stayed
FEW = 50  # pictures below which a sentence counts them instead of saying "of 100"
PORTIONS = ((0.1, "a tenth"), (0.2, "a fifth"), (0.25, "a quarter"), (1 / 3, "a third"), (0.4, "two fifths"),
            (0.5, "half"), (2 / 3, "two thirds"), (0.75, "three quarters"), (0.9, "nine tenths"))  # fmt: skip


@dataclass(frozen=True)
class Gauge:
    """One bar from 0 to 1 with the base's place and the limit; `state` is its colour: good, fair, bad or none."""

    title: str
    figure: str
    state: str
    word: str  # the state in a word, for those who do not see the colour
    value: float
    base: float | None
    limit: float | None
    text: str


def wanted_styles(evaluation: dict[str, Any]) -> list[str]:
    """The judge's styles that the run's positive words name, synonyms included; empty where it knows none of them."""
    synonyms = vocabulary().synonyms
    words = [str(word).lower() for word in (evaluation.get("words") or {}).get("positive") or ()]
    asked = {synonyms.get(word, word) for word in words}
    return [key[6:] for key in evaluation["metrics"] if key.startswith("style/") and key[6:].lower() in asked]


def sentence(evaluation: dict[str, Any]) -> str:
    """What was asked for, how much of it came, what is still right, and what it cost."""
    metrics, styles = evaluation["metrics"], wanted_styles(evaluation)
    parts = [_wanted_clause(evaluation, styles)]
    if concept := metrics.get("concept"):
        parts.append(f"{_count(evaluation, concept['value'], 'concept')} still show the right thing")
    elif (heldout := f"reward/{evaluation.get('heldout')}") in metrics and (won := pairs_won(evaluation, heldout)):
        parts.append(f"the held-out judge {evaluation['heldout']} prefers the new picture in {won}")
    if not few(evaluation) and (cost := _variety(metrics.get("diversity"))):
        parts.append(cost)
    return f"{asked_for(evaluation)}: {'; '.join(part for part in parts if part)}."


def asked_for(evaluation: dict[str, Any]) -> str:
    """ "Asked for 3d, away from flat and outline"; of a run without words, the reward that it optimised."""
    words = evaluation.get("words") or {}
    positive, negative = (_listed(words.get(side) or ()) for side in ("positive", "negative"))
    if positive and negative:
        return f"Asked for {positive}, away from {negative}"
    if positive or negative:
        return f"Asked for {positive}" if positive else f"Asked for less of {negative}"
    optimised = evaluation.get("optimised") or []
    if optimised[:1] == [TASTE]:
        return "Asked for what the taste likes"
    return f"Asked for a higher {metric_name('reward/' + optimised[0])}" if optimised else "Base and result"


def _wanted_clause(evaluation: dict[str, Any], styles: Sequence[str]) -> str:
    if (metric := _wanted_metric(evaluation, styles)) is not None:
        now, before = (_count(evaluation, metric.get(key, 0.0), "style/") for key in ("value", "base"))
        earlier = f", {before.split()[0]} before" if "base" in metric else ""
        return f"{now} pictures are {_listed(styles, 'or')} now{earlier}"
    key = f"reward/{(evaluation.get('optimised') or [None])[0]}"
    won = pairs_won(evaluation, key)
    who = "it" if key == f"reward/{TASTE}" else "the optimised reward"
    return f"{who} prefers the new picture in {won}" if won else ""


def _wanted_metric(evaluation: dict[str, Any], styles: Sequence[str]) -> dict[str, float] | None:
    """The fraction of pictures in one of the wanted styles, as the metric of a single style; None where none is."""
    if len(styles) <= 1:
        return evaluation["metrics"][f"style/{styles[0]}"] if styles else None
    rows = [row for row in evaluation["rows"] if "style_named" not in row]
    now, before = (torch.tensor([float(side.get("style") in styles) for side in sides])
                   for sides in (rows, [row.get("base", {}) for row in rows]))  # fmt: skip
    has_base = all("base" in row for row in rows)
    return mean_and_interval(now.double(), before.double() if has_base else None, [row["prompt"] for row in rows])


def few(evaluation: dict[str, Any]) -> bool:
    """Whether the pictures are of too few prompts to tell a change from chance, as in the verdict."""
    return int(evaluation.get("prompts", MIN_PROMPTS)) < MIN_PROMPTS


def _count(evaluation: dict[str, Any], share: float, key: str) -> str:
    """A fraction as "69 of 100", or of the pictures themselves where they are few."""
    rows = evaluation.get("rows") or []
    if key == "style/":
        count = sum("style_named" not in row for row in rows)
    else:
        count = sum(row.get(key) is not None for row in rows)
    total = count if 0 < count < FEW else 100
    return f"{round(share * total)} of {total}"


def pairs_won(evaluation: dict[str, Any], key: str) -> str | None:
    """ "83 of 100 pairs": how often the picture after training has more of a measurement; None where it is missing."""
    changes = _changes(evaluation, key)
    if not changes:
        return None
    total = len(changes) if len(changes) < FEW else 100
    return f"{round(win_share(changes) * total)} of {counted(total, 'pair')}"


def win_share(changes: Sequence[float]) -> float:
    """The fraction of pairs whose change is above 0; ties are half, and no pairs are a tie."""
    if not changes:
        return 0.5
    return sum(1.0 if gain > 0 else 0.5 if gain == 0 else 0.0 for gain in changes) / len(changes)


def _changes(evaluation: dict[str, Any], key: str) -> list[float]:
    """A measurement of each picture after training minus that of its base, where both were measured."""
    rows = evaluation.get("rows") or ()
    return [found for row in rows if (found := change(row, key)) is not None]


def _variety(metric: dict[str, float] | None) -> str:
    """ "a third of the variety went"; empty where it was not measured."""
    if not metric or not metric.get("base"):
        return ""
    lost = 1 - metric["value"] / metric["base"]
    if abs(lost) < STAYED:
        return "the variety stayed"
    if metric["change_low"] <= 0 <= metric["change_high"]:
        return f"the variety may have {'fallen' if lost > 0 else 'grown'}"
    if lost < 0:
        return f"the variety grew by {-lost:.0%}".replace("%", " %")
    return f"{min(PORTIONS, key=lambda portion: abs(portion[0] - lost))[1]} of the variety went"


def _listed(words: Sequence[Any], last: str = "and") -> str:
    names = [str(word) for word in words]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else ""


# --- gauges -----------------------------------------------------------------------------------------------------------


def gauges(evaluation: dict[str, Any]) -> list[Gauge]:
    """Wanted, kept and cost, as far as they were measured; of a few prompts without a judgement."""
    measured = [_wanted_gauge(evaluation), _kept_gauge(evaluation), _cost_gauge(evaluation["metrics"])]
    found = [gauge for gauge in measured if gauge]
    return [replace(gauge, state="none", word="too few to tell") for gauge in found] if few(evaluation) else found


STATES = {1: ("good", "up"), 0: ("none", "unchanged"), -1: ("bad", "down")}


def _wanted_gauge(evaluation: dict[str, Any]) -> Gauge | None:
    metrics, styles = evaluation["metrics"], wanted_styles(evaluation)
    optimised = (evaluation.get("optimised") or [None])[0]
    objective = metrics.get(f"reward/{optimised}")
    moved, name = "", TASTE if optimised == TASTE else "objective"
    if objective and "change" in objective:
        moved = f"{name} {number(objective['base'])} → {number(objective['value'])}"
    if (metric := _wanted_metric(evaluation, styles)) is not None and "change" in metric:
        state, word = STATES[direction(metric)]
        text = f"pictures that are {_listed(styles, 'or')}, {metric['base']:.0%} before; {moved}".rstrip("; ")
        return Gauge("Wanted", f"{metric['value']:.0%}", state, word, metric["value"], metric["base"], None, text)
    if objective is None or "change" not in objective:
        return None
    state, word = STATES[direction(objective)]
    share = win_share(_changes(evaluation, f"reward/{optimised}"))
    return Gauge("Wanted", f"{share:.0%}", state, word, share, 0.5, None, f"pairs that the {name} prefers; {moved}")


def _kept_gauge(evaluation: dict[str, Any]) -> Gauge | None:
    metrics = evaluation["metrics"]
    if (concept := metrics.get("concept")) and "change" in concept:
        limit = concept["base"] - CONCEPT_LIMIT
        past, sure = concept["value"] < limit, concept["change_high"] < 0
        state, word = ("bad", "fell") if past and sure else ("fair", "perhaps fell") if past else ("good", "kept")
        text = f"pictures of the right thing, {concept['base']:.0%} before; limit {limit:.0%}"
        return Gauge("Kept", f"{concept['value']:.0%}", state, word, concept["value"], concept["base"], limit, text)
    key = f"reward/{evaluation.get('heldout')}"
    if key not in metrics or "change" not in metrics[key]:
        return None
    state, word = {1: ("good", "up"), 0: ("good", "kept"), -1: ("fair", "fell, as a new style makes it")}[
        direction(metrics[key])
    ]
    if over_optimised(metrics, evaluation["heldout"], evaluation.get("heldout_may_fall", 0.0)):
        state, word = "bad", "fell" if direction(metrics[key]) < 0 else "likes the words less"
    share, held = win_share(_changes(evaluation, key)), metrics[key]
    text = f"pairs that the held-out {evaluation['heldout']} prefers; {number(held['base'])} → {number(held['value'])}"
    return Gauge("Kept", f"{share:.0%}", state, word, share, 0.5, None, text)


def _cost_gauge(metrics: dict[str, dict[str, float]]) -> Gauge | None:
    metric = metrics.get("diversity")
    if not metric or not metric.get("base"):
        return None
    ratio, inside = metric["value"] / metric["base"], metrics.get("diversity_same_style")
    same = inside["value"] / inside["base"] if inside and inside.get("base") else None
    lost, limit = max(0.0, 1 - ratio), 1 - DIVERSITY_LIMIT
    text = f"of the base model's variety per prompt went; limit {limit:.0%}"
    if lost >= STAYED and direction(metric) == 0:
        text += "; it may be chance"
    if same is not None:
        text += f"; within one style {max(0.0, 1 - same):.0%}"
    if ratio >= DIVERSITY_LIMIT:
        state, word = "good", "small"
    elif direction(metric) == 0:
        state, word = "fair", "perhaps high"
    elif same is not None and same >= DIVERSITY_LIMIT:
        state, word = "fair", "fewer styles are mixed"
    else:
        state, word = "bad", "high"
    return Gauge("Cost", f"{lost:.0%}", state, word, lost, 0.0, limit, text)
