"""The model families against diffusers: equal samples, published sizes, precision, caches, clear errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from support.tiny_families import FAMILIES, SIZE, load, saved, sd3

import palate
from palate import recipe
from palate.export.one_step import _how_to_load as how_to_load
from palate.models import (
    aura_flow,
    autoencoder,
    chroma,
    families,
    flux,
    flux2,
    krea2,
    pixart,
    qwen_image,
    qwen_image_21,
    sana,
    sdxl,
    source,
    stable_diffusion,
    z_image,
)
from palate.models import sd3 as sd3_family
from palate.models.flux import pack, unpack
from palate.models.parts import Options
from palate.models.repository import Repository
from palate.sampling import sample

PROMPTS = ["a cat", "two dogs"]
STEPS = 5


def noise_for(model, count: int = 2) -> torch.Tensor:
    return torch.randn((count, *model.latent_shape), generator=torch.Generator().manual_seed(7))


def diffusers_sample(name, pipeline, noise, guidance, size=(SIZE, SIZE)):
    """The pipeline's own latents for our noise; guidance in our convention, w of u + w (c - u)."""
    call = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "prompt": [*PROMPTS],
        "height": size[0],
        "width": size[1],
    }
    if name.startswith("flux2"):
        call |= {"max_sequence_length": 256 if name == "flux2-dev" else 48}
        guidance = 2.5 if name == "flux2-dev" else guidance
    elif name == "qwen-image-21":  # which wants one call per length of prompt
        options = {"true_cfg_scale": guidance, "negative_prompt": " "} if guidance != 1.0 else {}
        found = [
            pipeline(**{**call, "prompt": prompt}, **options, latents=row.flatten(1).T[None]).images
            for prompt, row in zip(PROMPTS, noise, strict=True)
        ]
        return torch.cat(found).transpose(1, 2).unflatten(2, noise.shape[2:])
    elif name.startswith("krea2"):
        call |= {"guidance_scale": guidance - 1, "max_sequence_length": 256}
        return unpack(pipeline(**call, latents=pack(noise)).images, noise.shape)
    elif name == "chroma":
        patches = pipeline(**call, latents=pack(noise), guidance_scale=guidance, max_sequence_length=32).images
        return unpack(patches, noise.shape)
    elif name == "qwen-image":
        options = {"true_cfg_scale": guidance, "negative_prompt": [" "] * 2} if guidance != 1.0 else {}
        patches = pipeline(**call, **options, latents=pack(noise), max_sequence_length=256).images
        return unpack(patches, noise.shape)
    elif name.startswith("flux"):
        patches = pipeline(
            **call,
            latents=pack(noise),
            guidance_scale=2.5,
            true_cfg_scale=guidance,
            negative_prompt=[""] * 2 if guidance != 1.0 else None,
            max_sequence_length=32,
        ).images
        return unpack(patches, noise.shape)
    if name.startswith("stable-diffusion"):  # its published PNDM is a multistep method; DDIM is its one-step form
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if name == "sana" or name.startswith("pixart"):  # likewise DPM-Solver++ of order 2, whose order 1 is the DDIM step
        settings = pipeline.scheduler.config
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(settings, solver_order=1)
        call |= {"use_resolution_binning": False, "max_sequence_length": 32}
    if name == "sana":
        pipeline.check_inputs = lambda *_, **__: None  # which knows sizes of the published VAE only
    if name in ("sd3", "aura-flow"):
        call["max_sequence_length"] = 32
    if name == "z-image":
        guidance, call["max_sequence_length"] = guidance - 1, 48
    return pipeline(**call, latents=noise, guidance_scale=guidance).images


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_equal_the_pipelines(name):
    """Same noise, steps, guidance and published time grid; text encoding included, latents before decoding."""
    _, pipeline = saved(name)
    model = load(name, distilled_guidance=2.5) if name.startswith("flux") else load(name)
    noise = noise_for(model)
    one, other = model.encode_prompts(PROMPTS)[0]
    assert not torch.allclose(one, other, atol=1e-3)  # the words are read, not only what stands around them
    for guidance in (1.0,) if name in UNGUIDED else (1.0, 3.0):
        theirs = normalised(model, diffusers_sample(name, pipeline, noise, guidance, model.image_size))
        with torch.no_grad():
            ours = sample(model, model.encode_prompts(PROMPTS), noise, STEPS, guidance=guidance)
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), (guidance, float((ours - theirs).abs().max()))
        assert theirs.std() > 0.1


UNGUIDED = ("flux2-klein", "flux2-dev")  # whose pipelines know no guidance


def normalised(model, latents):
    """What a pipeline returns, in our latents: FLUX.2's undoes the normalisation and the patches before it returns."""
    if latents.ndim == 3:  # dev's returns the network's tokens as they are
        return latents.transpose(1, 2).unflatten(2, model.latent_shape[1:])
    if latents.shape[1:] == model.latent_shape:
        return latents
    layout = model.facts.layout
    std, mean = (x.view(1, -1, 1, 1) for x in layout.statistics(model.parts.vae.vae))
    return (layout.folded(latents) - mean) / std


OBLONG = [16, 24]  # height, width
SIMILAR = ("krea2-turbo", "stable-diffusion-v", "flux-schnell", "pixart-sigma", "flux2-base", "flux2-dev")
ONE_OF_EACH = [name for name in FAMILIES if name not in SIMILAR]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_oblong_samples_equal_the_pipelines(name):
    """Positions, SDXL's and PixArt's told sizes and FLUX's shift follow height and width, each in its place."""
    _, pipeline = saved(name)
    options = {"distilled_guidance": 2.5} if name == "flux" else {}
    size = [side * FAMILIES[name].scale for side in OBLONG]
    model = load(name, image_size=size, training="none", **options)
    noise = noise_for(model)
    assert noise.shape[-1] * 2 == noise.shape[-2] * 3
    guidance = 1.0 if name in UNGUIDED else 3.0
    theirs = normalised(model, diffusers_sample(name, pipeline, noise, guidance, size))
    with torch.no_grad():
        ours = sample(model, model.encode_prompts(PROMPTS), noise, STEPS, guidance=guidance)
        assert model.decode(ours).shape == (2, 3, *size)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), float((ours - theirs).abs().max())


def test_a_recipe_gives_a_side_or_height_and_width():
    plan = recipe.read("srpo-flux", ["model.image_size=[768, 1024]"])
    assert plan.model.image_size == (768, 1024) and recipe.parse(recipe.dump(plan)) == plan
    assert recipe.read("srpo-flux").model.image_size == 720
    for wrong in ("0", "[64]", "[64, -3]", "wide", "true"):
        with pytest.raises(recipe.RecipeError, match=r"image_size: expected the pixels of a side, or .height, width."):
            recipe.read("srpo-flux", [f"model.image_size={wrong}"])


@pytest.mark.parametrize("name", FAMILIES)
def test_decoded_images_equal_the_pipelines(name):
    """The VAE's scale and shift, both ways."""
    _, pipeline = saved(name)
    model = load(name, training="none")
    latents = noise_for(model) * 0.5
    config = pipeline.vae.config
    with torch.no_grad():
        std, mean = (x.view(1, -1, 1, 1) for x in model.facts.layout.statistics(pipeline.vae))
        if "scaling_factor" in config:  # and FLUX.2's are those of its pipeline, in the tests of samples
            assert float(std) == pytest.approx(1 / config.scaling_factor)
            assert float(mean) == pytest.approx(config.get("shift_factor") or 0.0)
        raw = pipeline.vae.decode(model.facts.layout.unfolded(latents * std + mean)).sample
        raw = raw[:, :, 0] if raw.ndim == 5 else raw
        theirs = pipeline.image_processor.postprocess(raw, output_type="pt")
        if theirs.shape[1] == 4:  # on white
            theirs = theirs[:, :3] * theirs[:, 3:] + 1 - theirs[:, 3:]
        ours = model.decode(latents)
        again = model.encode(ours)
        inputs = 2 * ours - 1
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1) if raw.shape[1] == 4 else inputs
        inputs = inputs.unsqueeze(2) if model.facts.layout.frames else inputs
        encoded = pipeline.vae.encode(inputs)
        posterior = encoded.latent if "latent" in encoded else encoded.latent_dist.mode()
        if "latent" in encoded:
            with pytest.raises(ValueError, match="deterministic"):
                model.posterior(ours)
        else:
            middle, deviation = model.posterior(ours)
            assert torch.allclose(middle, again, atol=1e-6)
            expected = model.facts.layout.folded(encoded.latent_dist.std) / std
            assert torch.allclose(deviation, expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(again, (model.facts.layout.folded(posterior) - mean) / std, atol=1e-4)


# Training modes


def gradients(model) -> list[torch.Tensor]:
    """Of the mean decoded image of one prediction, through VAE and denoiser, in every trained tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a LoRA's B is zero at the start, and A has no gradient then
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    t, cond = torch.tensor([0.7, 0.4]), model.encode_prompts(PROMPTS)
    model.decode(model.predict(noise_for(model), t, cond, guidance=2.0).x0 * 0.1).mean().backward()
    found = [(parameter.grad, parameter) for parameter in model.parameters()]  # none: what only the words' stream sees
    return [torch.zeros_like(parameter) if grad is None else grad for grad, parameter in found]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_checkpointing_changes_no_gradient_and_frozen_parts_hold_none(name):
    model, plain = load(name), load(name, gradient_checkpointing=False)
    ours, theirs = gradients(model), gradients(plain)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(ours, theirs, strict=True))
    assert sum(float(g.abs().sum()) for g in ours) > 0
    assert model.weights.network.is_gradient_checkpointing and not plain.weights.network.is_gradient_checkpointing
    trained = {id(parameter) for parameter in model.parameters()}
    everything = [*model.weights.network.parameters(), *model.parts.vae.vae.parameters()]
    frozen = [p for p in everything if id(p) not in trained]
    assert len(frozen) > 50 and all(p.grad is None and not p.requires_grad for p in frozen)


def test_the_decoder_recomputes_its_residual_blocks():
    """With checkpointing the graph of a decode keeps fewer bytes; the images and their gradient are the same."""
    kept = {}
    for on in (True, False):
        model = load("flux", training="none", gradient_checkpointing=on)
        latents = noise_for(model).requires_grad_()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            images = model.decode(latents)
        (gradient,) = torch.autograd.grad(images.sum(), latents)
        kept[on] = (sum(sizes), images.detach(), gradient)
    assert kept[True][0] < 0.6 * kept[False][0]
    assert torch.equal(kept[True][1], kept[False][1])
    assert torch.allclose(kept[True][2], kept[False][2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, training",
    [
        ("stable-diffusion", "lora"),
        ("sdxl", "full"),
        ("sd3", "lora"),
        ("flux", "full"),
        ("pixart-sigma", "lora"),
        ("z-image", "lora"),
    ],
)
def test_bfloat16_networks_train_float32_weights(name, training):
    model, exact = load(name, training=training, dtype="bfloat16"), load(name, training="none")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    trained = {id(p) for p in model.parameters()}
    everything = [*model.weights.networks["reference"].parameters(), *model.parts.vae.vae.parameters()]
    assert {p.dtype for p in everything if id(p) not in trained} == {torch.bfloat16}
    t = torch.tensor([0.7, 0.4])
    ours = model.predict(noise_for(model), t, model.encode_prompts(PROMPTS), guidance=2.0)
    theirs = exact.predict(noise_for(exact), t, exact.encode_prompts(PROMPTS), guidance=2.0)
    assert ours.x0.dtype == ours.eps.dtype == torch.float32
    assert float((ours.eps - theirs.eps).norm() / theirs.eps.norm()) < 0.05
    images = model.decode(ours.x0 * 0.1)
    assert images.dtype == torch.float32
    images.mean().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert found and {g.dtype for g in found} == {torch.float32} and all(bool(g.isfinite().all()) for g in found)


def test_flux_is_told_another_guidance_in_rollouts_if_asked():
    """A number told to the network, not the scale of guidance; without gradient it may be another one."""
    one = load("flux", distilled_guidance=3.5)
    other = load("flux", distilled_guidance=3.5, rollout_distilled_guidance=1.0)
    low = load("flux", distilled_guidance=1.0)
    xt, t = noise_for(one), torch.tensor([0.8, 0.5])
    cond = one.encode_prompts(PROMPTS)
    assert torch.equal(one.predict(xt, t, cond).x0, other.predict(xt, t, cond).x0)
    with torch.no_grad():
        assert torch.equal(other.predict(xt, t, cond).x0, low.predict(xt, t, cond).x0)
        assert not torch.allclose(one.predict(xt, t, cond).x0, low.predict(xt, t, cond).x0, atol=1e-4)


def test_sd3_does_without_t5(tmp_path):
    torch.manual_seed(0)
    pipeline = sd3(with_t5=False)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    model = load("sd3", tmp_path)
    noise = noise_for(model)
    theirs = pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        height=SIZE,
        width=SIZE,
        max_sequence_length=32,
    ).images
    with torch.no_grad():
        assert torch.allclose(sample(model, model.encode_prompts(PROMPTS), noise, 2), theirs, atol=1e-4)


def test_sd3_without_t5_keeps_as_many_zeros_as_it_is_told(tmp_path):
    """Whatever the cache holds of another length, and again when its generator is loaded."""
    sd3(with_t5=False).save_pretrained(tmp_path)
    short, long = (load("sd3", tmp_path, text_tokens=tokens) for tokens in (32, 48))
    texts = [each.encode_prompts(PROMPTS).text for each in (short, long)]
    assert texts[1].shape[1] - texts[0].shape[1] == 16 and torch.equal(texts[1][:, :-16], texts[0])
    assert how_to_load(long)["text_tokens"] == 48


# Files: adapters, single files, text embeddings


def test_adapters_come_back_and_those_of_another_model_are_refused(tmp_path):
    first, second = load("sd3"), load("sd3")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    first.save_adapter(tmp_path / "sd3")
    second.load_adapter(tmp_path / "sd3")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not fit this model: another rank, target or architecture"):
        load("flux").load_adapter(tmp_path / "sd3")


def test_a_single_file_takes_the_place_of_the_denoiser(tmp_path):
    _folder, pipeline = saved("flux")
    state = {key: value + 0.01 for key, value in pipeline.transformer.state_dict().items()}
    save_file(state, tmp_path / "tuned.safetensors")
    tuned, base = load("flux", file=str(tmp_path / "tuned.safetensors"), training="none"), load("flux", training="none")
    ours, theirs = tuned.weights.network.state_dict(), base.weights.network.state_dict()
    assert all(torch.allclose(ours[key], theirs[key] + 0.01) for key in theirs)
    assert tuned.fingerprint() != base.fingerprint() == load("flux").fingerprint()


def test_a_folder_is_known_by_its_content_and_the_hub_by_its_commit(tmp_path):
    folder = tmp_path / "snapshots" / "c0ffee"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "model.safetensors").write_bytes(b"1")
    local, hub = Repository(str(folder), folder, {}), Repository("a/b", folder, {})
    before = local.version(["vae"])
    assert hub.version(["vae"]) == "c0ffee" and before == local.digest(["vae"]) == hub.digest(["vae"])
    (folder / "vae" / "model.fp16.safetensors").write_bytes(b"2")  # another precision, which is not read
    assert local.version(["vae"]) == before
    (folder / "vae" / "model.safetensors").write_bytes(b"3")
    assert local.version(["vae"]) != before


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_text_is_read_once_and_the_encoders_are_freed(name, tmp_path, monkeypatch):
    networks, read = [], Repository.read

    def watched(self, part, *arguments, **options):
        network = read(self, part, *arguments, **options)
        networks.extend([weakref.ref(network)] if part.startswith("text_encoder") else [])
        return network

    monkeypatch.setattr(Repository, "read", watched)
    model = load(name, text_cache=tmp_path)
    assert not networks  # nothing to read yet
    model.cache_prompts(PROMPTS)
    assert networks and not model.parts.text.loaded and all(network() is None for network in networks)
    networks.clear()
    again = load(name, text_cache=tmp_path)
    cond = again.encode_prompts([PROMPTS[1], PROMPTS[0]])
    again.predict(noise_for(again), torch.tensor([0.5, 0.5]), cond, guidance=2.0)  # the empty prompt is there as well
    assert not networks
    fresh = load(name, text_cache=tmp_path / "other").encode_prompts(PROMPTS)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(fresh, cond, strict=True))


def test_a_cut_text_file_is_made_again_and_settings_have_their_own(tmp_path):
    model = load("flux", text_cache=tmp_path)
    before = model.encode_prompts(PROMPTS)
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    after = load("flux", text_cache=tmp_path).encode_prompts(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert load("flux", text_cache=tmp_path, text_tokens=40).encode_prompts(PROMPTS).text.shape[1] == 40


def test_prompts_beyond_the_encoder_are_counted_once(tmp_path):
    model = load("flux", text_cache=tmp_path)
    with pytest.warns(UserWarning, match=r"2 of 3 prompts are longer than the 32 tokens"):
        model.cache_prompts(["a cat", "b " * 40, "c " * 41])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts(["d " * 42])


# The real architectures, without weights

XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
}
MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
KLEIN_4B["guidance_embeds"] = KLEIN_9B["guidance_embeds"] = False
REAL = {  # network, its published configuration, family, parameters, modules that the default LoRA adapts
    "sd15": (diffusers.UNet2DConditionModel, SD15, stable_diffusion, 859_520_964, 128),
    "sdxl": (diffusers.UNet2DConditionModel, XL, sdxl, 2_567_463_684, 560),
    "sd35-medium": (diffusers.SD3Transformer2DModel, MEDIUM, sd3_family, 2_243_171_520, 243),
    "sd35-large": (diffusers.SD3Transformer2DModel, LARGE, sd3_family, 8_056_627_520, 303),
    "flux1-dev": (diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, flux, 11_901_408_320, 342),
    "pixart-1024": (pixart.PixArtTransformer2DModel, PIXART, pixart, 611_349_152, 224),
    "aura-flow": (diffusers.AuraFlowTransformer2DModel, {"pos_embed_max_size": 4096}, aura_flow, 6_842_876_928, 160),
    "qwen-image": (diffusers.QwenImageTransformer2DModel, {}, qwen_image, 20_430_401_088, 480),
    "qwen-image-2.1": (diffusers.QwenImage21Transformer2DModel, {}, qwen_image_21, 7_115_124_736, 128),
    "krea2": (diffusers.Krea2Transformer2DModel, {}, krea2, 12_820_073_036, 128),
    "chroma1": (diffusers.ChromaTransformer2DModel, {}, chroma, 8_899_983_424, 342),
    "sana": (diffusers.SanaTransformer2DModel, {}, sana, 1_604_462_752, 160),
    "flux2-klein-4b": (diffusers.Flux2Transformer2DModel, KLEIN_4B, flux2, 3_875_544_576, 100),
    "flux2-klein-9b": (diffusers.Flux2Transformer2DModel, KLEIN_9B, flux2, 9_078_581_248, 144),
    "flux2-dev": (diffusers.Flux2Transformer2DModel, {}, flux2, 32_223_281_152, 192),
    "z-image": (diffusers.ZImageTransformer2DModel, {}, z_image, 6_154_908_736, 136),
}


def adapted(network: torch.nn.Module, targets: tuple[str, ...]) -> int:
    """peft's rule: a module is adapted if its name is a target or ends in one."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return sum(any(name == target or name.endswith(f".{target}") for target in targets) for name in names)


@pytest.mark.parametrize("name", REAL)
def test_real_architectures_have_their_published_size(name):
    kind, config, family, parameters, modules = REAL[name]
    with torch.device("meta"):
        network = kind(**config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert adapted(network, family.LORA_TARGETS) == modules


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_are_adapted(name):
    """peft adapts what the rule above counts."""
    family, network = FAMILIES[name], load(name).weights.network
    found = sum(key.endswith("lora_A.policy.weight") for key, _ in network.named_parameters())
    base = saved(name)[1]
    bare = base.unet if hasattr(base, "unet") else base.transformer
    assert found == adapted(bare, sys.modules[family.model.__module__].LORA_TARGETS) == family.adapted


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_chosen_targets_are_adapted(name):
    family, bare = FAMILIES[name], saved(name)[1]
    chosen = sys.modules[family.model.__module__].LORA_TARGETS[:1]
    network = family.model.load(saved(name)[0], lora_targets=chosen, dtype="float32").weights.network
    found = sum(key.endswith("lora_A.policy.weight") for key, _ in network.named_parameters())
    assert found == adapted(bare.unet if hasattr(bare, "unet") else bare.transformer, chosen) < family.adapted
    with pytest.raises(ValueError, match=r"lora_targets: no layer's name ends with to_kk; ends that are there: .*to_k"):
        family.model.load(saved(name)[0], lora_targets=["to_kk"], dtype="float32")


# What can be wrong is said before anything large loads


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(self, part, *_, **__):
        raise AssertionError(f"{part} was read before the mistake was found")

    monkeypatch.setattr(Repository, "read", refuse)


@pytest.fixture
def broken(tmp_path):
    """A copy of the tiny FLUX folder to damage."""
    shutil.copytree(saved("flux")[0], tmp_path / "flux")
    return tmp_path / "flux"


def edit_index(folder: Path, **changes) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


OPTIONS = {
    "size": ({"image_size": 50}, "image_size got 50; flux needs a multiple of 4 .near: 48, 52."),
    "width": ({"image_size": [48, 50]}, "image_size got 50; flux needs a multiple of 4 .near: 48, 52."),
    "float16": ({"dtype": "float16"}, "float16 is for sampling only"),
    "dtype": ({"dtype": "half"}, "expected one of float32, bfloat16, float16"),
    "device": ({"device": "tpu9"}, "expected cpu, cuda or cuda:N"),
    "no accelerator": ({"device": "cuda:7"}, "sees no such device"),
    "file": ({"file": "nowhere.safetensors"}, "model.file nowhere.safetensors does not exist"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(case, nothing_loads):
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        load("flux", **options)


def test_wrong_folders(broken, tmp_path, nothing_loads):
    def refused(message, name="flux", folder=broken):
        with pytest.raises(ValueError, match=message) as error:
            load(name, folder)
        assert len(str(error.value)) < 500

    refused("is not a diffusers folder: it does not exist", folder=tmp_path / "nowhere")
    refused("is not a diffusers folder: it has no model_index.json", folder=tmp_path)
    refused("is a file; give the diffusers folder", folder=broken / "model_index.json")
    for name, remedy in (("x.safetensors", "give it as model.file"), ("x.gguf", "give the diffusers folder")):
        (broken / name).write_bytes(b"")
        refused(f"is a file; {remedy}", folder=broken / name)
    refused("holds FluxPipeline, not a sdxl model; set model.name to flux", name="sdxl")
    refused("its transformer is a FluxTransformer2DModel, sd3 needs a SD3.*; set model.name to flux", name="sd3")
    refused("has two text encoders; set model.name to sdxl", name="stable-diffusion", folder=saved("sdxl")[0])
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("the weights of vae are pickles .* Convert them once.*save_pretrained")
    weights.with_suffix(".bin").unlink()
    refused("vae holds no .safetensors weights; complete the download")
    edit_index(broken, text_encoder_2=[None, None])
    refused("has no text_encoder_2, which flux needs")


def test_a_large_picture_beyond_the_positions_is_refused(nothing_loads):
    with pytest.raises(ValueError, match="positions end at 32 pixels"):
        load("sd3", image_size=[16, 36])


HUB = SimpleNamespace(headers={}, request=None)
HUB_ERRORS = {
    "gated": (errors.GatedRepoError("no", response=HUB), "is gated: accept its licence at .*a/b, then log in with .hf"),
    "unknown": (errors.RepositoryNotFoundError("no", response=HUB), "the hub has no such repository"),
    "offline": (errors.LocalEntryNotFoundError("no"), "the hub cannot be reached .*hf download a/b"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_errors_say_what_to_do(case, monkeypatch):
    error, message = HUB_ERRORS[case]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message):
        load("flux", "a/b")


def test_a_vae_is_not_read_in_float16():
    """SDXL's overflows in it; the network samples in it all the same."""
    model = load("sdxl", training="none", dtype="float16")
    assert model.parts.vae.dtype == torch.float32
    assert {p.dtype for p in model.weights.network.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["sdxl", "flux2-klein", "qwen-image", "sana"])
def test_large_images_are_decoded_a_few_at_a_time(name, monkeypatch):
    model, rows = load(name), []
    latents = torch.randn((3, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    expected = model.decode(latents)
    decode = autoencoder.decode_with
    monkeypatch.setattr(autoencoder, "decode_with", lambda vae, of, x: rows.append(len(x)) or decode(vae, of, x))
    height, width = expected.shape[-2:]
    monkeypatch.setattr(autoencoder, "AT_ONCE", 2 * height * width)
    with torch.no_grad():
        found = model.decode(latents)
    assert rows == [2, 1] and torch.allclose(found, expected, atol=1e-5)
    rows.clear()
    model.decode(latents)  # a training chose its batch itself
    assert rows == [3]


# Recipes

FREE = [
    "reward={name: brightness}",
    "algorithm.preference=absolute",
    "algorithm.k_denoise=[0, 0]",
    "algorithm.k_inversion=[0, 0]",
    "algorithm.hinge=null",
]  # a closed-form reward reads no words
SMALL = [
    "trainer.steps=2",
    "trainer.batch_size=2",
    "trainer.sharding=none",  # of one rank
    "trainer.preview_every=0",
    "algorithm.rollout_steps=2",
    "model.device=cpu",
    "prompts={list: [a cat, two dogs]}",
    f"model.image_size={SIZE}",
]
RECIPES = {"srpo-flux": "flux", "srpo-flux-released": "flux", "srpo-sd35": "sd3", "srpo-sdxl-24gb": "sdxl"}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_make_two_steps(name, tmp_path):
    family = RECIPES[name]
    more = [] if family == "sdxl" else ["model.text_tokens=32"]
    more += ["model.lora_rank=2"] if recipe.read(name).model.weights == "lora" else []
    folders = [f"model.folder={saved(family)[0]}", f"model.text_cache={tmp_path / 'text'}"]
    plan = recipe.read(name, [*FREE, *SMALL, *more, *folders])
    parts = recipe.build(plan)
    before = [p.detach().clone() for p in parts.model.parameters()]
    ended = palate.train(
        parts.model,
        parts.algorithm,
        parts.reward,
        parts.prompts,
        folder=tmp_path / "run",
        preview=parts.preview_prompts,
        progress=False,
        trainer=plan.trainer,
    )
    assert ended.step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps] == [1, 2] and all(row["grad_norm"] > 0 for row in steps)


def test_recipes_know_which_family_reads_which_key():
    with pytest.raises(recipe.RecipeError) as error:
        recipe.read("srpo-emoji", ["model.image_size=64", "model.distilled_guidance=2"])
    assert "model.distilled_guidance: emoji does not read it; its own keys: device" in str(error.value)
    assert "model.image_size: emoji does not read it" in str(error.value)
    with pytest.raises(recipe.RecipeError, match=r"model.text_tokens: sdxl does not read it; its own keys: dtype, "):
        recipe.read("srpo-sdxl-24gb", ["model.text_tokens=77"])
    with pytest.raises(recipe.RecipeError, match=r"model.folder: flux needs a diffusers folder or a hub id"):
        recipe.read("srpo-flux", ["model.folder=null"])
    with pytest.raises(recipe.RecipeError, match="did you mean flux"):
        recipe.read("srpo-flux", ["model.name=flx"])


@pytest.mark.parametrize("name", [name for name in families.names() if name != "emoji"])
def test_the_table_of_keys_is_what_the_families_take(name):
    found = families.find(name)
    own = {key for key in inspect.signature(found.load_class().load).parameters if key not in ("folder", "options")}
    assert set(found.keys) == own | families.LoadOptions.__annotations__.keys() - set(families.GIVEN)
    assert [f.name for f in dataclasses.fields(Options)] == list(families.LoadOptions.__annotations__)
