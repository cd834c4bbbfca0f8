"""palate.core.require: one wording for every mistake in an algorithm's settings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from palate.core import require


@dataclass
class Made:
    low: float = 2.0
    high: float = 1.0
    name: str = "x"


def test_the_first_broken_rule_names_its_fields_and_their_values():
    require(Made(), ("name: a text", False))
    with pytest.raises(ValueError, match=r"^Made expected low and high: in order; got low = 2\.0, high = 1\.0$"):
        require(Made(), ("name: a text", False), ("low and high: in order", True), ("name: another", True))


def test_a_rule_about_no_field_has_no_value_and_the_name_may_be_given():
    with pytest.raises(ValueError, match=r"^generator expected a word on one side$"):
        require(Made(), ("a word on one side", True), name="generator")
