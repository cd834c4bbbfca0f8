"""The recipes of the baselines: two steps of each on the embedded model, and the same two with a stop between them."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

from palate import recipe
from palate.algorithms import table as algorithms
from palate.train import train

SMALL = {  # the least that still runs every part of the method
    "refl-emoji": ["algorithm.T=3"],
    "draft-emoji": ["algorithm.steps=2"],
    "ddpo-emoji": ["algorithm.steps=3", "algorithm.history=2", "algorithm.enough=2"],
    "grpo-emoji": ["algorithm.steps=3", "algorithm.group=2"],
    "dance-grpo-emoji": ["algorithm.steps=3", "algorithm.group=2"],
    "mix-grpo-emoji": ["algorithm.steps=3", "algorithm.group=2", "algorithm.window_every=1"],
    "nft-emoji": ["algorithm.steps=2", "algorithm.group=2", "algorithm.old_rate=0.2"],
    "dpo-emoji": ["algorithm.steps=2"],
}
QUIET = [
    "trainer.batch_size=2",
    "trainer.steps=2",
    "trainer.warmup=0",
    "trainer.guard.every=0",
    "trainer.preview_every=0",
    "model.lora_rank=2",
]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    made = recipe.build(recipe.read("refl-emoji", QUIET))
    return made, [p.detach().clone() for p in made.model.parameters()]


def run(parts, plan, folder, **changes):
    """Train from the first weights, or from the checkpoint when resuming; returns the weights and the rows of steps."""
    made, start = parts
    if not changes.get("resume"):
        with torch.no_grad():
            for p, value in zip(made.model.parameters(), start, strict=True):
                p.copy_(value)
    # two prompts, so that a prompt comes twice and what is remembered of it is used
    train(
        made.model,
        recipe.build_algorithm(plan),
        made.reward,
        made.prompts[:2],
        folder=folder,
        progress=False,
        **{**vars(plan.trainer), **changes},
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]
    return [p.detach().clone() for p in made.model.parameters()], rows


@pytest.mark.parametrize("name", SMALL)
def test_two_steps_train_and_a_stop_between_them_changes_no_bit(name, parts, tmp_path):
    plan = recipe.read(name, [*QUIET, *SMALL[name]])
    whole, rows = run(parts, plan, tmp_path / "whole")
    assert [row["event"] for row in rows] == ["step", "step"]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(row["grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(now, before) for now, before in zip(whole, parts[1], strict=True))
    run(parts, plan, tmp_path / "halves", steps=1)
    halves, again = run(parts, plan, tmp_path / "halves", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert again == rows


def test_cost_of_the_recipes_for_one_prompt():
    """The table of docs/algorithms/baselines.md."""
    table = {
        "refl-emoji": (15, 2),
        "draft-emoji": (20, 6),
        "ddpo-emoji": (30, 14),
        "grpo-emoji": (352, 112),
        "dance-grpo-emoji": (208, 80),
        "mix-grpo-emoji": (160, 32),
        "nft-emoji": (112, 16),
        "dpo-emoji": (36, 2),
        "sqdf-emoji": (9, 1),
    }
    for name, expected in table.items():
        plan = recipe.read(name)
        module = importlib.import_module(algorithms.find(plan.algorithm.name).load_class().__module__)
        calls = module.calls_per_update(plan.algorithm)
        assert (calls["forward"], calls["backward"]) == expected, name


def test_every_method_has_a_recipe_of_its_own_family():
    named = {recipe.read(name).algorithm.name for name in SMALL}
    assert named == {"refl", "draft", "ddpo", "flow_grpo", "nft", "dpo"}
    dance, mix = recipe.read("dance-grpo-emoji").algorithm, recipe.read("mix-grpo-emoji").algorithm
    assert dance.same_noise and dance.fraction == 0.6 and dance.beta == 0 and dance.window is None
    assert mix.window and mix.same_noise and mix.fraction == 1
