"""Repositories as people publish them, for every family: read, or refused in a sentence before a weight loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.tiny_families import FAMILIES, load, saved

from palate.models.repository import Repository
from palate.runtime.errors import InputError


def copied(name, tmp_path):
    return shutil.copytree(saved(name)[0], tmp_path / name)


def change(file, **values):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **values}))


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(self, part, *_, **__):
        raise AssertionError(f"{part} was read before the mistake was found")

    monkeypatch.setattr(Repository, "read", refuse)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_with_further_channels_is_no_text_to_image_model(name, tmp_path, nothing_loads):
    """Inpainting, control and editing networks take the noisy latents and something else."""
    folder, denoiser = copied(name, tmp_path), FAMILIES[name].model.facts.denoiser
    config = json.loads((folder / denoiser / "config.json").read_text())
    change(folder / denoiser / "config.json", in_channels=config["in_channels"] + 5)
    with pytest.raises(InputError, match=rf"its {denoiser} takes \d+ channels .inpainting, control or editing"):
        load(name, folder)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sdxl", "EDMDPMSolverMultistepScheduler"), ("sdxl", "EDMEulerScheduler"), ("sana", "SCMScheduler")],
)
def test_a_network_of_another_noise_is_refused(name, scheduler, tmp_path, nothing_loads):
    """Playground v2.5, SANA-Sprint: their parts are those of the family, their predictions are not."""
    folder = copied(name, tmp_path)
    change(folder / "model_index.json", scheduler=["diffusers", scheduler])
    with pytest.raises(InputError, match=f"is sampled by {scheduler}, whose noise is not that of {name}"):
        load(name, folder)


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl"])
def test_a_latent_consistency_model_is_refused(name, tmp_path, nothing_loads):
    """Its pipeline embeds the guidance beside the time; without it the network draws something else in silence."""
    folder = copied(name, tmp_path)
    change(folder / "unet" / "config.json", time_cond_proj_dim=256)
    with pytest.raises(InputError, match="its unet is told the strength of guidance with the time"):
        load(name, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_part_is_named(name, tmp_path, nothing_loads):
    parts = [part for part in FAMILIES[name].model.facts.parts if part.startswith(("unet", "transf", "text_enc"))]
    assert len(parts) >= 2
    for part in parts:
        folder = copied(name, tmp_path / part)
        change(folder / part / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        with pytest.raises(InputError, match=rf"its {part} is stored quantised .bitsandbytes.*unquantised repository"):
            load(name, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_repository_with_the_variant_fp16_alone_is_read(name, tmp_path):
    folder = copied(name, tmp_path)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    ours, plain = load(name, folder, text_cache=tmp_path / "text"), load(name)
    noise, t = torch.randn((1, *plain.latent_shape)), torch.tensor([0.5])
    with torch.no_grad():
        both = [model.predict(noise, t, model.encode_prompts(["a cat"])).x0 for model in (ours, plain)]
    assert torch.equal(*both)
    before = ours.fingerprint()
    weights = next((folder / ours.facts.denoiser).glob("*.fp16.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    assert ours.fingerprint() != before


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("task", ["Inpaint", "Img2Img", "Edit"])
def test_a_pipeline_of_another_task_is_refused(name, task, tmp_path, nothing_loads):
    """The refiner of SDXL too, which is an image-to-image pipeline that lacks a text encoder."""
    folder = copied(name, tmp_path)
    pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    changed = pipeline.replace("Pipeline", f"{task}Pipeline")
    change(folder / "model_index.json", _class_name=changed, text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(InputError, match=f"holds a {changed}, which changes given images"):
        load(name, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_that_cannot_be_written_is_named_before_the_encoders_load(name, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file where a folder should be")
    model = load(name, text_cache=tmp_path / "home" / "text")
    monkeypatch.setattr(Repository, "read", lambda *_, **__: pytest.fail("an encoder was loaded"))
    for use in (model.encode_prompts, model.cache_prompts):
        with pytest.raises(InputError, match=r"cannot be written to .*home.text .*set model.text_cache"):
            use(["a cat"])
