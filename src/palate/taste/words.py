"""The third way to a taste, without training: known words of style, background and size that its pictures have.

Where a taste has a word, the word beats the reward's gradient at once; but it takes the choice of a background from
the person, and a style may cost what the prompt asks for. So words are offered, and shown beside; the generator can
learn to draw by a background where the prompt leaves it open (`unasked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from palate.models.vocabulary import Caption, parse_prompt, vocabulary, with_words
from palate.runtime.errors import InputError
from palate.taste.learner import Array, Posterior

GAIN = 0.5  # standard deviations above plain prompts from which a word is offered
FEWEST = 3  # pictures of a word before its mean counts


class WordChoice(NamedTuple):
    """A word that a taste prefers, and how sure that is."""

    word: str
    kind: str  # style, background, size
    gain: float  # of the taste over plain prompts, in standard deviations of the pool
    pictures: int
    error: float = 0.0  # of the gain: a standard deviation of what the votes leave open


def word_gains(z: Array, prompts: Sequence[str], posterior: Posterior, std: float) -> list[WordChoice]:
    """What each word adds to the taste: pictures whose prompts name it against those that name no such word.

    z (N, D) standardised features of pictures drawn for `prompts`, std the taste's standard deviation; best first.
    Words with fewer than FEWEST pictures are left out.
    """
    captions = [_caption(prompt)._asdict() for prompt in prompts]
    found = []
    vocab = vocabulary()
    for kind, words in (("style", vocab.styles), ("background", list(vocab.colours)), ("size", vocab.sizes)):
        named = np.array([caption[kind] or "" for caption in captions])
        plain = z[named == ""]
        for word in words:
            own = z[named == word]
            if len(own) >= FEWEST and len(plain) >= FEWEST:
                mean, variance = posterior.difference(own.mean(0)[None] - plain.mean(0))
                found.append(WordChoice(word, kind, float(mean[0]) / std, len(own), float(variance[0]) ** 0.5 / std))
    return sorted(found, key=lambda choice: -choice.gain)


def offered(gains: Sequence[WordChoice], count: int = 3) -> list[WordChoice]:
    """At most one word of each kind, of those worth offering."""
    best: dict[str, WordChoice] = {}
    for choice in gains:
        if choice.gain > GAIN:
            best.setdefault(choice.kind, choice)
    return list(best.values())[:count]


def unasked(choices: Sequence[WordChoice], known: Sequence[str] = ()) -> list[str]:
    """Of the offered words those that a generator is to learn to draw by without being told (`direct`'s context).

    Backgrounds alone: a style or a size draws the thing anew, which costs concepts, and the reward finds them too.
    known: what it draws by already, which gives way only to a clearly better background, one whose gain less one
    standard deviation is still worth offering: most pictures that were chosen among have the known one.
    """
    new = [choice for choice in choices if choice.kind == "background" and choice.word not in known]
    return [choice.word for choice in new if not known or choice.gain - choice.error > GAIN]


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


def _caption(prompt: str) -> Caption:
    try:
        return parse_prompt(prompt)
    except InputError:
        return Caption(None)
