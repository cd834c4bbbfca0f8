"""What a run costs grows with the run: of a long list, the prompts that its steps and previews use are embedded."""

from __future__ import annotations

import pytest
import torch
from support.tiny_families import FAMILIES, SIZE, saved

from palate import recipe
from palate.core import used_prompts

LONG = 300


SRPO = "{name: srpo, rollout_steps: 1, shift: 1.0, preference: absolute}"


def recipe_of(home, algorithm=SRPO, **trainer):
    (home / "prompts.txt").write_text("".join(f"a dog {i}\n" for i in range(LONG)))
    settings = {"name": "sdxl", "folder": str(saved("sdxl")[0]), "lora_rank": 4, "dtype": "float32", "device": "cpu",
                "image_size": SIZE, "text_cache": str(home / "text"), **FAMILIES["sdxl"].load}  # fmt: skip
    return recipe.parse(
        "run: {folder: x}\n"
        f"model: {settings}\n"
        f"algorithm: {algorithm}\n"
        "reward: {name: brightness}\n"
        f"prompts: {{file: '{home / 'prompts.txt'}'}}\n"
        f"trainer: { {'guard': {'every': 0}, **trainer} }\n"
    )  # fmt: skip


@pytest.mark.parametrize(("steps", "batch"), [(1, 2), (3, 4)])
def test_of_a_long_list_the_prompts_of_the_run_are_embedded(tmp_path, monkeypatch, steps, batch):
    made = recipe_of(tmp_path, steps=steps, batch_size=batch)
    read = []
    family = recipe.build_model(made)  # its class, to watch
    fill = type(family).cache_prompts
    monkeypatch.setattr(
        type(family), "cache_prompts", lambda self, prompts: (read.extend(prompts), fill(self, prompts))[1]
    )
    torch.manual_seed(0)
    parts = recipe.build(made)
    used = set(used_prompts(parts.prompts, made.trainer.seed, steps * batch)) | set(parts.preview_prompts)
    assert set(read) == used and len(used) <= steps * batch + len(parts.preview_prompts) < LONG
    stored = list((tmp_path / "text").rglob("*.safetensors"))
    assert 0 < len(stored) <= len(used) + 1  # and the empty one


def test_what_an_algorithm_asks_besides_is_embedded_too(tmp_path, monkeypatch):
    made, read = recipe_of(tmp_path, "{name: direct, context: [dark]}", steps=1, batch_size=2), []
    kind = type(recipe.build_model(made))
    monkeypatch.setattr(kind, "cache_prompts", lambda self, prompts: read.extend(prompts))
    parts = recipe.build(made)
    used = used_prompts(parts.prompts, made.trainer.seed, 2)
    assert {f"dark. {prompt}" for prompt in used} == set(read) - set(used) - set(parts.preview_prompts)
