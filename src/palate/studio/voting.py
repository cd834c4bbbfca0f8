"""One person's choosing: the pair on the screen, the votes, and the taste after each of them.

The pair that is shown is a file, so that a reload or a second window shows the same one; a vote names the pair that it
is about, so that a key pressed twice counts once.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palate.runtime.errors import InputError
from palate.runtime.files import json_digest
from palate.studio.artist import Artist, Drawn
from palate.studio.known import KnownFeatures
from palate.studio.pair import PAIR, Pair, asked_once, unanswered
from palate.studio.steering import one_line
from palate.studio.workspace import Workspace
from palate.taste import card as cards
from palate.taste.ask import RANDOM, REPEAT_EVERY, next_pair
from palate.taste.features import Scaling, scaling_of
from palate.taste.learner import Array, Posterior, fit
from palate.taste.staging import bring_in, staging
from palate.taste.taste import SIDE_STD, Taste, fit_taste, learn
from palate.taste.votes import CHOICES, OUTCOMES, Picture, Vote, VoteStore
from palate.taste.words import WordChoice, offered, word_gains

SCALING = "scaling.safetensors"
REFIT_PRIOR = 10  # votes between choices of the prior
FREEZE = 64  # pictures after which the features' constants may be frozen
Own = tuple[str, bytes]  # a picture of the person's: the name of its file, and what is in it


class Voting:
    def __init__(self, workspace: Workspace, artist: Artist):
        self.workspace, self.artist = workspace, artist
        self.session = secrets.token_hex(4)
        self._rng = np.random.default_rng()
        self._features = KnownFeatures(artist, workspace.store.pictures)
        self._read: tuple[Any, list[Vote]] = (None, [])
        self._scaling: Scaling | None = None
        self._fitted: tuple[int, Posterior] | None = None
        self._summary: tuple[Any, dict[str, Any]] | None = None

    # --------------------------------------------------------------------------------------------------- votes

    def votes(self) -> list[Vote]:
        """The votes in force; read again when the file has changed, by whomever."""
        file = self.workspace.store.file
        try:
            stamp = (file.stat().st_mtime_ns, file.stat().st_size)
        except FileNotFoundError:
            return []
        with self.workspace.turn():
            if self._read[0] != stamp:
                self._read = (stamp, self.workspace.store.read())
            return self._read[1]

    def pair(self) -> Pair | None:
        """The pair on the screen; None while no picture is there yet."""
        with self.workspace.turn():
            return unanswered(self.workspace, self.votes()) or self._next(None)

    def forget_pair(self) -> None:
        """Let other settings count from now on, and not from the pair after the one on the screen."""
        with self.workspace.turn():
            (self.workspace.home / PAIR).unlink(missing_ok=True)

    def vote(self, pair_id: str, choice: str, ms: int | None) -> Vote | None:
        """Store the choice about that pair and bring the next one; None, and nothing stored, if the screen is older."""
        if choice not in CHOICES:
            raise InputError(f"choice: expected one of {', '.join(CHOICES)}, got {choice[:20]!r}")
        with self.workspace.turn():
            pair = self.pair()
            if pair is None or pair.id != pair_id:
                return None
            ms = ms if ms is None or 0 <= ms < 3_600_000 else None
            vote = Vote(pair.prompt, pair.left, pair.right, choice, id=pair.id, ms=ms, session=self.session,
                        round=self.round(), repeat_of=pair.repeat_of)  # fmt: skip
            self.workspace.store.append(vote)
            self._next(vote)
            return vote

    def undo(self) -> Vote | None:
        """Take the newest vote back and show its pair again."""
        with self.workspace.turn():
            vote = self.workspace.store.undo()
            if vote is not None:
                self._fitted = None
                # a new name: the line that took the vote back names the old one
                Pair(secrets.token_hex(8), vote.prompt, vote.left, vote.right, vote.repeat_of).show(self.workspace)
            return vote

    def add_pictures(self, prompt: str, better: Sequence[Own], worse: Sequence[Own]) -> int:
        """Own pictures as votes: each of the better ones beat one of the worse ones, in turn; how many votes are new.
        InputError: a side has none, or one, which is named, is no picture; nothing is stored then."""
        if not better or not worse:
            raise InputError("give at least one picture that you like and one that you do not")
        store, votes = self.workspace.store, []
        with staging(store) as staged:
            kept = [[_kept(staged, *each) for each in side] for side in (better, worse)]
            for i in range(max(map(len, kept))):
                liked, other = (Picture(side[i % len(side)], prompt) for side in kept)
                left, right, choice = (liked, other, "left") if i % 2 == 0 else (other, liked, "right")
                name = json_digest(["own", prompt, liked.file, other.file])[:16]
                votes.append(Vote(prompt, left, right, choice, name, session=self.session, round=self.round()))
            return bring_in(staged, store, lambda: store.extend(votes))

    def round(self) -> int:
        """1, and one more for each model that was aligned and is now drawn from."""
        return 1 + len(self.workspace.rounds())

    # ------------------------------------------------------------------------------------------------ next pair

    def _next(self, last: Vote | None) -> Pair | None:
        votes, name = self.votes(), secrets.token_hex(8)
        due = last is not None and len(votes) % REPEAT_EVERY == 0 and last.repeat_of is None
        if due and (earlier := asked_once(self.workspace, votes)):
            again = earlier[int(self._rng.integers(len(earlier)))]
            return Pair(name, again.prompt, again.right, again.left, again.id).show(self.workspace)
        rows = self.artist.rows(self.workspace.settings()["prompts"])
        if len(rows) < 2:
            return None
        index = {drawn.picture.file: i for i, drawn in enumerate(rows)}
        shown = {frozenset((index.get(v.left.file, -1), index.get(v.right.file, -2))) for v in votes}
        champion = None
        if last is not None and self.workspace.settings()["mode"] == "champion" and last.choice in ("left", "right"):
            champion = index.get((last.left if last.choice == "left" else last.right).file)
        scaling = self.scaling(rows)
        z = scaling(torch.from_numpy(np.stack([drawn.features for drawn in rows]))).numpy()
        posterior = self.posterior(scaling) if len(votes) >= RANDOM else None
        groups = [drawn.prompt for drawn in rows]
        chosen = next_pair(posterior, z, groups, shown, self._rng, champion=champion)
        if chosen is None and champion is not None:
            chosen = next_pair(posterior, z, groups, shown, self._rng)
        if chosen is None:  # every pair was shown: more pictures come
            self.artist.wake([str(self._rng.choice(groups))])
            return None
        left, right = (rows[i] for i in chosen)
        return Pair(name, left.prompt, left.picture, right.picture).show(self.workspace)

    # ---------------------------------------------------------------------------------------------------- taste

    def scaling(self, rows: Sequence[Drawn] | None = None) -> Scaling:
        """The features' constants: frozen at the first taste, so that a later pool does not move old votes."""
        path = self.workspace.home / SCALING
        with self.workspace.turn():
            if self._scaling is None and path.is_file():
                self._scaling = Scaling.load(path, self.artist.features.probe())
            if self._scaling is not None:
                return self._scaling
            rows = self.artist.rows() if rows is None else rows
            features = torch.from_numpy(np.stack([drawn.features for drawn in rows]))
            made = scaling_of(features, [drawn.prompt for drawn in rows], self.artist.features.sizes)
            if len(self.votes()) >= cards.START and len(rows) >= FREEZE:
                made.save(path, self.artist.features.probe())
                self._scaling = made
            return made

    def differences(self, scaling: Scaling) -> tuple[Array, Array, list[Vote]]:
        """Standardised feature differences (n, D), outcomes (n,) and the votes whose pictures are there."""
        both = [(self._features.of(v.left, v.prompt), self._features.of(v.right, v.prompt), v) for v in self.votes()]
        there = [(left, right, v) for left, right, v in both if left is not None and right is not None]
        votes, d = [v for *_, v in there], [left - right for left, right, _ in there]
        size = len(self.artist.features.columns)
        table = (np.stack(d) if d else np.zeros((0, size))) * scaling.gain.numpy()
        return table, np.array([OUTCOMES[vote.choice] for vote in votes]), votes

    def posterior(self, scaling: Scaling) -> Posterior:
        """Refitted after every vote; its prior is chosen anew after every REFIT_PRIOR."""
        d, y, _ = self.differences(scaling)
        if self._fitted and self._fitted[0] // REFIT_PRIOR == len(y) // REFIT_PRIOR and len(y) > 0:
            found = fit(d, y, priors=(self._fitted[1].prior,), side_std=SIDE_STD)
        else:
            found = fit(d, y, side_std=SIDE_STD)
        self._fitted = (len(y), found)
        return found

    def summary(self) -> dict[str, Any]:
        """What is known of the taste: counts at any time; accuracy, words and pictures from the first taste on."""
        votes, rows = self.votes(), self.artist.rows()
        newest = rows[-1].picture.file if rows else ""  # two rounds have as many pictures each when both are full
        stamp = (len(votes), votes[-1].id if votes else "", len(rows), newest)
        with self.workspace.turn():
            if self._summary and self._summary[0] == stamp:
                return self._summary[1]
            found: dict[str, Any] = {"votes": len(votes), "start": cards.START, "good": cards.GOOD, "taste": None}
            if len(votes) >= cards.START and self.artist.ready.is_set() and len(self.artist.pool) >= 2:
                found["taste"] = self._card()
            self._summary = (stamp, found)
            return found

    def _card(self) -> dict[str, Any]:
        rows = self.artist.rows() or self.artist.pool
        scaling = self.scaling(rows)
        d, y, votes = self.differences(scaling)
        z = scaling(torch.from_numpy(np.stack([drawn.features for drawn in rows]))).numpy()
        unseen = cards.unseen_pairs(z, [drawn.prompt for drawn in rows])
        posterior, card = learn(d, y, [vote.rater for vote in votes], z, self.artist.features.columns, unseen)
        utilities = z @ posterior.mean
        order = utilities.argsort()
        place = {vote.id: i for i, vote in enumerate(votes)}
        repeats = [(place[v.repeat_of], i) for i, v in enumerate(votes) if v.repeat_of in place]
        std = scaling.std(torch.from_numpy(posterior.mean))
        gains = word_gains(z, [drawn.picture.prompt for drawn in rows], posterior, std)
        return card | {
            "offered": offered(gains), "gone": len(self.votes()) - len(votes), "older": self._of_another_model(votes),
            "repeats": cards.agreement([float(v) for v in y], repeats),
            "liked": [rows[i].picture.file for i in order[::-1][:6]],
            "disliked": [rows[i].picture.file for i in order[:6]],
        }  # fmt: skip

    def _of_another_model(self, votes: Sequence[Vote]) -> int:
        """How many votes are about pictures of other base weights than are drawn with now."""
        return sum(v.left.model not in ("", self.artist.fingerprint) for v in votes)

    def learn_taste(self) -> Path:
        """Fit the taste on all votes so far and save it under the next number; its folder."""
        if not self.artist.wait(60):
            raise InputError(self.artist.silence)
        rows = self.artist.rows() or self.artist.pool
        scaling = self.scaling(rows)
        taste: Taste = fit_taste(self.workspace.store, base=self.artist.reward, scaling=scaling)
        if (shown := self.summary()["taste"]) is not None:  # what the page says, of the pool and not of voted pictures
            said = {key: shown[key] for key in ("expected", "verdict", "learnt")}
            taste = replace(taste, card=taste.card | said)
        with self.workspace.turn():
            number = 1 + max((int(p.name) for p in self.workspace.tastes.glob("*") if p.name.isdecimal()), default=0)
            return taste.save(self.workspace.tastes / str(number))

    def words(self) -> list[WordChoice]:
        card = self.summary()["taste"]
        return list(card["offered"]) if card else []


def _kept(store: VoteStore, name: str, content: bytes) -> str:
    """The name of a picture in the store. InputError names the person's file."""
    try:
        return store.keep(content)
    except InputError as error:
        raise InputError(f"{one_line(name)[:80] or 'a file'}: {error}") from error
