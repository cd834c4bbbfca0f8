"""Rewards by name, `reward.name` of a recipe: the only list. Palate's own, those of installed packages, files by path.

An installed package adds a reward by an entry point. Its object, like that of `my_reward.py:score`, is the reward: a
function (images (B, 3, H, W) in [0, 1], B prompts) -> B numbers. Or it is a class, of which one object is made and
called in the same way; its one argument, if it has any, is reward.source.NAME.

    [project.entry-points."palate.rewards"]
    my-reward = "my_package.my_reward:score"

Nothing here imports a reward, or torch; `palate.rewards.load` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from palate.runtime.code import names_a_file
from palate.runtime.errors import InputError

GROUP = "palate.rewards"
HELD_OUT_CANDIDATES = ("clip-score", "pickscore", "hpsv2")  # two towers: their image features measure distances


@dataclass(frozen=True)
class Entry:
    """One reward, not yet imported."""

    name: str
    place: str  # module:object, or a file by path
    kind: str = "external"  # function, embedded, published, taste (learned from votes), service (behind a URL);
    # external: of an installed package or a file
    gradient: bool = True  # whether it is differentiable in the images; of an external one, the loop finds out
    reads_prompt: bool = True
    example: str = ""  # of the URL of a service
    two_tower: bool = False  # whether it looks once and scores several prompts (`core.TwoTower`), for `palate plan`

    @property
    def takes_source(self) -> bool:
        """Whether reward.source.NAME says where its weights or its server are."""
        return self.kind in ("published", "taste", "service", "external")


def _entries() -> dict[str, Entry]:
    embedded = [
        Entry("emoji", "palate.rewards.emoji:load_reward", "embedded", two_tower=True),
        Entry("emoji-heldout", "palate.rewards.emoji:load_reward", "embedded", two_tower=True),
        Entry("emoji-tasks", "palate.rewards.tasks:load_tasks", "embedded", gradient=False),
        Entry("emoji-tasks-soft", "palate.rewards.soft_tasks:load_soft_tasks", "embedded"),
    ]
    simple = [
        Entry(name, f"palate.rewards.simple:{name}", "function", gradient=name != "jpeg_size", reads_prompt=False)
        for name in ("colourfulness", "brightness", "warmth", "saturation", "high_frequency", "jpeg_size")
    ]
    published = [
        Entry("clip-score", "palate.rewards.clip:load_clip_score", "published", two_tower=True),
        Entry("pickscore", "palate.rewards.clip:load_pickscore", "published", two_tower=True),
        Entry("hpsv2", "palate.rewards.clip:load_hpsv2", "published", two_tower=True),
        Entry("aesthetic", "palate.rewards.aesthetic:load_aesthetic", "published", reads_prompt=False),
        Entry("image-reward", "palate.rewards.image_reward:load_image_reward", "published", two_tower=True),
        Entry("hpsv3", "palate.rewards.hpsv3:load_hpsv3", "published", two_tower=True),
    ]
    learned = [Entry("taste", "palate.taste.taste:load_objective", "taste", two_tower=True)]
    services = [
        Entry("remote", "palate.rewards.remote:load_remote", "service", gradient=False,
              example="http://127.0.0.1:8411/score"),
        Entry("vlm-judge", "palate.rewards.vlm:load_vlm", "service", gradient=False,
              example="http://127.0.0.1:8000/v1/chat/completions#MODEL"),
        Entry("checklist", "palate.rewards.checklist:load_checklist", "service", gradient=False,
              example="questions.jsonl http://127.0.0.1:8000/v1/chat/completions#MODEL"),
    ]  # fmt: skip
    return {entry.name: entry for entry in (*embedded, *simple, *published, *learned, *services)}


OWN = _entries()


def names() -> tuple[str, ...]:
    """Every reward's name: Palate's own first, then those of installed packages."""
    return (*OWN, *sorted(point.name for point in _installed() if point.name not in OWN))


def find(name: str) -> Entry:
    """The reward of that name, or of that file. InputError: there is none."""
    if names_a_file(name):
        return Entry(name, name)
    if name in OWN:
        return OWN[name]
    for point in _installed():
        if point.name == name:
            return Entry(name, point.value)
    raise InputError(f"reward.name got {name!r}; expected one of {', '.join(names())}, or FILE.py:FUNCTION")


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))
