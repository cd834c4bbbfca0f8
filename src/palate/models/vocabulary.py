"""The embedded model's words: what its captions can say, and how people's words are mapped to them.

A caption is any order of known words: "3d apple on a blue background", "large dog at the left, outline style". What it
does not name (style, colour, size, position) is random in the training data.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from palate.runtime.errors import InputError

MAX_WORDS = 14  # of a caption; the tokenizers add a start and an end token


class Vocabulary(NamedTuple):
    concepts: list[str]
    styles: list[str]
    colours: dict[str, tuple[int, int, int]]
    sizes: list[str]
    positions: list[str]
    glue: list[str]
    synonyms: dict[str, str]

    @property
    def words(self) -> list[str]:
        """Every word that the tokenizers know, in a fixed order."""
        return [*self.glue, *self.styles, *self.colours, *self.sizes, *self.positions, *self.concepts]


class Caption(NamedTuple):
    """What a prompt names; None where it leaves the choice to chance."""

    concept: str | None
    style: str | None = None
    background: str | None = None
    size: str | None = None
    position: str | None = None


@cache
def vocabulary() -> Vocabulary:
    table = json.loads((files("palate") / "assets/atlas/vocabulary.json").read_text())
    return Vocabulary(**table | {"colours": {name: tuple(rgb) for name, rgb in table["colours"].items()}})


def known_words(prompt: str) -> list[str]:
    """The prompt's words as the model knows them: lower case, synonyms and plurals resolved, punctuation dropped.

    Raises ValueError for words outside the vocabulary, with the nearest known ones, and for an overlong prompt.
    """
    vocab = vocabulary()
    known = set(vocab.words)
    result, unknown = [], []
    for word in re.findall(r"[^\W_]+", prompt.lower()):
        candidates = [
            word,
            vocab.synonyms.get(word),
            word.removesuffix("s"),
            word.removesuffix("es"),
            vocab.synonyms.get(word.removesuffix("s")),
            {"an": "a", "in": "on"}.get(word),
        ]
        match = next((c for c in candidates if c in known), None)
        if match is None:
            unknown.append(word)
        else:
            result.append(match)
    if unknown:
        lines = []
        for word in dict.fromkeys(unknown):
            near = difflib.get_close_matches(word, [*known, *vocab.synonyms], n=4, cutoff=0.6)
            lines.append(f"{word[:40]!r}" + (f" (near: {', '.join(near)})" if near else ""))
        raise InputError(
            f"the embedded model does not know {', '.join(lines[:5])} in prompt {prompt[:60]!r}\n"
            f"styles: {', '.join(vocab.styles)}; colours: {', '.join(vocab.colours)}; "
            f"concepts such as {', '.join(vocab.concepts[:8])}; all of them: palate recipes --words"
        )
    if len(result) > MAX_WORDS:
        raise InputError(f"prompt has {len(result)} words, the embedded model reads {MAX_WORDS}: {prompt[:60]!r}")
    return result


def parse_prompt(prompt: str) -> Caption:
    """What the prompt names, by its last word of each kind. Raises ValueError for unknown words."""
    vocab = vocabulary()
    words = known_words(prompt)

    def last(kind: Sequence[str]) -> str | None:
        return next((w for w in reversed(words) if w in kind), None)

    return Caption(
        last(vocab.concepts), last(vocab.styles), last(list(vocab.colours)), last(vocab.sizes), last(vocab.positions)
    )
