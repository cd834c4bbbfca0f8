"""A recipe of the tiny model, and what a message of the command line looks like."""

from __future__ import annotations

from palate import cli

RECIPE = """# tiny
run: {{folder: {folder}}}
algorithm: {{name: srpo, positive: [warm], negative: [cold], rollout_steps: 2, window: [0.3, 0.9], step: 0.2}}
reward: {{name: emoji}}
prompts: {{list: [a red fox, a blue whale]}}
trainer: {{steps: 4, batch_size: 2, lr: 0.01, checkpoint_every: 2, preview_every: 2, guard: {{every: 0}}}}
"""

# Overrides that make one step of a recipe of the embedded model a matter of seconds.
SMALL = [
    "trainer.batch_size=2", "algorithm.rollout_steps=1", "algorithm.n=1", "trainer.guard.every=0",
    "trainer.preview_every=0", "trainer.steps=1", "prompts={list: [a dog, an apple]}",
]  # fmt: skip


def short(error: str) -> bool:
    return (
        1 <= len(error.splitlines()) <= cli.MAX_LINES + 1 and error.startswith("palate: ") and "Traceback" not in error
    )
