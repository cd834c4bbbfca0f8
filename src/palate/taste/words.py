"""The third way to a taste, without training: known words of style, background and size that its pictures have.

Where a taste has a word, the word beats every alignment at once; but it takes the choice of a background from the
person, and a style may cost what the prompt asks for. So words are offered, and shown beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from palate.models.vocabulary import Caption, known_words, parse_prompt, vocabulary
from palate.runtime.errors import InputError
from palate.taste.learner import Array

GAIN = 0.5  # standard deviations above plain prompts from which a word is offered
FEWEST = 3  # pictures of a word before its mean counts


class WordChoice(NamedTuple):
    """A word that a taste prefers, and how sure it is."""

    word: str
    kind: str  # style, background, size
    gain: float  # of the taste over plain prompts, in standard deviations of the pool
    pictures: int


def word_gains(utilities: Array, prompts: Sequence[str], std: float) -> list[WordChoice]:
    """What each word adds to the taste's mean: pictures whose prompts name it against those that name no such word.

    utilities (N,) w'z of pictures drawn for `prompts`; best first. Words with fewer than FEWEST pictures are left out.
    """
    captions = [_caption(prompt)._asdict() for prompt in prompts]
    found = []
    vocab = vocabulary()
    for kind, words in (("style", vocab.styles), ("background", list(vocab.colours)), ("size", vocab.sizes)):
        named = np.array([caption[kind] or "" for caption in captions])
        plain = utilities[named == ""]
        for word in words:
            own = utilities[named == word]
            if len(own) >= FEWEST and len(plain) >= FEWEST:
                found.append(WordChoice(word, kind, float(own.mean() - plain.mean()) / std, len(own)))
    return sorted(found, key=lambda choice: -choice.gain)


def offered(gains: Sequence[WordChoice], count: int = 3) -> list[WordChoice]:
    """At most one word of each kind, of those worth offering."""
    best: dict[str, WordChoice] = {}
    for choice in gains:
        if choice.gain > GAIN:
            best.setdefault(choice.kind, choice)
    return list(best.values())[:count]


def with_words(prompt: str, words: Sequence[str]) -> str:
    """The prompt with known words of style, size and background put in, in place of those of the same kind.

    InputError for a prompt or a word that the vocabulary does not know.
    """
    for word in words:
        kind, known = kind_of(word)
        there = parse_prompt(prompt)._asdict()[kind]
        if there is None:
            prompt = f"{prompt} on {article(known)} background" if kind == "background" else f"{known} {_bare(prompt)}"
        else:
            tokens = prompt.split()
            last = max(i for i, token in enumerate(tokens) if _words_of(token) == [there])
            tokens[last] = known
            if last and tokens[last - 1] in ("a", "an"):
                tokens[last - 1 : last + 1] = article(known).split()
            prompt = " ".join(tokens)
    return prompt


def hidden_prompt(prompt: str, rng: np.random.Generator) -> str:
    """The prompt with random words of style, size and background where it names none."""
    vocab, named = vocabulary(), parse_prompt(prompt)._asdict()
    chosen = [
        str(rng.choice(words))
        for kind, words, share in (
            ("size", vocab.sizes, 0.4), ("style", vocab.styles, 0.7), ("background", list(vocab.colours), 0.7))
        if named[kind] is None and rng.random() < share
    ]  # fmt: skip
    try:
        return with_words(prompt, chosen)
    except InputError:  # longer than the model reads
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


def article(word: str) -> str:
    """The word with a or an before it."""
    return f"{'an' if word[:1] in 'aeiou' else 'a'} {word}"


def _bare(prompt: str) -> str:
    """The prompt without an article at its beginning."""
    first, _, rest = prompt.partition(" ")
    return rest if rest and first.lower() in ("a", "an", "the") else prompt


def _words_of(token: str) -> list[str]:
    try:
        return known_words(token)
    except InputError:
        return []


def _caption(prompt: str) -> Caption:
    try:
        return parse_prompt(prompt)
    except InputError:
        return Caption(None)
