"""Text embeddings: of a long list a run makes those that it uses; what decides them, and when their encoders go."""

from __future__ import annotations

import copy
import os
import shutil
import warnings

import pytest
import torch
from support.tiny_families import FAMILIES, SIZE, load, saved

from palate import recipe
from palate.core import used_prompts
from palate.evaluate import generate
from palate.models.repository import Repository
from palate.models.text_cache import TextCache, TextReader

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


def cache_in(folder):
    reader = TextReader(lambda precision, where: encode, len, 10)
    return TextCache(reader, lambda: encode, key="k", device=torch.device("cpu"), folder=folder)


def encode(prompt):
    return {"text": torch.full((2,), float(len(prompt)))}


def test_two_that_fill_one_cache_at_once_both_end_well(tmp_path, monkeypatch):
    """Two threads, or two machines whose processes have one number: the second writes while the first does."""
    second, put = [], os.replace

    def replace(source, target):
        if not second:
            second.append(cache_in(tmp_path))
            second[0](["a cat"])
        put(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert cache_in(tmp_path)(["a cat"])["text"].tolist() == [[5.0, 5.0]]
    assert second and not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"quantize": "fp8"}, {"text_tokens": 24}], ids=str)
def test_embeddings_of_other_settings_are_others(other, tmp_path):
    """What decides an embedding decides its file: no run reads what other settings have made."""

    def stored(**options):
        load("flux", text_cache=tmp_path, training="none", **options).encode_prompts(["a cat"])
        return {path.name for path in tmp_path.rglob("*.safetensors")}

    one = stored()
    assert one == stored() and len(stored(**other)) == 2 * len(one)


def test_embeddings_of_other_layers_are_others(tmp_path):
    """Krea 2's layers stand in the folder's index, beside the encoder's files."""
    found = []
    for layers in ("1, 2, 4", "1, 3, 4"):
        folder = shutil.copytree(saved("krea2")[0], tmp_path / layers)
        index = (folder / "model_index.json").read_text()
        start = index.index("[", index.index("text_encoder_select_layers"))
        end = index.index("]", start)
        (folder / "model_index.json").write_text(f"{index[:start]}[{layers}{index[end:]}")
        found.append(load("krea2", folder, text_cache=tmp_path / "text").encode_prompts(["a cat"]).text)
    same = [torch.equal(*(text[:, :, k] for text in found)) for k in range(3)]
    assert same == [True, False, True]


def test_a_prompt_that_is_cut_is_counted_and_one_that_just_fits_is_not(tmp_path):
    """SANA's instruction takes a token of the prompt's room."""
    model = load("sana", text_cache=tmp_path)
    fits = 1
    while warned_of(model, "a" * (fits + 1)) == 0:
        fits += 1
    for more, same in ((0, False), (1, True)):
        texts = [model.encode_prompts(["a" * (fits - 1 + more) + end]).text for end in "bc"]
        assert torch.equal(*texts) == same


def warned_of(model, prompt):
    """How many warnings a new reader of the model's prompts has for that one."""
    text = copy.copy(model.parts.text)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        text._warn_of_long([prompt])
    return len(told)


def test_no_text_encoder_is_in_memory_while_pictures_are_drawn(tmp_path, monkeypatch):
    """Each is read once for all batches, and is gone before the network runs."""
    model, read = load("flux", text_cache=tmp_path, training="none"), []
    monkeypatch.setattr(Repository, "read", reading(Repository.read, read))
    held = []
    model.weights.network.register_forward_pre_hook(lambda *_: held.append(model.parts.text.loaded))
    generate(model, ["a cat", "a dog", "a cow"], (0,), steps=1, batch_size=1)
    assert held == [False] * 3 and sorted(read) == ["text_encoder", "text_encoder_2"]


def reading(read, seen):
    def watched(self, part, *arguments, **options):
        seen.append(part)
        return read(self, part, *arguments, **options)

    return watched
