"""The pair on the screen, as it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from palate.studio.workspace import Workspace
from palate.taste.votes import Picture, Vote

PAIR = "pair.json"
REMEMBERED = 5  # newest votes, whose pairs are not asked again


class Pair(NamedTuple):
    """What is on the screen."""

    id: str
    prompt: str
    left: Picture
    right: Picture
    repeat_of: str | None = None

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Pair | None:
        """What `tree` once gave; None where it is no pair."""
        try:
            left, right = Picture(**tree["left"]), Picture(**tree["right"])
            return cls(tree["id"], tree["prompt"], left, right, tree["repeat_of"])
        except (KeyError, TypeError):
            return None

    def tree(self) -> dict[str, Any]:
        """As it is stored."""
        return {"id": self.id, "prompt": self.prompt, "left": asdict(self.left), "right": asdict(self.right),
                "repeat_of": self.repeat_of}  # fmt: skip

    def show(self, workspace: Workspace) -> Pair:
        """Make it the pair on the screen."""
        workspace.write(PAIR, self.tree())
        return self


def unanswered(workspace: Workspace, votes: Sequence[Vote]) -> Pair | None:
    """The pair on the screen; None where there is none, a picture of it is gone, or it was voted on.

    A pair that was voted on still stands in its file where there was no other to follow it, because a new model had
    drawn nothing yet, or where the studio was killed between the vote and the next pair: it is not shown again.
    """
    pair, pictures = Pair.of(workspace.read(PAIR)), workspace.store.pictures
    if pair is None or any(vote.id == pair.id for vote in votes):
        return None
    return pair if all((pictures / p.file).is_file() for p in (pair.left, pair.right)) else None


def asked_once(workspace: Workspace, votes: Sequence[Vote]) -> list[Vote]:
    """Those whose pairs can be asked again: drawn here and still there, asked once, and not still remembered."""
    twice, pictures = {vote.repeat_of for vote in votes}, workspace.store.pictures
    return [
        vote
        for vote in votes[:-REMEMBERED]
        if vote.repeat_of is None
        and vote.id not in twice
        and vote.left.model
        and all((pictures / picture.file).is_file() for picture in (vote.left, vote.right))
    ]
