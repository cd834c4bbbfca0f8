"""The model families against diffusers: equal samples, the real architectures' sizes, precision, caches, clear errors."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_families import FAMILIES, SIZE, load, saved

from palate.models.flux import pack, unpack
from palate.sampling import sample

PROMPTS = ["a cat", "two dogs"]
STEPS = 5


def noise_for(model, count: int = 2) -> torch.Tensor:
    return torch.randn((count, *model.latent_shape), generator=torch.Generator().manual_seed(7))


def diffusers_sample(name, pipeline, noise, guidance):
    """The pipeline's own latents for our noise; guidance in our convention, w of u + w (c - u)."""
    call = {"num_inference_steps": STEPS, "output_type": "latent", "height": SIZE, "width": SIZE, "prompt": list(PROMPTS)}
    if name.startswith("flux"):
        patches = pipeline(**call, latents=pack(noise), guidance_scale=2.5, true_cfg_scale=guidance, max_sequence_length=32,
                           negative_prompt=[""] * 2 if guidance != 1.0 else None).images
        return unpack(patches, noise.shape)
    if name.startswith("stable-diffusion"):  # its published PNDM is a multistep method; DDIM is its one-step form
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if name.startswith("pixart"):  # likewise DPM-Solver++ of order 2, whose order 1 is the DDIM step
        settings = pipeline.scheduler.config
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(settings, solver_order=1)
        call |= {"use_resolution_binning": False, "max_sequence_length": 32}
    if name == "sd3":
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
    for guidance in (1.0, 3.0):
        theirs = diffusers_sample(name, pipeline, noise, guidance)
        with torch.no_grad():
            ours = sample(model, model.encode_prompts(PROMPTS), noise, STEPS, guidance=guidance)
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), (guidance, float((ours - theirs).abs().max()))
        assert theirs.std() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_decoded_images_equal_the_pipelines(name):
    """The VAE's scale and shift, both ways."""
    _, pipeline = saved(name)
    model = load(name, training="none")
    latents = noise_for(model) * 0.5
    config = pipeline.vae.config
    with torch.no_grad():
        raw = pipeline.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
        theirs = pipeline.image_processor.postprocess(raw, output_type="pt")
        ours = model.decode(latents)
        again = model.encode(ours)
        posterior = pipeline.vae.encode(2 * ours - 1).latent_dist.mode()
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(again, (posterior - (config.shift_factor or 0.0)) * config.scaling_factor, atol=1e-4)
