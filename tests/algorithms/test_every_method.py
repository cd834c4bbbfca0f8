"""What holds for every method, whoever adds one."""

from __future__ import annotations

import importlib

import pytest
from support.ranks import MAKE

from palate.algorithms.table import OWN, find


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
