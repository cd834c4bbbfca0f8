"""Files of other programs: names of SDXL's original UNet, older diffusers, LyCORIS; sums of half-precision LoRAs; what
prompt files, lists and single-file checkpoints of theirs hold besides."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from PIL import Image
from safetensors.torch import save_file

from palate.cli import fetch
from palate.cli.options import new_place
from palate.data import RecipeError, captioned_images, preference_pairs, read_prompts, single_likes
from palate.export.card import base_name, card_data
from palate.models import adapters, lora, repository_checks, sgm, source
from palate.models.facts import facts_of
from palate.models.merge import merge_adapters
from palate.recipe import read
from palate.recipe.reader import content_digest
from palate.runtime.errors import InputError

BLOCKS = [*(f"input_blocks_{i}_1" for i in (4, 5, 7, 8)), "middle_block_1", *(f"output_blocks_{i}_1" for i in range(6))]
ATTENTION = [f"attn{k}_to_{part}" for k in (1, 2) for part in ("q", "k", "v", "out_0")]


@pytest.fixture(scope="module")
def sdxl():
    """(shapes of the layers, configuration) of the real network, without its weights."""
    facts = facts_of("sdxl")
    with torch.device("meta"):
        network = facts.network(**facts.published.config)
    return adapters.shapes_of(network), dict(network.config)


def file_of(path, layers, down="lora_down.weight", up="lora_up.weight", **more):
    tensors = {}
    for stem, (rows, columns) in layers.items():
        tensors |= {f"{stem}.{down}": torch.randn(2, columns), f"{stem}.{up}": torch.randn(rows, 2)}
        tensors |= {f"{stem}.{end}": value for end, value in more.items()}
    save_file(tensors, path)
    return path


def read_sdxl(path, sdxl):
    return lora.read(path, sdxl[0], facts_of("sdxl"), "model.start", config=sdxl[1])


def test_every_layer_of_sdxls_own_program_is_the_one_that_diffusers_finds(sdxl):
    stems = [f"{block}_transformer_blocks_0_{part}" for block in BLOCKS for part in ATTENTION]
    stems += [f"{block}_{part}" for block in BLOCKS for part in ("proj_in", "transformer_blocks_0_ff_net_0_proj")]
    tensors = {f"lora_unet_{stem}.lora_down.weight": torch.zeros(1, i) for i, stem in enumerate(stems, 1)}
    tensors |= {f"lora_unet_{stem}.lora_up.weight": torch.zeros(1, 1) for stem in stems}
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=SimpleNamespace(**sdxl[1]))
    theirs = {value.shape[1]: name for name, value in state.items() if "lora.down" in name or "lora_A" in name}
    theirs |= {value.shape[1]: name for name, value in state.items() if name.endswith("_lora.down.weight")}
    flat = {name.replace(".", "_") for name in sdxl[0]}
    for i, stem in enumerate(stems, 1):
        found = sgm.to_diffusers(stem, 2)
        assert found in flat, stem
        their = theirs[i].removeprefix("unet.").replace(".processor", "").replace("to_out_lora", "to_out.0_lora")
        assert their.replace(".", "_").startswith(found), (stem, found, their)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("input_blocks_0_0", "conv_in"),
        ("time_embed_2", "time_embedding_linear_2"),
        ("label_emb_0_0", "add_embedding_linear_1"),
        ("out_2", "conv_out"),
        ("input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks_1_resnets_0_conv_shortcut"),
        ("middle_block_2_emb_layers_1", "mid_block_resnets_1_time_emb_proj"),
        ("output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_8_0_out_layers_3", "up_blocks_2_resnets_2_conv2"),
    ],
)
def test_other_layers_of_sdxls_own_program(sdxl, name, layer):
    assert sgm.to_diffusers(name, 2) == layer and layer in {each.replace(".", "_") for each in sdxl[0]}


def test_loras_of_sdxl_in_every_programs_names(tmp_path, sdxl):
    end, wide = "transformer_blocks.0.attn1.to_k", (640, 640)
    layer = f"down_blocks.1.attentions.0.{end}"
    for stem in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        f"diffusion_model.input_blocks.4.1.{end}",
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
    ):
        found = read_sdxl(file_of(tmp_path / "a.safetensors", {stem: wide}, alpha=torch.tensor(1.0)), sdxl)
        assert {name: (part.rank, part.alpha) for name, part in found.items()} == {layer: (2, 1.0)}
    for old, name in (("to_k_lora", "to_k"), ("to_out_lora", "to_out.0")):
        stem = f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.{old}"
        found = read_sdxl(file_of(tmp_path / "b.safetensors", {stem: wide}, "down.weight", "up.weight"), sdxl)
        assert list(found) == [layer.replace("to_k", name)]


def test_a_dora_keeps_its_norms_in_these_names_or_is_refused(tmp_path, sdxl):
    norms = torch.rand(5120, 1)
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj"
    path = file_of(tmp_path / "a.safetensors", {stem: (5120, 640)}, dora_scale=norms)
    (found,) = read_sdxl(path, sdxl).values()
    assert torch.equal(found.magnitude, norms[:, 0])

    class Loader:
        """Translates a name, and leaves norms out, as diffusers' loaders do."""

        @staticmethod
        def lora_state_dict(tensors, **_):
            named = {name.replace("theirs", "ours"): value for name, value in tensors.items()}
            return {name: value for name, value in named.items() if not name.endswith("dora_scale")}

    facts = dataclasses.replace(facts_of("sdxl"), lora_loader=Loader)
    for more, refused in (({}, False), ({"dora_scale": torch.rand(6, 1)}, True)):
        path = file_of(tmp_path / "b.safetensors", {"theirs": (6, 4)}, **more)
        with pytest.raises(InputError, match="a LoRA of another model") if refused else contextlib.nullcontext():
            assert list(lora.read(path, {"ours": (6, 4)}, facts, "model.start")) == ["ours"]


def test_a_sum_of_half_precision_loras_is_exact(tmp_path):
    torch.manual_seed(0)
    layers = {"down.to_k": lora.Lora((torch.randn(32, 8)).half(), (1e-4 * torch.randn(8, 32)).half(), 1.0)}
    for name in ("a", "b"):
        lora.write(tmp_path / name / lora.FILE, lora.to_peft(layers) | {"down.to_k.alpha": torch.tensor(1.0)}, {})
    assert merge_adapters([tmp_path / "a", tmp_path / "b"], [0.3, 0.4], tmp_path / "out") == 64
    shapes = {"down.to_k": (8, 8)}
    (found,) = lora.read(tmp_path / "out" / lora.FILE, shapes, None, "merge").values()
    part = layers["down.to_k"]
    exact = 0.7 / 32 * part.up.double() @ part.down.double()
    error = (found.scale * found.up.double() @ found.down.double() - exact).norm() / exact.norm()
    assert float(error) < 1e-6
    merge_adapters([tmp_path / "a", tmp_path / "b"], [1.0, 1.0], tmp_path / "out")  # its own earlier sum gives way
    before = (tmp_path / "b" / lora.FILE).read_bytes()
    with pytest.raises(InputError, match=r"--out: .* holds a LoRA that would be written over"):
        merge_adapters([tmp_path / "a"], [1.0], tmp_path / "b")
    assert (tmp_path / "b" / lora.FILE).read_bytes() == before


def test_a_file_that_is_named_is_converted_however_old_it_is(tmp_path, palate, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("new", 1.0), ("old", 2.0)):
        torch.save({"w": torch.full((2,), value)}, tmp_path / f"{name}.pt")
    os.utime(tmp_path / "old.pt", (1, 1))
    for name, value in (("new", 1.0), ("old", 2.0)):
        assert palate("fetch", "hpsv2", "--from", f"{name}.pt")[0] == 0
        (target,) = (tmp_path / "weights/hpsv2").iterdir()
        assert lora.open_file(target, "w")[0]["w"].tolist() == [value] * 2
    assert fetch.PUBLISHED["hpsv2"].converted == target.name


def test_a_place_that_is_named_like_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--out: .*lora\.safetensors is the name of a file"):
        new_place("--out", tmp_path / "lora.safetensors")


def test_prompt_files_of_other_kinds(tmp_path, caplog):
    (tmp_path / "a.ndjson").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    assert read_prompts(str(tmp_path / "a.ndjson")) == ["a cat", "a dog"]
    for name, text, said in (
        ("b.yaml", "- a cat\n", "is YAML; write the prompts one per line"),
        (
            "c.txt",
            '{"prompt": "a cat"}\n{"prompt": "a dog"}\n',
            r"holds JSON lines; give it a name that ends in \.jsonl",
        ),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError, match=said):
            read_prompts(str(tmp_path / name))
    with pytest.raises(RecipeError, match=r"is a folder; pictures with captions are prompts\.images"):
        read_prompts(str(tmp_path))
    (tmp_path / "d.txt").write_text("a cat -- on a mat\n")
    (tmp_path / "e.txt").write_text("a cat --n blurry --w 1024\na dog\na fox --ar 16:9\n")
    with caplog.at_level(logging.WARNING, "palate"):
        read_prompts(str(tmp_path / "d.txt"))
        assert not caplog.text
        assert len(read_prompts(str(tmp_path / "e.txt"))) == 3
    assert "2 prompts hold options of another program" in caplog.text


def test_lists_of_pictures_by_whole_paths_and_without_prompts(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    row = '{"prompt": " a\\n cat ", "image": "%s", "like": true}\n'
    (tmp_path / "likes.jsonl").write_text(row % (tmp_path / "a.png"))
    (like,) = single_likes(str(tmp_path / "likes.jsonl"))
    assert like.prompt == "a cat" and like.image == tmp_path / "a.png"
    pair = '[{"prompt": "%s", "file_path": ["%s", "a.png"], "human_preference": [1, 0]}]'
    (tmp_path / "pairs.json").write_text(pair % (" a  cat ", tmp_path / "a.png"))
    (found,) = preference_pairs(str(tmp_path / "pairs.json"))
    assert found.prompt == "a cat" and found.first == tmp_path / "a.png"
    (tmp_path / "pairs.json").write_text(pair % ("a cat", "/elsewhere/a.png"))
    with pytest.raises(RecipeError, match=r"pairs\.json: the image path .* leaves the folder of its list; put"):
        list(preference_pairs(str(tmp_path / "pairs.json")))
    (tmp_path / "pairs.json").write_text(pair % ("  ", "a.png"))
    (tmp_path / "likes.jsonl").write_text('{"prompt": " ", "image": "a.png", "like": true}\n')
    for reader, name in ((preference_pairs, "pairs.json"), (single_likes, "likes.jsonl")):
        with pytest.raises(RecipeError, match=r"row 1: expected .*a prompt in words"):
            list(reader(str(tmp_path / name)))


def test_a_folder_of_pictures_beside_what_others_keep_there(tmp_path, caplog):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{name}.png", "text": "a cat"}}\n' for name in ("a", "b", "c"))
    )
    before = content_digest(str(tmp_path))
    (tmp_path / "a_sdxl.npz").write_bytes(b"latents of sd-scripts")
    assert content_digest(str(tmp_path)) == before
    with caplog.at_level(logging.WARNING, "palate"):
        assert len(captioned_images(tmp_path)) == 2
    assert "1 caption of" in caplog.text and "without its picture, c.png for one" in caplog.text
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + b"x")
    assert content_digest(str(tmp_path)) != before


def test_what_a_whole_checkpoint_says_of_itself(tmp_path, caplog):
    file = tmp_path / "mine.safetensors"
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}
    for mark in ("v_pred", "edm_mean"):
        save_file(unet | {mark: torch.zeros(1)}, file)
        with pytest.raises(InputError, match=rf"mine\.safetensors holds {mark}, by which .*give model\.folder too"):
            source.published_base(file, "sdxl")
    save_file(unet, file)
    with caplog.at_level(logging.WARNING, "palate"):
        repository_checks.check_file(file)
        assert not caplog.text
        file = tmp_path / "whole.safetensors"
        save_file(unet | {"conditioner.embedders.0.x": torch.zeros(1)}, file)
        repository_checks.check_file(file)
        repository_checks.check_file(file)
    assert caplog.text.count("its text encoders are not read") == 1


def test_a_card_names_the_file_that_was_trained(tmp_path):
    made = read("srpo-sdxl-24gb", ["model.file=/disk/juggernaut.safetensors"])
    assert base_name(made) == "juggernaut.safetensors"
    data = card_data(tmp_path, made, "diffusers", {})
    assert data.base_model is None and data.license == "other"
    data = card_data(tmp_path, read("srpo-sdxl-24gb"), "diffusers", {})
    assert data.base_model == "stabilityai/stable-diffusion-xl-base-1.0" and data.license == "openrail++"
