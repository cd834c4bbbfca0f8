"""Folders as users have them when a download broke off or a path is wrong: a sentence, exit code 2, nothing loaded."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_families import SIZE, load, saved

from palate import cli
from palate.models import flux
from palate.models.repository import Repository
from palate.plan.measure import local_config
from palate.runtime.errors import InputError

DENOISER = "transformer/diffusion_pytorch_model"


def drop(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def rename(suffix):
    return lambda folder: (folder / f"{DENOISER}.safetensors").rename(folder / f"{DENOISER}{suffix}")


def cut(folder):
    path = folder / f"{DENOISER}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "tokenizer": (drop("tokenizer_2"), "tokenizer_2 holds no vocabulary .*; complete the download"),
    "scheduler": (drop("scheduler"), "has no scheduler/scheduler_config.json; the download is incomplete"),
    "encoder": (drop("text_encoder_2"), "has no text_encoder_2/config.json; the download is incomplete"),
    "index": (write("model_index.json", "{oops"), "model_index.json is not valid JSON .*; download it again"),
    "no mapping": (write("model_index.json", "[]"), "model_index.json holds no settings"),
    "config": (write("transformer/config.json", "{"), "transformer/config.json is not valid JSON"),
    "cut": (cut, "diffusion_pytorch_model.safetensors is damaged or incomplete"),
    "shard": (rename("-00001-of-00003.safetensors"), "transformer holds 1 of 3 shards of its weights"),
    "variant": (rename(".ema.safetensors"), "transformer holds no .safetensors weights .of variants only fp16 is read"),
    "pickle": (rename(".bin"), "the weights of transformer are pickles .*Convert them once"),
}


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(self, part, *_, **__):
        raise AssertionError(f"{part} was read before the mistake was found")

    monkeypatch.setattr(Repository, "read", refuse)


@pytest.mark.parametrize("case", DAMAGES)
def test_a_broken_download_is_named_before_anything_loads(case, tmp_path, nothing_loads):
    damage, message = DAMAGES[case]
    folder = shutil.copytree(saved("flux")[0], tmp_path / "flux")
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load("flux", folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 500


def drop_tensor(folder, part, name):
    """The part's file without one of its tensors."""
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


TENSORS = {  # of every kind of network that is read: diffusers', transformers' by its class or by AutoModel; a buffer
    "flux": {
        "transformer": "transformer_blocks.0.attn.to_q.weight",
        "vae": "decoder.conv_in.weight",
        "text_encoder": "encoder.layers.0.mlp.fc1.weight",
        "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q.weight",
    },
    "flux2-klein": {"vae": "bn.running_var", "text_encoder": "model.layers.0.mlp.up_proj.weight"},
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in TENSORS.items() for part in parts])
def test_a_part_that_lacks_a_tensor_is_refused_and_not_filled_with_random_numbers(name, part, tmp_path):
    tensor = TENSORS[name][part]
    folder = shutil.copytree(saved(name)[0], tmp_path / name)
    drop_tensor(folder, part, tensor)
    said = rf"its {part} lacks 1 of \d+ tensors of \w+, \S*{tensor.removeprefix('model.')} for one; download it again"
    with pytest.raises(InputError, match=said):
        load(name, folder, text_cache=tmp_path / "text").encode_prompts(["a cat"])


def test_a_text_encoder_without_its_eyes_reads_as_one_with_them(tmp_path):
    """Some are published so, to be smaller: no prompt needs a vision tower, nor the layer that names tokens."""
    whole = saved("qwen-image")[0]
    folder = shutil.copytree(whole, tmp_path / "qwen-image")
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = load_file(path)
    read = {name: tensor for name, tensor in tensors.items() if not name.startswith(("visual.", "lm_head."))}
    assert len(read) < len(tensors)
    save_file(read, path, {"format": "pt"})
    each = [
        load("qwen-image", f, text_cache=tmp_path / f.parent.name).encode_prompts(["a cat"]) for f in (whole, folder)
    ]
    assert all(map(torch.equal, *each))


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """`palate train srpo-flux` on the tiny folder, with overrides: the exit code and what it said."""
    shared = [
        "model.device=cpu",
        f"model.image_size={SIZE}",
        "model.lora_rank=2",
        "prompts={list: [a cat]}",
        f"model.folder={saved('flux')[0]}",
        f"run.folder={tmp_path / 'run'}",
    ]

    def run(*overrides, recipe="srpo-flux"):
        monkeypatch.setattr(sys, "argv", ["palate", "train", recipe, *shared, *overrides])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capfd.readouterr().err

    return run


def test_a_lora_of_another_model_is_refused_before_anything_loads(train, tmp_path, nothing_loads):
    load_free = ["reward={name: brightness}", "algorithm.preference=absolute"]
    start = [*load_free, f"model.start={tmp_path}"]
    file = tmp_path / "pytorch_lora_weights.safetensors"

    def refused(message, *overrides, **options):
        code, said = train(*overrides, **options)
        assert code == 2 and message in said and len(said.splitlines()) == 1

    refused(f"model.start: {tmp_path} holds no pytorch_lora_weights.safetensors", *start)
    for stem, width, rank, message in (
        ("down_blocks.0.attentions.0.to_k", 16, 2, "its layer down_blocks.0.attentions.0.to_k is not one"),
        (
            "transformer_blocks.0.attn.to_q",
            3072,
            2,
            "to_q is 3072 x 3072, this one's 16 x 16",
        ),
        ("transformer_blocks.0.attn.to_q", 16, 8, "has rank 8; set model.lora_rank=8"),
    ):
        save_file(
            {f"{stem}.lora_A.weight": torch.zeros(rank, width), f"{stem}.lora_B.weight": torch.zeros(width, rank)}, file
        )
        refused(message, *start)
    stem = "lora_unet_mid_block_attn"
    save_file({f"{stem}.lora_{k}.weight": torch.zeros(2, 2) for k in ("down", "up")}, file)
    sdxl = ["reward={name: brightness}", f"model.folder={saved('sdxl')[0]}"]
    refused("model.consistency: name the folder of an LCM-LoRA", *sdxl, "model.consistency=null", recipe="sqdf-sdxl")
    refused(
        f"model.consistency: {file} holds a LoRA of another model",
        *sdxl,
        f"model.consistency={tmp_path}",
        recipe="sqdf-sdxl",
    )


def test_a_reward_that_is_not_there_is_named_before_the_model_loads(train, nothing_loads):
    code, said = train("reward={name: hpsv2, source: {hpsv2: nowhere/HPS.pt}}")
    assert code == 2 and "reward.source.hpsv2: nowhere/HPS.pt is a pickle" in said


def test_a_plan_of_another_familys_folder_is_refused(monkeypatch, capfd):
    monkeypatch.setattr("palate.plan.memory.measure", lambda recipe: local_config(recipe, flux.FACTS, "transformer"))
    monkeypatch.setattr(sys, "argv", ["palate", "plan", "srpo-flux", f"model.folder={saved('sdxl')[0]}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "its unet is a UNet2DConditionModel, flux needs a FluxTransformer2DModel" in said


def test_the_command_says_a_warning_as_a_sentence(train, capfd):
    """Here the model loads, and one of two prompts is too long for its encoder."""
    code, said = train(
        "prompts={list: [a cat, " + "b " * 40 + "]}",
        "model.text_tokens=32",
        "model.dtype=float32",
        "reward={name: brightness}",
        "algorithm.preference=absolute",
        "algorithm.rollout_steps=1",
        "trainer.steps=1",
        "trainer.batch_size=1",
        "trainer.preview_every=0",
    )
    assert not code
    assert "palate: 1 of 2 prompts are longer than the 32 tokens the text encoder reads" in said.splitlines()[0]
