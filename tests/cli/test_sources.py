"""`palate sample` draws with a base model that no run knows yet: any folder that train takes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from support.commands import short
from support.tiny_families import load, saved

from palate.cli.model_source import family_of, load_source
from palate.evaluate import generate
from palate.runtime.errors import InputError
from palate.runtime.images import to_pixels


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("stable-diffusion", "stable-diffusion"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("flux", "flux"), ("sana", "sana"),
        ("pixart-alpha", "pixart"), ("z-image", "z-image"), ("aura-flow", "aura-flow"), ("flux2-klein", "flux2"),
    ],
)  # fmt: skip
def test_a_folder_is_of_the_family_whose_parts_it_holds(name, family):
    index = json.loads((saved(name)[0] / "model_index.json").read_text())
    assert family_of(index, "there") == family


def test_a_folder_of_no_family_is_refused_by_what_it_holds(tmp_path, palate):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet3DConditionModel"]}))
    with pytest.raises(InputError, match=r"no family that Palate knows \(UNet3DConditionModel\)"):
        load_source(str(tmp_path))
    code, _, error = palate("sample", "--model", "flux", "--prompt", "a dog")
    assert code == 2 and "a family of models; give the folder or hub id of one" in error
    (tmp_path / "model_index.json").write_text("[")
    code, _, error = palate("sample", "--model", tmp_path, "--prompt", "a dog")
    assert code == 2 and short(error)


def test_the_base_is_drawn_as_the_family_draws_it(tmp_path, palate):
    folder, _ = saved("stable-diffusion")
    code, out, _ = palate(
        "sample", "--model", folder, "--prompt", "a dog", "--seeds", "1", "--steps", "2", "--out", tmp_path
    )
    assert code == 0 and "1 image in" in out
    images = generate(load("stable-diffusion", training="none", dtype="bfloat16"), ["a dog"], [1], steps=2)
    drawn = torch.tensor(to_pixels(images)[0].astype(int))
    found = torch.tensor(list(Image.open(tmp_path / "0000.png").tobytes())).view(drawn.shape)
    assert (found - drawn).abs().max() <= 1
