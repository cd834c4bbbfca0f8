"""The card that ships is the one that its figures give."""

from __future__ import annotations

import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
model_card = pytest.importorskip("model_card")


def test_the_shipped_card_is_what_the_files_beside_it_give():
    shipped = (model_card.ASSETS / "README.md").read_text("utf-8")
    assert shipped == model_card.card(model_card.ASSETS) and "not measured" not in shipped
