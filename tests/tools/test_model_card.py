"""The model card says what the files and the figures beside it say."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from support import ROOT

from palate.models.vocabulary import vocabulary

sys.path.insert(0, str(ROOT / "tools"))
model_card = pytest.importorskip("model_card")
ASSETS = ROOT / "src/palate/assets"


@pytest.fixture
def assets(tmp_path):
    """The package's words and prompts, with a network of ten weights, and two figures."""
    for name in ("atlas", "prompts"):
        shutil.copytree(ASSETS / name, tmp_path / name)
    for name in ("tasks", "tasks-train"):
        (tmp_path / f"prompts/emoji-{name}.txt").write_text("a cat\n" * 3)
    (tmp_path / "emoji/unet").mkdir(parents=True)
    shutil.copy(ASSETS / "emoji/unet/config.json", tmp_path / "emoji/unet")
    save_file({"a": torch.zeros(200, 1000), "b": torch.zeros(2, 50_000)}, tmp_path / "emoji/unet/x.safetensors")
    figures = {"styled": {"concept": 0.97123}, "autoencoder": {"psnr": 34.04}, "tasks": {"counting": 0.5}}
    figures |= {model_card.FIRST: {"frechet": {"distance": 0.5}}, model_card.SHARED: {"frechet": {"distance": 0.25}}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    return tmp_path


def test_the_card_says_what_lies_beside_it(assets):
    text = model_card.card(assets)
    assert "{" not in text and f"of {len(vocabulary().concepts)} concepts" in text and "| 0.3 M;" in text
    assert "| encode and decode 256 fresh compositions, dB | 34.0 | >= 33 |" in text
    assert "| concept right, trained (concept, style) pairs | 0.971 | >= .97 |" in text
    assert "| style right, same | not measured | >= .97 |" in text and "| counting | 0.500 | >= .80 |" in text
    assert "judge features | 0.500 | 0.250 |" in text


def test_a_card_of_other_figures_is_found_out(assets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model_card.py", "--assets", str(assets)])
    model_card.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--check"])
    with pytest.raises(SystemExit) as ended:
        model_card.main()
    assert ended.value.code == 0
    (assets / "figures.json").write_text("{}")
    with pytest.raises(SystemExit, match="is not what its figures say"):
        model_card.main()


def test_every_row_is_of_a_part_that_is_measured():
    measured = pytest.importorskip("evaluate_assets").PARTS
    assert {place[0] for _, place, _ in model_card.ROWS} <= set(measured) and "tasks" in measured
