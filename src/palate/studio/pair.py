"""The pair on the screen, as it is stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from palate.taste.votes import Picture


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
