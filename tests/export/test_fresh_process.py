"""A LoRA that Palate trained and exported, in a process that knows diffusers only: the same images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_families import SIZE, saved

from palate import cli
from palate.models.flux import pack
from palate.runs import trained_model
from palate.sampling import sample

STEPS = 3
JOBS = {  # of a run: family, recipe, form of export, its own overrides, how diffusers calls the guidance
    "flux": (
        "flux",
        "srpo-flux",
        "diffusers",
        ["model.text_tokens=32"],
        {"guidance_scale": 3.5, "max_sequence_length": 32},
    ),
    "sdxl": ("sdxl", "srpo-sdxl-24gb", "diffusers", [], {"guidance_scale": 5.0}),
    "sdxl, kohya": ("sdxl", "srpo-sdxl-24gb", "kohya", [], {"guidance_scale": 5.0}),
}
pytestmark = pytest.mark.slow

STRANGER = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

for job in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(job["base"])
    pipe.set_progress_bar_config(disable=True)
    noise = load_file(job["noise"])["noise"]
    call = dict(prompt=["a cat"], latents=noise, num_inference_steps=job["steps"], output_type="pt",
                height=job["size"], width=job["size"], **job["call"])
    before = pipe(**call).images
    pipe.load_lora_weights(job["lora"])
    save_file({"before": before, "images": pipe(**call).images}, job["out"])
assert not [name for name in sys.modules if name.partition(".")[0] == "palate"]
"""


def palate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["palate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Of each job: Palate's own images after two steps of training, and the stranger's before and after loading."""
    folder, jobs, ours = tmp_path_factory.mktemp("fresh"), [], {}
    free = [
        "reward={name: brightness}",
        "algorithm.preference=absolute",
        "algorithm.rollout_steps=2",
        "prompts={list: [a cat]}",
        f"model.image_size={SIZE}",
        "model.lora_rank=2",
        "model.lora_alpha=5",
        "model.device=cpu",
        "model.dtype=float32",
        "trainer.steps=2",
        "trainer.batch_size=1",
        "trainer.lr=0.05",
        "trainer.warmup=0",
        "trainer.preview_every=0",
        f"model.text_cache={folder / 'text'}",
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, (family, recipe, form, more, call) in JOBS.items():
            base, run = saved(family)[0], folder / family
            if not run.exists():
                palate(monkeypatch, "train", recipe, *free, *more, f"model.folder={base}", f"run.folder={run}")
            palate(monkeypatch, "export", run, "--format", form)
            model, _ = trained_model(run, warn=print)
            noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(7))
            with torch.no_grad():
                scale = 1.0 if family == "flux" else call["guidance_scale"]
                latents = sample(model, model.encode_prompts(["a cat"]), noise, STEPS, guidance=scale)
                ours[name] = model.decode(latents)
            file = folder / f"{len(jobs)}.safetensors"
            save_file({"noise": pack(noise) if family == "flux" else noise}, file)
            jobs.append(
                {
                    "base": str(base),
                    "lora": str(run / "export" / form),
                    "noise": str(file),
                    "steps": STEPS,
                    "size": SIZE,
                    "call": call,
                    "out": str(file.with_suffix(".images")),
                }
            )
    command = [sys.executable, "-c", STRANGER, json.dumps(jobs)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert made.returncode == 0, made.stderr[-2000:]
    theirs = {name: load_file(Path(job["out"])) for name, job in zip(JOBS, jobs, strict=True)}
    return {name: (ours[name], theirs[name]["before"], theirs[name]["images"]) for name in JOBS}


@pytest.mark.parametrize("name", JOBS)
def test_diffusers_alone_draws_the_images_that_palate_draws(name, pictures):
    ours, before, theirs = pictures[name]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert float((ours - before).abs().max()) > 0.01  # without the LoRA they are others
