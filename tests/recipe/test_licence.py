"""Every recipe of a real model says under which licence its base stands: some are not for commercial use."""

from __future__ import annotations

import re

import pytest

from palate import recipe
from palate.models.facts import facts_of

NAMES = [name for name in recipe.published() if "\n  name: emoji" not in recipe.text_of(name)]
# words of the hub's licence ids by which a comment is known to name the same licence
WORDS = {"apache-2.0": "Apache-2.0", "openrail++": "RAIL++-M", "creativeml-openrail-m": "RAIL-M"}


@pytest.mark.parametrize("name", NAMES)
def test_it_names_the_licence_of_its_base(name):
    said = re.search(r"^# Licence of the base model: (.+)$", recipe.text_of(name), re.MULTILINE)
    model = recipe.read(name).model
    assert said is not None
    licence = facts_of(model.name).licences.get(model.folder or "")
    if licence in WORDS:
        assert WORDS[licence] in said[1]
    elif licence is not None:
        assert not re.search("Apache|RAIL|MIT", said[1].split("(")[0])
