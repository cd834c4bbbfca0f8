"""export.export_one_step: a folder that draws the generator's images without Palate."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from PIL import Image
from support import tiny_families

from palate import recipe
from palate.algorithms.distar import PIXART, SD15, SDXL, DistarSettings, Generator
from palate.cli import app
from palate.cli.export import export_run
from palate.export import export_one_step, load_one_step
from palate.models.emoji import EmojiModel
from palate.runs import RunFolder

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


def test_the_run_s_own_folder_is_made_anew(tmp_path, trained, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.read("distar-emoji")))
    monkeypatch.setattr(RunFolder, "model", lambda self, warn, **options: (trained, None))
    for old in ("one-step/unet/old.safetensors", "diffusers/mine"):
        (tmp_path / "export" / old).parent.mkdir(parents=True)
        (tmp_path / "export" / old).touch()
    export_run(tmp_path, "one-step", None)
    assert not (tmp_path / "export/one-step/unet/old.safetensors").exists()
    assert load_one_step(tmp_path / "export/one-step")[1].t_init == 0.714
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["diffusers", "one-step"]
    assert (tmp_path / "export/diffusers/mine").exists()
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        export_run(tmp_path, "one-step", tmp_path / "export/one-step")


def test_merged_weights_say_what_the_name_says(trained):
    x = torch.randn((2, *trained.latent_shape), generator=torch.Generator().manual_seed(1))
    cond, t = trained.encode_prompts(PROMPTS), torch.tensor([300.0, 800.0])
    for name in ("policy", "assistant", "reference"):
        plain = trained.weights.merged(name)
        with torch.no_grad(), trained.weights.using(name) as network:
            torch.testing.assert_close(plain(x, t, cond).sample, network(x, t, cond).sample, atol=1e-4, rtol=0)
        assert not any("lora" in key for key in plain.state_dict())


def test_what_cannot_be_one_step_is_refused(tmp_path, trained):
    for generator, match in (
        (Generator(steps=2), "one step"),
        (Generator(t_init=0.7145), "thousandths"),
        (Generator(t_init=1.0), "at most .999"),
    ):
        with pytest.raises(ValueError, match=match):
            export_one_step(trained, DistarSettings(generator=generator), tmp_path / "no")
    assert not (tmp_path / "no").exists()


FLOW = Generator(t_init=0.9)
PUBLISHED = {"stable-diffusion": SD15, "stable-diffusion-v": SD15, "sdxl": SDXL, "pixart-alpha": PIXART}
SAME_PIPELINE = ("pixart-sigma", "flux2-klein", "krea2-turbo")
FAMILIES = {name: PUBLISHED.get(name, FLOW) for name in tiny_families.FAMILIES if name not in SAME_PIPELINE}


def generator_of(name, folder=None, dtype="float32"):
    """A tiny random model whose LoRA says something."""
    size = {"image_size": 32} if name == "sana" else {}  # whose pipeline wants multiples of 32
    model = tiny_families.load(name, folder, dtype=dtype, **size)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    return model


def drawn_as_the_card_says(folder, noise):
    """(image, pipeline) of the README's own lines, word for word, with this noise."""
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("path/to/this/folder", str(folder)).replace(").images", ', output_type="pt").images')
    scope = {"randn": lambda *shape, dtype: noise.view(shape).to(dtype)}
    exec(code.replace("torch.randn(", "randn("), scope)
    return scope["image"], scope["pipe"]


def assembled(folder, torch_dtype):
    """The pipeline in the folder, but for the tiny processor, which is none that diffusers reads."""
    parts = dict(tiny_families.saved("qwen-image-21")[1].components)
    for part in ("transformer", "scheduler"):
        parts[part] = type(parts[part]).from_pretrained(folder, subfolder=part)
    return diffusers.QwenImage21Pipeline(**parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_card_of_a_family_draws_what_palate_draws(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, generator, folder = generator_of(name), FAMILIES[name], tmp_path / "one-step"
    export_one_step(model, DistarSettings(generator=generator), folder)
    noise = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    cond = model.encode_prompts(["a prompt"])
    with torch.no_grad():
        ours, base = (model.decode(generator(model, cond, [noise], weights=name)) for name in ("policy", "reference"))
    if name == "qwen-image-21":
        monkeypatch.setattr(diffusers.QwenImage21Pipeline, "from_pretrained", assembled)
    theirs, pipe = drawn_as_the_card_says(folder, noise)
    assert len(pipe.scheduler.timesteps) == 1
    theirs = theirs[:3] * theirs[3:] + 1 - theirs[3:] if len(theirs) == 4 else theirs  # on white
    torch.testing.assert_close(theirs, ours[0], atol=1e-5, rtol=0)
    assert (ours - base).abs().mean() > 3e-4
    again, sampler = load_one_step(folder)
    assert type(again) is type(model) and again.latent_shape == model.latent_shape
    with torch.no_grad():
        loaded = again.decode(sampler(again, again.encode_prompts(["a prompt"]), [noise]))
    torch.testing.assert_close(loaded, ours, atol=1e-5, rtol=0)


def test_a_bfloat16_generator_of_a_half_downloaded_folder(tmp_path, monkeypatch):
    """As from the hub: SD1.5's safety checker is there as a configuration only; the network is stored in bfloat16, and
    of other parts there is the variant fp16 alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, folder = tmp_path / "base", tmp_path / "one-step"
    shutil.copytree(tiny_families.saved("stable-diffusion")[0], source)
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "safety_checker").mkdir()
    (source / "safety_checker/config.json").write_text("{}")
    for part in ("vae", "text_encoder"):  # of some there is this variant alone
        (weights,) = (source / part).glob("*.safetensors")
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    model = generator_of("stable-diffusion", source, "bfloat16")
    export_one_step(model, DistarSettings(generator=SD15), folder)
    noise = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.decode(SD15(model, model.encode_prompts(["a prompt"]), [noise]))[0]
    theirs, _ = drawn_as_the_card_says(folder, noise)
    torch.testing.assert_close(theirs.float(), ours, atol=0.05, rtol=0)
    app(
        ["sample", "--model", str(folder), "--prompt", "a prompt", "--seeds", "0", "--out", str(tmp_path / "drawn")],
        standalone_mode=False,
    )
    assert Image.open(tmp_path / "drawn/grid.png").size == model.image_size
    shutil.rmtree(source / "text_encoder")
    with pytest.raises(ValueError, match="text_encoder is not whole"):
        export_one_step(model, DistarSettings(generator=SD15), tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"t_init": 0.7, "input_scale": 0.7, "steps": 1, "family": "later"}, "draw it with diffusers, see .*README"),
        ({"t_init": 0.7, "input_scale": 0.7, "steps": 1, "family": "emoji", "later": 1}, "draw it with diffusers"),
        ({"t_init": 0.7}, "not what an export wrote"),
        ([], "not what an export wrote"),
    ],
)
def test_a_generator_that_is_not_known_is_refused(tmp_path, record, message):
    (tmp_path / "generator.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load_one_step(tmp_path)
