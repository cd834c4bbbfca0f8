"""export.export_one_step: a folder that draws the generator's images without Palate."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from palate.algorithms.distar import DistarSettings, Generator
from palate.export import export_one_step, load_one_step
from palate.models.emoji import EmojiModel

PROMPTS = ["a 3d dog on a blue background", "a flat apple on a red background"]
FRESH = """
import sys, torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
folder, prompts = sys.argv[1], sys.argv[2:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
calls = []
pipe.unet.register_forward_hook(lambda *_: calls.append(1))
latents = load_file(folder + "/../latents.safetensors")["latents"]
images = pipe(prompts, latents=latents, guidance_scale=0.0, num_inference_steps=1, output_type="pt").images
assert len(calls) == 1 and not any(name.split(".")[0] == "palate" for name in sys.modules)
save_file({"images": images.contiguous()}, folder + "/../images.safetensors")
"""


@pytest.fixture(scope="module")
def trained():
    model = EmojiModel.load(training="lora", lora_rank=2, names=("policy", "assistant"))
    with torch.no_grad():
        for name in ("policy", "assistant"):
            for k, p in enumerate(model.parameters(name)):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k + len(name))))
    return model


def test_a_fresh_process_without_palate_draws_the_same_images_in_one_step(tmp_path, trained):
    from safetensors.torch import load_file, save_file

    generator = Generator(t_init=0.714)
    export_one_step(trained, DistarSettings(generator=generator), tmp_path / "one-step")
    noise = torch.randn((2, *trained.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = trained.decode(generator(trained, trained.encode_prompts(PROMPTS), [noise]))
        base = trained.decode(generator(trained, trained.encode_prompts(PROMPTS), [noise], weights="reference"))
    save_file({"latents": 0.714 * noise}, str(tmp_path / "latents.safetensors"))
    assert "0.714 * torch.randn" in (tmp_path / "one-step/README.md").read_text()
    command = [sys.executable, "-c", FRESH, str(tmp_path / "one-step"), *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "images.safetensors")["images"]
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)  # LoRA merged into float32 weights, a whole label
    assert (ours - base).abs().mean() > 0.01
    again, sampler = load_one_step(tmp_path / "one-step")
    with torch.no_grad():
        loaded = again.decode(sampler(again, again.encode_prompts(PROMPTS), [noise]))
    torch.testing.assert_close(loaded, ours, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="not empty"):
        export_one_step(trained, DistarSettings(generator=generator), tmp_path / "one-step")


def test_merged_weights_say_what_the_name_says(trained):
    x = torch.randn((2, *trained.latent_shape), generator=torch.Generator().manual_seed(1))
    cond, t = trained.encode_prompts(PROMPTS), torch.tensor([300.0, 800.0])
    for name in ("policy", "assistant", "reference"):
        plain = trained.weights.merged(name)
        with torch.no_grad(), trained.weights.speaking_as(name) as network:
            torch.testing.assert_close(plain(x, t, cond).sample, network(x, t, cond).sample, atol=1e-4, rtol=0)
        assert not any("lora" in key for key in plain.state_dict())


def test_what_cannot_be_one_step_is_refused(tmp_path, trained):
    for generator, match in ((Generator(steps=2), "one step"), (Generator(t_init=0.7145), "thousandths"),
                             (Generator(t_init=1.0), "at most .999")):
        with pytest.raises(ValueError, match=match):
            export_one_step(trained, DistarSettings(generator=generator), tmp_path / "no")
    assert not (tmp_path / "no").exists()
