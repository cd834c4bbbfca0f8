"""The picture at the head of the README: the right tiles in the right places."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pages import fake_run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import figures


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    prompts = ("an apple on a blue background", "a fox on a red background", "a dog", "an owl")
    found = [fake_run(root / name, prompts=prompts, lift=lift, steps=2) for name, lift in (("a", 1.0), ("b", 0.5))]
    for run, style in zip(found, ("3d", "flat"), strict=True):
        evaluation = json.loads((run / "evaluation.json").read_text())
        evaluation["words"] = {"positive": [style], "negative": []}
        for row in evaluation["rows"]:
            right = row["prompt"] == "a fox on a red background" and row["seed"] == 2
            row |= {"correct": float(right), "style": style if right else "other"}
            row["base"] |= {"correct": 1.0, "style": "other"}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
    return found


def test_a_row_is_one_noise_in_every_column_and_the_best_row_comes_first(runs, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(figures, "labelled", lambda *told: names.append(told))
    figures.hero(runs, [], tmp_path / "hero.png", rows=2)
    tiles, columns, rows, _, _ = names[0]
    assert columns == ["base model", "3d", "flat"] and rows[0] == "a fox\non a red background" and len(tiles) == 2
    evaluation = json.loads((runs[0] / "evaluation.json").read_text())
    (file,) = [row["file"] for row in evaluation["rows"] if row["correct"]]
    folders = [runs[0] / "evaluation/base", runs[0] / "evaluation/result", runs[1] / "evaluation/result"]
    for tile, folder in zip(tiles[0], folders, strict=True):
        assert np.array_equal(np.asarray(tile), np.asarray(Image.open(folder / file).convert("RGB")))
    figures.hero(runs, ["a dog"], tmp_path / "hero.png")
    assert names[1][2] == ["a dog"]


def test_tiles_are_scaled_by_whole_pixels_and_stand_where_their_labels_say(tmp_path):
    tiles = [[Image.new("RGB", (8, 8), colour) for colour in row] for row in (("red", "blue"), ("lime", "black"))]
    figures.labelled(tiles, ["one", "two"], ["first", "second"], tmp_path / "x/sheet.png", 3)
    sheet = np.asarray(Image.open(tmp_path / "x/sheet.png"))
    left = sheet.shape[1] - (2 * 32 - 8)  # what the longest name needs
    assert sheet.shape[0] == 30 + 2 * 32 - 8 and (sheet[30:, left - 4 : left] == 255).all()
    assert (sheet[30:54, left : left + 24] == (255, 0, 0)).all() and (sheet[62:86, left + 32 :] == 0).all()
