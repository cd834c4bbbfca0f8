"""A stranger's way with a model over a diffusers folder, by commands alone: dry run, train, judge, draw, hand on."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.tiny_families import SIZE, save_clip, saved

TALL = (2 * SIZE, SIZE)  # height, width: of all that is looked at


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps({
        "run": {"folder": "run"},
        "model": {"name": "flux", "folder": str(saved("flux")[0]), "image_size": SIZE, "text_tokens": 32,
                  "dtype": "float32", "device": "cpu", "lora_rank": 2, "text_cache": str(tmp_path / "text")},
        "algorithm": {"name": "draft", "K": 1, "n": 0, "steps": 2},
        "reward": {"name": "brightness", "source": {"clip-score": str(save_clip(tmp_path / "clip"))}},
        "prompts": {"list": ["a cat", "a dog"], "sizes": [SIZE, [SIZE, 2 * SIZE]]},
        "sample": {"steps": 2, "image_size": list(TALL)},
        "evaluate": {"heldout": "clip-score", "prompts": 2, "seeds": 1},
        "trainer": {"steps": 2, "batch_size": 1, "lr": 0.01, "preview_every": 1, "preview_prompts": 1,
                    "guard": {"every": 1, "prompts": 2, "steps": 1, "action": "warn"}},
    }))  # fmt: skip
    return tmp_path


def size_of(picture):
    width, height = Image.open(picture).size
    return height, width


@pytest.mark.slow
def test_every_command_of_the_way(recipe_file, palate):
    def done(*words):
        code, out, err = palate(*words)
        assert not code, out + err
        return out

    assert "ready: nothing was loaded" in done("train", "r.yaml", "--dry-run")
    done("train", "r.yaml")
    done("evaluate", "run")
    done("sample", "run", "--prompt", "a cat", "--seeds", "0", "--strength", "0,1", "--out", "drawn")
    looked_at = (*(recipe_file / "run" / "samples").glob("*/0000.png"), recipe_file / "drawn" / "0001.png",
                 *(recipe_file / "run" / "evaluation").glob("*/0000.png"))  # fmt: skip
    assert len(looked_at) == 6 and {size_of(picture) for picture in looked_at} == {TALL}
    done("sample", "run", "--prompt", "a cat", "--seeds", "0", "--size", f"{SIZE},{2 * SIZE}", "--out", "wide")
    assert size_of(recipe_file / "wide" / "0000.png") == (SIZE, 2 * SIZE)
    code, _, err = palate("sample", "run", "--prompt", "a cat", "--size", str(SIZE + 1), "--out", "odd")
    assert code == 2 and f"--size got {SIZE + 1}; flux needs a multiple of" in err
    for form in ("diffusers", "kohya", "comfyui"):
        done("export", "run", "--format", form)
    graph = (recipe_file / "run" / "export" / "comfyui" / "workflow.json").read_text()
    assert f'"width": {TALL[1]}' in graph and f'"height": {TALL[0]}' in graph
    short = ("trainer.steps=1", "trainer.preview_every=0", "trainer.guard.every=0")
    done("train", "r.yaml", "model.quantize=fp8", "model.start=run/export/comfyui", "model.reference=start",
         "run.folder=next", *short)  # fmt: skip
    log = [json.loads(line) for line in (recipe_file / "next" / "metrics.jsonl").read_text().splitlines()]
    assert log[0] == {"step": 0, "event": "reference", "reference": "the base with the LoRA comfyui"}
    done("export", "next", "--format", "diffusers")
    card = (recipe_file / "next" / "export" / "diffusers" / "README.md").read_text()
    assert "Begun with the LoRA comfyui; held to, and compared with, the base with the LoRA comfyui." in card
    assert "Its licence holds for this file too" in card
