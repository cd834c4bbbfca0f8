"""The embedded model's words: what its captions can say, and how people's words are mapped to them.

A caption is any order of known words: "3d apple on a blue background", "large dog at the left, outline style". What it
does not name (style, colour, size, position) is random in the training data. The vocabulary beside the atlas says what
is known; where it has counts, relations and paints, also "three red apples" and "a blue car to the left of a cat".
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from palate.runtime.errors import InputError

WORD = r"[^\W_]+"


class Vocabulary(NamedTuple):
    """What the embedded model was taught to say; the last six are empty where it knows single drawings only."""

    concepts: list[str]
    styles: list[str]
    colours: dict[str, tuple[int, int, int]]
    sizes: list[str]
    positions: list[str]
    glue: list[str]
    synonyms: dict[str, str]
    counts: Sequence[str] = ()  # two, three, ... of a kind
    relations: Sequence[str] = ()  # above, below; "to the left of" is made of other words
    paints: Sequence[str] = ()  # colours that a drawing can have itself
    turnable: Sequence[str] = ()  # concepts whose drawings can have any of them, in every style
    max_words: int = 14  # of a caption; the tokenizers add a start and an end token

    @property
    def words(self) -> list[str]:
        """Every word that the tokenizers know, in a fixed order."""
        kinds = (self.glue, self.styles, self.colours, self.sizes, self.positions, self.counts, self.relations)
        return [word for kind in (*kinds, self.concepts) for word in kind]


class Subject(NamedTuple):
    """A thing that a prompt names beside the first, and its own colour if that is named."""

    concept: str
    paint: str | None = None


class Caption(NamedTuple):
    """What a prompt names; None where it leaves the choice to chance."""

    concept: str | None
    style: str | None = None
    background: str | None = None
    size: str | None = None
    position: str | None = None
    paint: str | None = None  # the colour of the drawing itself
    number: int | None = None  # how many of it
    relation: str | None = None  # where the first thing is, seen from the second: left, right, above or below
    second: Subject | None = None


@cache
def vocabulary() -> Vocabulary:
    """The embedded model's vocabulary, read once."""
    table = json.loads((files("palate") / "assets/atlas/vocabulary.json").read_text("utf-8"))
    return Vocabulary(**table | {"colours": {name: tuple(rgb) for name, rgb in table["colours"].items()}})


_SAME = ("sheep", "deer", "dice", "fish", "grapes", "fries", "glasses", "scissors", "headphones")
_PLURALS = {word: word for word in _SAME} | {"mouse": "mice", "wolf": "wolves", "tomato": "tomatoes"}


def with_article(words: str) -> str:
    """ "a cat", "an orange car"."""
    return f"{'an' if re.match('[aeio]|um|hour', words) else 'a'} {words}"


def plural(concept: str) -> str:
    """The word for several of it, which `known_words` takes back."""
    if concept in _PLURALS:
        return _PLURALS[concept]
    if concept.endswith("y") and concept[-2] not in "aeiou":
        return concept[:-1] + "ies"
    return concept + ("es" if concept.endswith(("s", "sh", "ch", "x")) else "s")


def known_words(prompt: str) -> list[str]:
    """The prompt's words as the model knows them: lower case, synonyms and plurals resolved, punctuation dropped.

    Raises ValueError for words outside the vocabulary, with the nearest known ones, and for an overlong prompt.
    """
    vocab = vocabulary()
    known, singular = set(vocab.words), {several: one for one, several in _PLURALS.items()}
    result: list[str] = []
    unknown = [sign for sign in prompt if unicodedata.category(sign) in ("So", "Co", "Cs", "Cn")]  # emoji, for one
    words = re.findall(WORD, prompt.lower())
    if prompt.strip() and not words and not unknown:
        raise InputError(f"the prompt {prompt[:60]!r} holds no word; all that are known: palate recipes --words")
    for word in words:
        candidates = [
            word,
            singular.get(word),
            word.removesuffix("s"),
            word.removesuffix("es"),
            word.removesuffix("ies") + "y",
            vocab.synonyms.get(word),  # after the plurals: CLDR takes "aliens" for a saucer
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
            near = difflib.get_close_matches(word, [w for w in vocab.words if w not in vocab.glue], n=4, cutoff=0.6)
            near += difflib.get_close_matches(word, list(vocab.synonyms), n=4, cutoff=0.6)[: 4 - len(near)]
            lines.append(f"{word[:40]!r}" + (f" (near: {', '.join(near)})" if near else ""))
        raise InputError(
            f"the embedded model does not know {', '.join(lines[:5])} in prompt {prompt[:60]!r}\n"
            f"styles: {', '.join(vocab.styles)}; colours: {', '.join(vocab.colours)}; "
            f"concepts such as {', '.join(vocab.concepts[:8])}; all of them: palate recipes --words"
        )
    if len(result) > vocab.max_words:
        raise InputError(f"prompt has {len(result)} words, the embedded model reads {vocab.max_words}: {prompt[:60]!r}")
    return result


def parse_prompt(prompt: str) -> Caption:
    """What the prompt names. Raises InputError for unknown words.

    A colour before a thing is the thing's, any other the background's; a model whose drawings have only their own
    colours takes each for the background's. Of several words of another kind the last counts.
    """
    return _parsed(prompt)[0]


def _parsed(prompt: str) -> tuple[Caption, dict[str, int]]:
    """What the prompt names, and which of its words say the style, the size, the position and the background."""
    vocab, words = vocabulary(), known_words(prompt)
    things: list[Subject] = []
    found: dict[str, int] = {}
    number: int | None = None
    colour: int | None = None
    for k, word in enumerate(words):
        if word in vocab.colours:
            on = words[:k][-1:] == ["on"] or words[:k][-2:] == ["on", "a"]
            if on or not vocab.paints:
                found["background"], colour = k, None
            else:
                colour = k
        elif word == "background":
            found |= {} if colour is None else {"background": colour}
            colour = None
        elif word in vocab.concepts:
            things.append(Subject(word, None if colour is None else words[colour]))
            colour = None
        elif word in vocab.counts:
            number = vocab.counts.index(word) + 2
        elif word in vocab.relations or (word in vocab.positions and words[k + 1 : k + 2] == ["of"]):
            found["relation"] = k
        else:
            kinds = {"style": vocab.styles, "size": vocab.sizes, "position": vocab.positions}
            found |= {kind: k for kind, known in kinds.items() if word in known}
    if colour is not None:
        found["background"] = colour
    if not vocab.counts:
        things = things[-1:]
    first = things[0] if things else Subject("")
    named = {kind: words[k] for kind, k in found.items()}
    caption = Caption(
        first.concept or None,
        named.get("style"),
        named.get("background"),
        named.get("size"),
        named.get("position"),
        first.paint,
        number,
        named.get("relation"),
        things[1] if len(things) > 1 else None,
    )
    return caption, found


def with_words(prompt: str, words: Sequence[str], *, replacing: bool = True) -> str:
    """The prompt with known words of style, size and background put in, in place of those of the same kind.

    replacing=False leaves a kind alone that the prompt names. InputError for a prompt or a word that the vocabulary
    does not know.
    """
    for word in words:
        kind, known = kind_of(word)
        there = _parsed(prompt)[1].get(kind)
        if there is not None and not replacing:
            continue
        if there is None:
            prompt = (
                f"{prompt} on {with_article(known)} background" if kind == "background" else f"{known} {_bare(prompt)}"
            )
        else:
            start, end = [word.span() for word in re.finditer(WORD, prompt)][there]
            article = r"\1n\2" if with_article(known).startswith("an ") else r"\1\2"
            before = re.sub(r"\b([Aa])n?(\s+)$", article, prompt[:start])
            prompt = before + known + prompt[end:]
    return prompt


def kind_of(word: str) -> tuple[str, str]:
    """(style, background or size; the word as the vocabulary has it). InputError for any other word."""
    vocab, known = vocabulary(), known_words(word)
    for kind, there in (("style", vocab.styles), ("size", vocab.sizes), ("background", list(vocab.colours))):
        found = next((name for name in known if name in there), None)
        if found is not None:
            return kind, found
    raise InputError(
        f"{word!r} is no word of style, size or background; expected one of "
        f"{', '.join([*vocab.styles, *vocab.sizes, *vocab.colours])}"
    )


def _bare(prompt: str) -> str:
    """The prompt without an article at its beginning."""
    first, _, rest = prompt.partition(" ")
    return rest if rest and first.lower() in ("a", "an", "the") else prompt
