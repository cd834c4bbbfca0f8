"""The control words of a run as a page shows them: +wanted −unwanted, and what they were at which step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from palate.runs.stored import trained_to, tree_words
from palate.runtime.runlog import words_after


class WordChange(NamedTuple):
    """From this step on (0 = from the start) the run trained with these words."""

    step: int
    positive: tuple[str, ...]
    negative: tuple[str, ...]


def spell(words: dict[str, Any]) -> str:
    """{"positive", "negative"[, "k"]} as "+3d −flat, outline"; "no words" where there is none."""
    sides = [(sign, words.get(key)) for sign, key in (("+", "positive"), ("−", "negative"))]
    parts = [f"{sign}{', '.join(map(str, side))}" for sign, side in sides if side]
    return " ".join([*parts, f"k {words['k']:g}"] if words.get("k") else parts) or "no words"


def word_changes(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[WordChange]:
    """The recipe's words and every later change by steering; empty for a run without control words."""
    words = tree_words(recipe)
    found = [WordChange(0, tuple(words["positive"]), tuple(words["negative"]))]
    for row in rows:
        if row.get("event") == "steer":
            words = words_after(words, row)
            found.append(WordChange(row["step"], tuple(words["positive"]), tuple(words["negative"])))
    return [] if all(not (change.positive or change.negative) for change in found) else found


def words_at(changes: Sequence[WordChange], rows: Sequence[dict[str, Any]], step: int) -> str:
    """The words that the last update before a picture of `step` was made with; rows: of metrics.jsonl."""
    last = [change for change in changes if change.step <= trained_to(rows, step)][-1]
    return spell(last._asdict())


def history(changes: Sequence[WordChange]) -> str:
    """All words in order: "+3d −flat → step 21: +outline −3d"."""
    parts = [(f"step {change.step}: " if change.step else "") + spell(change._asdict()) for change in changes]
    return " → ".join(parts)
