"""A one-step generator as a whole diffusers pipeline, and back."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from palate.models import families
from palate.models.parts import LoadedModel
from palate.models.repository import kinds_in, read_settings
from palate.models.saved import save_network
from palate.path import flow_schedule
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json, write_atomically
from palate.sampling import FewStepGenerator


def export_one_step(model: Any, settings: Any, folder: Path | str) -> Path:
    """Write the policy, LoRA merged, as a diffusers pipeline that draws in one step; returns the folder.

    model: a trained one, loaded from a diffusers folder on this disk. settings: `DistarSettings`; its `generator` says
    t_init and input_scale. The README in the folder says how to call it; nothing of Palate is needed there.
    generator.json is for `load_one_step`. InputError: more than one step, a time that no scheduler can be set to, or a
    folder that holds something else.
    """
    generator, folder = settings.generator, Path(folder)
    if generator.steps != 1:
        raise InputError(f"generator.steps = {generator.steps}: only a generator of one step can be exported as one")
    source = Path(model.parts.repository.root if isinstance(model, LoadedModel) else model.folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")
    index = read_settings(source / "model_index.json")
    if not hasattr(diffusers, str(index.get("_class_name"))):
        raise InputError(f"{source}: diffusers has no {index.get('_class_name')}, so it could not draw with the export")
    denoiser = model.facts.denoiser
    label = round(1000 * generator.t_init) - (0 if model.schedule is flow_schedule else 1)
    scheduler, call = _one_step_scheduler(model, generator.t_init, label, denoiser)
    if "safety_checker" in index and not _whole(source / "safety_checker"):
        index["safety_checker"] = [None, None]  # Palate fetches its configuration alone, and pipelines work without
    copied = _copied(source, index, denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    for part in copied:
        shutil.copytree(source / part, folder / part)
        if isinstance(model, LoadedModel) and model.parts.repository.variant(part) == "fp16":
            _as_plain(folder / part)
    network = model.weights.merged()
    save_network(network, folder / denoiser)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_atomically(folder / "model_index.json", json.dumps(index, indent=1).encode())
    scale = float(model.schedule(torch.tensor([generator.t_init], dtype=torch.float64))[1])
    scale = scale if generator.input_scale is None else generator.input_scale
    record = {"t_init": generator.t_init, "input_scale": scale, "steps": 1, **_how_to_load(model)}
    write_atomically(folder / "generator.json", json.dumps(record).encode())
    readme = _readme(model, record, index["_class_name"], network.dtype, call, label)
    write_atomically(folder / "README.md", readme.encode())
    return folder


def _readme(model: Any, record: Mapping[str, Any], pipeline: str, dtype: torch.dtype, call: str, label: int) -> str:
    """How a program that knows diffusers alone draws with the folder. call: the pipeline's arguments for one step."""
    size, scale, packed = model.latent_shape, record["input_scale"], ""
    takes = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    if "guidance_scale" in takes and takes["guidance_scale"].default is not None:
        embedded = model.weights.network.config.get("guidance_embeds")
        call += f", guidance_scale={record['distilled_guidance'] if embedded else 0.0}"
    if isinstance(model, LoadedModel):
        call += f", height={model.image_size[0]}, width={model.image_size[1]}"
    if "text_tokens" in record and "max_sequence_length" in takes:
        call += f", max_sequence_length={record['text_tokens']}"
    call += model.facts.one_step_call
    if model.facts.packs_noise:
        packed = f"\nnoise = pipe._pack_latents(noise, 1, {size[0]}, {size[1]}, {size[2]})"
    drawn = "torch.randn" if scale == 1.0 else f"{scale:.9g} * torch.randn"
    return f"""# One-step generator, trained with Palate

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/folder", torch_dtype={dtype})
noise = {drawn}(1, {size[0]}, {size[1]}, {size[2]}, dtype=pipe.dtype)  # the scale is part of the generator{packed}
image = pipe(prompt="a prompt", latents=noise, {call}).images[0]
```

One network evaluation per image, at time label {label}.
Made with diffusers {diffusers.__version__}, palate {version("palate")}.
"""


def one_step_folder(source: str) -> Path | None:
    """The folder of an exported generator, a path or the name of one in the package; None if it is neither."""
    packaged = Path(str(files("palate"))) / "assets" / source
    return next((folder for folder in (Path(source), packaged) if (folder / "generator.json").is_file()), None)


def load_one_step(folder: Path) -> tuple[Any, Any]:
    """(model, sampler) of what `export_one_step` wrote, for `evaluate.generate`.

    A generator.json without "family" is of the embedded model. ValueError: a family that this Palate does not have.
    """
    file = folder / "generator.json"
    try:
        record = parse_json(file.read_text("utf-8"))
        generator = FewStepGenerator(**{key: record.pop(key) for key in ("t_init", "input_scale", "steps")})
        family = str(record.pop("family", "emoji"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not what an export wrote ({error or type(error).__name__})") from error
    known = family in families.names()
    if not known or not record.keys() <= set(families.find(family).keys):
        raise InputError(
            f"{file}: this version cannot draw a generator of {family!r}; draw it with diffusers, see "
            f"{folder / 'README.md'}"
        )
    return families.find(family).load_class().load(folder, training="none", **record), generator


def _how_to_load(model: Any) -> dict[str, Any]:
    """The model's family, and those of its options without which `load_one_step` would draw something else."""
    family = model.facts.name
    if not isinstance(model, LoadedModel):
        return {"family": family}
    found = {"family": family, "image_size": list(model.image_size), "dtype": str(model.parts.dtype).split(".")[-1]}
    keys = families.find(family).keys
    if "text_tokens" in keys:
        found["text_tokens"] = model.parts.text.text_tokens
    if "distilled_guidance" in keys:
        found["distilled_guidance"] = float(model.call.guidance_embed)
    return found


def _copied(source: Path, index: Mapping[str, Any], denoiser: str) -> list[str]:
    """The parts that a one-step pipeline takes from its base as they are; ValueError if one is not there."""
    copied = [part for part in kinds_in(index) if part not in (denoiser, "scheduler")]
    if missing := [part for part in copied if not _whole(source / part)]:
        raise InputError(f"{source}: {', '.join(missing)} is not whole, and a pipeline needs it; complete the download")
    return copied


def _as_plain(part: Path) -> None:
    """Give the files of a part that is there as the variant fp16 alone the names that are read without a variant."""
    for file in sorted(part.glob("*.fp16*")):
        if file.suffix == ".json":  # which file holds which tensor
            write_atomically(file, file.read_text("utf-8").replace(".fp16", "").encode())
        file.rename(file.with_name(file.name.replace(".fp16", "")))


def _whole(part: Path) -> bool:
    """Whether a part is there, with its weights if it is a network."""
    return part.is_dir() and (not (part / "config.json").is_file() or any(part.glob("*.safetensors")))


def _one_step_scheduler(model: Any, t_init: float, label: int, denoiser: str) -> tuple[Any, str]:
    """A scheduler whose one step is x0 = D(x, t_init), and the pipeline's arguments that ask for it.

    VP: LCMScheduler, told the label; its boundary scalings change x0 by about 1e-7. Flow transformers: Euler from the
    one sigma to 0. A flow UNet, in whose pipeline Euler's scheduler does not work: DPMSolver++ of first order, whose
    step to sigma = 0 is x - sigma v, shifted so that one step begins at t_init.
    """
    if model.schedule is not flow_schedule:
        config = model.scheduler.config
        if abs(config.num_train_timesteps * t_init - (label + 1)) > 1e-6:
            raise InputError(f"generator.t_init = {t_init}: expected a whole number of {config.num_train_timesteps}ths")
        kept = {
            key: config[key]
            for key in (
                "num_train_timesteps",
                "beta_start",
                "beta_end",
                "beta_schedule",
                "trained_betas",
                "prediction_type",
                "rescale_betas_zero_snr",
                "steps_offset",
            )
            if key in config
        }
        return LCMScheduler(**kept, clip_sample=False), f"num_inference_steps=1, timesteps=[{label}]"
    if denoiser == "transformer":
        return FlowMatchEulerDiscreteScheduler(shift=1.0), f"num_inference_steps=1, sigmas=[{t_init}]"
    first, target = 0.999, t_init * (1 + 1e-9)  # the scheduler's own first level, and ours a hair above a whole label
    if abs(1000 * t_init - label) > 1e-6 or not label < 1000:
        raise InputError(f"generator.t_init = {t_init}: expected a whole number of thousandths, at most .999")
    scheduler = DPMSolverMultistepScheduler(
        solver_order=1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        flow_shift=target * (1 - first) / (first * (1 - target)),
    )
    scheduler.set_timesteps(1)
    if int(scheduler.timesteps[0]) != label or abs(float(scheduler.sigmas[0]) - t_init) > 1e-6:
        raise InputError(f"generator.t_init = {t_init}: this diffusers starts at {scheduler.timesteps.tolist()}")
    return scheduler, "num_inference_steps=1"
