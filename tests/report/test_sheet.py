"""A folder of samples at a glance: every picture at its prompt's row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.pages import HOSTILE, Page

from palate.evaluate import pairs, write_samples
from palate.report.sheet import write_sheet
from palate.runtime.errors import InputError


def samples(folder, prompts=("a dog", "a cat"), seeds=(3, 5, 9)):
    """Plain colours: red by prompt, green by seed."""
    told, numbers = pairs(prompts, seeds)
    reds, greens = [prompts.index(prompt) / 2 for prompt in told], [seed / 10 for seed in numbers]
    images = torch.stack(
        [torch.tensor([r, g, 0.0]).view(3, 1, 1).expand(3, 8, 8) for r, g in zip(reds, greens, strict=True)]
    )
    write_samples(folder, images, told, numbers, guidance=1.0, steps=2)
    return folder


def test_rows_are_prompts_and_columns_seeds(tmp_path):
    grid, page = write_sheet(samples(tmp_path))
    pixels = np.asarray(Image.open(grid))
    assert pixels.shape == (16, 24, 3)
    for y in range(2):
        for x, seed in enumerate((3, 5, 9)):
            assert pixels[8 * y, 8 * x].tolist() == [round(255 * y / 2), round(25.5 * seed), 0]
    text = page.read_text("utf-8")
    assert [f"seed {seed}" in text for seed in (3, 5, 9)] == [True] * 3 and Page(text).tags.count("img") == 6 + 2


def test_only_strengths_are_shown_over_the_first_of_their_row(tmp_path):
    """Another seed is no picture before: nothing lies under it. At another strength it is the same noise."""
    _, page = write_sheet(samples(tmp_path / "seeds"))
    assert "<tr data-row" not in page.read_text("utf-8")
    images = torch.zeros(2, 3, 8, 8)
    write_samples(tmp_path / "b", images, ["a dog"] * 2, [3, 3], guidance=1.0, steps=2, strengths=[0.5, 1.0])
    _, page = write_sheet(tmp_path / "b")
    assert page.read_text("utf-8").count('<tr data-row="strength 0.5">') == 1


def test_hostile_prompts_are_inert_and_broken_pictures_named(tmp_path):
    _, page = write_sheet(samples(tmp_path / "a", prompts=(HOSTILE, "a dog")))
    found = Page(page.read_text("utf-8"))
    assert found.tags.count("script") == 1 and found.handlers == [] and "<script>alert(1)</script>" in found.text
    (tmp_path / "a/0001.png").write_bytes(b"no")
    with pytest.raises(InputError, match=r"0001\.png cannot be read"):
        write_sheet(tmp_path / "a")
