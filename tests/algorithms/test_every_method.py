"""What holds for every method, whoever adds one."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from support.ranks import MAKE, Networks

from palate.algorithms.table import OWN, find
from palate.core import Batch, Random, Stateful
from palate.testing import PROMPTS, tiny_reward


def test_every_algorithm_is_trained_on_two_ranks_and_resumed_to_the_last_bit():
    """tests/loop/test_distributed.py does both with each of MAKE."""
    assert {type(make()) for make in MAKE.values()} == {find(name).load_class() for name in OWN}


@pytest.mark.parametrize("name", OWN)
def test_every_algorithm_states_what_an_update_calls(name):
    """Its own test counts the calls; here that the statement answers with the settings' defaults."""
    entry = find(name)
    module = importlib.import_module(entry.load_class().__module__)
    needed = {"positive": ("a",), "negative": ("b",)} if name == "srpo" else {}
    if name == "opd":
        needed = {"teachers": {"a": module.Teacher("")}}
    told = module.calls_per_update(entry.settings_class()(**needed))
    assert told.get("forward", told.get("predict", 0)) > 0 and all(count >= 0 for count in told.values())


WITHOUT = ("opd", "distar-head", "sqdf")  # asks no reward; ends the run with a sentence; leaves the trajectory out


BAD = [(name, bad) for name in MAKE for bad in (math.nan, math.inf, -math.inf) if name not in WITHOUT]


@pytest.mark.parametrize("name, bad", [one for one in BAD if one != ("refl", math.inf)])  # good enough for its hinge
def test_a_reward_that_is_not_finite_makes_the_loss_so_and_leaves_no_trace(name, bad):
    """The loop skips a step by its loss: a score that became 0 on the way, or an image that it made the best of its
    pair, would pass for an update. What the algorithm remembers goes into a checkpoint, which holds finite numbers."""
    model, algorithm = Networks(others=("assistant",) if name == "distar" else ()), MAKE[name]()
    prompts = PROMPTS[:4]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.arange(4))

    def sick(images, prompts):
        values = tiny_reward(images, prompts)
        return torch.where(torch.arange(len(values)) == 1, values + bad, values)

    losses = [loss.value for loss in algorithm.step(model, sick, batch, Random(0, 1, range(4)))]
    assert not all(bool(torch.isfinite(value)) for value in losses)
    kept = algorithm.state_dict() if isinstance(algorithm, Stateful) else {}
    assert all(math.isfinite(value) for _, values in kept.get("seen", []) for value in values)
    assert all(bool(torch.isfinite(tensor).all()) for name in ("old", "reference") for tensor in kept.get(name) or [])
