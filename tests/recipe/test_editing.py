"""One value of a recipe's text is changed, and nothing that stands around it."""

from __future__ import annotations

import pytest
import yaml

from palate import recipe
from palate.recipe.editing import with_value, with_values, without_head
from palate.recipe.reader import Loader, text_of

TEXT = """# a recipe
run:
  folder: runs/a # where
model:
  name: emoji
reward:
  name: taste
  taste:
    absolute: 0.1 # of it
    confidence: 1
  source: { taste: x }
trainer:
  steps: 3
"""


@pytest.mark.parametrize(
    "key, value, old, new",
    [
        ("trainer.steps", 40, "  steps: 3\n", "  steps: 40\n"),
        ("run.folder", "runs/b", "  folder: runs/a # where\n", '  folder: "runs/b"\n'),
        ("model.lora_rank", 8, "  name: emoji\n", "  name: emoji\n  lora_rank: 8\n"),
        ("reward.taste", None, "  taste:\n    absolute: 0.1 # of it\n    confidence: 1\n", ""),
        ("reward.source", {"a": "b"}, "  source: { taste: x }\n", '  source: {"a": "b"}\n'),
        ("trainer.steps", None, "trainer:\n  steps: 3\n", ""),
        ("model.quantize", "nf4", "  name: emoji\n", "  name: emoji\n  quantize: nf4\n"),
        ("prompts.file", "no", "  steps: 3\n", '  steps: 3\nprompts:\n  file: "no"\n'),
        ("sample.steps", None, "", ""),
        ("model.device", None, "", ""),
    ],
)  # fmt: skip
def test_only_the_key_s_lines_change(key, value, old, new):
    expected = TEXT.replace(old, new, 1) if old else TEXT
    if key == "prompts.file":
        expected = TEXT + 'prompts:\n  file: "no"\n'
    assert with_value(TEXT, key, value) == expected


def test_every_published_recipe_takes_values_and_reads_them_back():
    for name in recipe.published():
        before = recipe.as_tree(recipe.read(name))
        text = with_values(text_of(name), {"run.folder": "runs/x: y # z", "trainer.seed": 7, "sample.steps": 5})
        after = recipe.as_tree(recipe.parse(text))
        assert (after["run"]["folder"], after["trainer"]["seed"], after["sample"]["steps"]) == ("runs/x: y # z", 7, 5)
        for tree in (before, after):
            del tree["run"]["folder"], tree["trainer"]["seed"], tree["sample"]["steps"]
        assert recipe.as_tree(recipe.parse(without_head(text)))["algorithm"] == after["algorithm"]
        assert after == before, name


def test_a_key_of_another_depth_is_refused():
    for key in ("run", "trainer.guard.every"):
        with pytest.raises(ValueError, match=r"expected section\.key"):
            with_value(TEXT, key, 1)


def test_a_word_that_yaml_would_read_as_another_value_stands_in_quotes():
    for word in ("True", "FALSE", "Null", "NO"):
        text = with_value("algorithm:\n  name: srpo\n", "algorithm.template", word)
        assert yaml.load(text, Loader)["algorithm"]["template"] == word
