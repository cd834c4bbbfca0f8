"""How new assets come into the package: the stage, the base model's folder and the sheet of drawings."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
stage, base_folder = pytest.importorskip("stage"), pytest.importorskip("base_folder")


def test_a_stage_keeps_what_it_has_and_gives_all_of_it_back(tmp_path, monkeypatch):
    package = tmp_path / "src/palate"
    for name, text in (("code.py", "1"), ("assets/prompts/real.txt", "a"), ("assets/emoji/old", "o")):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "assets/licences").mkdir()
    monkeypatch.setattr(stage, "PACKAGE", package)
    assets = stage.build(tmp_path / "stage")
    assert (tmp_path / "stage/palate/code.py").read_text() == "1" and not (assets / "emoji").exists()
    (assets / "prompts/real.txt").write_text("mine")
    (assets / "emoji").mkdir()
    (assets / "emoji/new").write_text("n")
    (assets / "emoji/new").chmod(0o600)
    (package / "assets/prompts/later.txt").write_text("l")  # the package got it while the stage was there
    assert stage.take(tmp_path / "stage") == ["emoji", "licences", "prompts"]
    taken = package / "assets"
    assert sorted(path.name for path in (taken / "emoji").iterdir()) == ["new"]
    assert (taken / "emoji/new").stat().st_mode & 0o777 == 0o644
    assert {p.name: p.read_text() for p in (taken / "prompts").iterdir()} == {"real.txt": "mine", "later.txt": "l"}


def test_the_base_model_ships_in_half_precision_without_the_path_it_came_from(tmp_path):
    vae = AutoencoderTiny(3, 3, (8, 8), (8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=2)
    vae.save_pretrained(tmp_path / "vae")
    again = AutoencoderTiny.from_pretrained(tmp_path / "vae")  # which notes where it came from
    again.save_pretrained(tmp_path / "model/vae")
    (tmp_path / "model/model_index.json").write_text("{}")
    assert str(tmp_path) in (tmp_path / "model/vae/config.json").read_text()
    (tmp_path / "out/left").mkdir(parents=True)
    base_folder.ship(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model_index.json", "vae"]
    assert not {"_name_or_path", "block_out_channels"} & set(json.loads((tmp_path / "out/vae/config.json").read_text()))
    kept = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float16}
    assert all(torch.equal(kept[name], value.half()) for name, value in vae.state_dict().items())


def test_the_sheet_is_two_of_255_away_and_what_is_opaque_or_invisible_stays_so():
    build_atlas = pytest.importorskip("build_atlas")
    values = np.arange(256, dtype=np.uint8).repeat(4).reshape(16, 16, 4)
    found = np.asarray(build_atlas.coarse(Image.fromarray(values))).astype(int)
    assert np.abs(found - values).max() == 2 and found[0, 0, 3] == 0 and found[-1, -1, 3] == 255
    assert len(np.unique(found)) == 65
