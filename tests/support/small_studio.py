"""`palate studio` whose runs have their guard look at a few prompts: on one core a look at a hundred takes longer than
what the tests are about."""

from __future__ import annotations

from palate import cli
from palate.studio.process import Processes

LOOKS = ("trainer.guard.prompts=8", "trainer.guard.action=warn")
train = Processes.train


def train_small(self, recipe, name, overrides=()):
    train(self, recipe, name, [*overrides, *LOOKS])


if __name__ == "__main__":
    Processes.train = train_small
    cli.main()
