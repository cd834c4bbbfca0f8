"""Control words added and taken away while a run trains: what is refused, and what each word has done so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from palate.algorithms.srpo import SRPOSettings
from palate.models.vocabulary import kind_of, known_words, parse_prompt, vocabulary
from palate.runs.comparison import common_rows
from palate.runtime.errors import InputError
from palate.runtime.exclusive import exclusive
from palate.studio.artist import Artist
from palate.studio.known import previews
from palate.studio.runview import SIDES, RunView, Words, read_rows
from palate.studio.workspace import Workspace
from palate.train.steering import CONTROL, parse_control, steer

LONGEST = 40  # characters of a word


def one_line(text: str) -> str:
    """The text on one line, without signs that write backwards or not at all."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def control_words() -> list[str]:
    """Words of style, size and background that the embedded model reads."""
    vocab = vocabulary()
    return [*vocab.styles, *vocab.sizes, *vocab.colours]


def checked_word(word: str, words: Words, *, embedded: bool) -> str:
    """The word as it can be used. InputError says why not, and what is near."""
    word = one_line(word)
    if not word:
        raise InputError("write a word first, for example 3d, cartoon or large")
    if len(word) > LONGEST:
        raise InputError(f"a control word has at most {LONGEST} characters; {word[:LONGEST]!r}... is longer")
    taken = {**words.positive, **words.negative}
    if embedded:
        try:
            meaning = known_words(word)
            kind_of(word)
        except InputError as error:  # the field is no prompt: the word and what is near is enough
            unknown = str(error).splitlines()[0].partition(" in prompt ")[0]
            said = f"{unknown[:1].upper()}{unknown[1:]}; it knows {', '.join(control_words())}"
            raise InputError(said) from error
        for other in taken:
            if known_words(other) == meaning:
                same = "" if other == word else f", which means the same as {word!r}"
                raise InputError(f"{other!r}{same} is {'wanted' if other in words.positive else 'unwanted'} already")
    elif word in taken:
        raise InputError(f"{word!r} is {'wanted' if word in words.positive else 'unwanted'} already")
    return word


def waiting_words(folder: Path) -> dict[str, list[str]]:
    """What waits in the control file for the run's next step, by side."""
    try:
        words = parse_control((folder / CONTROL).read_bytes())
    except (OSError, ValueError):
        return {}
    return {side: given for side, given in words.items() if given is not None}


def wanted_words(view: RunView) -> Words:
    """Those in force with those that wait for the next step, which have step -1.

    The control file is read before the log: between the two the run may take up words, and they stand in one of both.
    """
    waiting = waiting_words(view.folder)
    now = replace(view, rows=read_rows(view.folder / "metrics.jsonl")).words()
    sides = {side: dict(now.of(side)) for side in SIDES}
    for side, given in waiting.items():
        sides[side] = {word: sides[side].get(word, -1) for word in given}
    return Words(**sides)


def _check_side(side: str) -> None:
    if side not in SIDES:
        raise InputError("a word is wanted (positive) or unwanted (negative)")


def change(view: RunView, side: str, word: str, *, add: bool) -> None:
    """Add a word to a side of a run at work, or take it away. What another window does at once counts as well."""
    _check_side(side)
    if not view.steerable:
        raise InputError(f"{view.name} trains with {view.recipe.algorithm.name}, which has no control words")
    if not view.busy:
        raise InputError(f"{view.name} is not training ({view.state}); start a run, or resume this one, then steer it")
    with exclusive(view.folder):
        words = wanted_words(view)
        if add:
            word = checked_word(word, words, embedded=view.recipe.model.name == "emoji")
            new = [*words.of(side), word]
        else:
            new = [other for other in words.of(side) if other != word]
            if not new and isinstance(view.recipe.algorithm, SRPOSettings):
                raise InputError(f"SRPO compares wanted with unwanted words: add another one before you take {word!r} "
                                 "away")  # fmt: skip
        both = {"positive": list(words.positive), "negative": list(words.negative)}
        steer(view.folder, **(both | {side: new}))  # both, so that a word may change its side


class Draft:
    """Words chosen before a run is there to steer."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def words(self) -> Words:
        tree = self.workspace.read("steer.json")
        lists = {s: tree[s] if isinstance(tree.get(s), list) else [] for s in SIDES}
        sides = {s: [w for w in words if isinstance(w, str)] for s, words in lists.items()}
        return Words(**{side: dict.fromkeys(words, 0) for side, words in sides.items()})

    def change(self, side: str, word: str, *, add: bool) -> None:
        _check_side(side)
        with self.workspace.turn():
            words = self.words()
            sides = {s: list(words.of(s)) for s in SIDES}
            if add:
                sides[side].append(checked_word(word, words, embedded=True))
            else:
                sides[side] = [other for other in sides[side] if other != word]
            self.workspace.write("steer.json", sides)


class Effects:
    """How many of a run's pictures show a word, as the embedded reward reads them: before it held and now."""

    def __init__(self, artist: Artist):
        self.artist = artist
        self._counts: dict[tuple[str | int, ...], dict[str, int]] = {}

    def of(self, view: RunView, words: Words) -> dict[str, dict[str, Any]]:
        """word -> {"before", "now", "of"}, `now` None while there is no picture since the word holds; what is not one
        word of style, size or background is left out."""
        found: dict[str, dict[str, Any]] = {}
        if view.recipe.model.name != "emoji" or not view.previews or not self.artist.works:
            return found
        for word, since in {**words.positive, **words.negative}.items():
            known = known_words(word)
            newest = view.previews[-1]
            holds = newest + 1 if since < 0 else max(since, 1)  # the first update that knows the word
            earlier = [step for step in view.previews if step < holds] or view.previews
            rows = view.pictures(earlier[-1]), view.pictures(newest)
            shared = common_rows(*rows)  # a resumed run may draw other prompts than before
            before = self._count(view, earlier[-1], [rows[0][i] for i, _ in shared])
            now = self._count(view, newest, [rows[1][j] for _, j in shared])
            # nothing is in `now` while its pictures are being written, or taken away
            if len(known) == 1 and known[0] in now:
                found[word] = {"before": before.get(known[0], 0), "of": now[""],
                               "now": now[known[0]] if newest >= holds else None}  # fmt: skip
        return found

    def _count(self, view: RunView, step: int, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
        key = (*view.drawn(step), *(row["file"] for row in rows))
        if key not in self._counts and rows:
            images = previews(view.folder, step, rows)
            if images is None:
                return {}
            self._counts[key] = self._read(images, [row["prompt"] for row in rows])
        return self._counts.get(key, {})

    def _read(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, int]:
        vocab, reward = vocabulary(), self.artist.reward
        concepts = [parse_prompt(prompt).concept or "" for prompt in prompts]
        counts = {"": len(prompts)}
        kinds = (
            (vocab.styles, "{word} {concept}"), (list(vocab.colours), "{concept} on a {word} background"),
            (vocab.sizes, "{word} {concept}"),
        )  # fmt: skip
        with torch.no_grad():
            for words, template in kinds:
                texts = [[template.format(word=w, concept=c).strip() for c in concepts] for w in words]
                best = torch.stack([reward(images, column) for column in texts]).argmax(0).tolist()
                counts |= {word: best.count(k) for k, word in enumerate(words)}
        return counts
