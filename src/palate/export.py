"""What was trained, in the forms that other programs load.

A LoRA changes a layer's weight by (alpha / rank) up @ down. Every file written here says its alpha: readers that find
none take alpha = rank, and a LoRA with another alpha would then come out too strong or too weak, silently.

    diffusers   unet.PATH.lora_A.weight, .lora_B.weight; alpha in the file's metadata     pipe.load_lora_weights(folder)
    kohya       lora_unet_PATH.lora_down.weight, .lora_up.weight, .alpha                  sd-scripts, Forge, ComfyUI
    comfyui     as kohya for UNets; transformer.PATH.lora_A / lora_B / alpha for the rest  ComfyUI's LoraLoader
    merged      the whole network, its LoRA added                                         from_pretrained(folder)
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palate import recipe as recipes
from palate.path import flow_schedule
from palate.runtime.checkpoint import write_atomically
from palate.runtime.errors import InputError

FORMATS = ("diffusers", "kohya", "comfyui")
WEIGHTS = "pytorch_lora_weights.safetensors"
UNETS = ("emoji", "stable-diffusion", "sdxl")  # the other families have a transformer
LICENCES = {  # of the published base models; a folder of one's own may have another
    "emoji": "Apache-2.0 (Palate)",
    "stable-diffusion": "CreativeML Open RAIL-M (1.x), CreativeML Open RAIL++-M (2.x)",
    "sdxl": "CreativeML Open RAIL++-M",
    "sd3": "Stability AI Community License",
    "flux": "FLUX.1-dev: FLUX.1 [dev] Non-Commercial License; FLUX.1-schnell: Apache-2.0",
    "pixart": "CreativeML Open RAIL++-M",
    "z-image": "Apache-2.0",
}


class Lora(NamedTuple):
    """One layer's change, (alpha / rank) up @ down. down (rank, in, ...), up (out, rank, ...)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def export_lora(run: Path, form: str, out: Path | None = None) -> Path:
    """Write the LoRA of a finished run as FORMATS say; the folder written to, `run`/export/`form` if left out."""
    if form not in FORMATS:
        raise InputError(f"--format: got {form!r}; expected one of {', '.join(FORMATS)}, merged")
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run} is not a run (it holds no recipe.yaml); give the folder of one, as runs/NAME")
    plan = recipes.read(str(run / "recipe.yaml"))
    if plan.model.weights != "lora":
        raise InputError(f"{run} trained the full model; its network is in {run / 'adapter'}, for from_pretrained")
    layers = read_adapter(run / "adapter")
    part = "unet" if plan.model.name in UNETS else "transformer"
    if form == "diffusers":
        tensors, extra = to_diffusers(layers, part)
    elif form == "comfyui" and part == "transformer":
        tensors, extra = to_comfyui(layers), {}
    else:
        tensors, extra = to_kohya(layers, plan.model.name), {}
    ranks, alphas = sorted({lora.rank for lora in layers.values()}), sorted({lora.alpha for lora in layers.values()})
    metadata = {
        "format": "pt",
        **extra,
        "palate.version": version("palate"),
        "palate.recipe": recipes.fingerprint(plan),
        "palate.algorithm": plan.algorithm_name,
        "palate.base_model": plan.model.folder or plan.model.name,
        "palate.family": plan.model.name,
        "palate.rank": ",".join(map(str, ranks)),
        "palate.alpha": ",".join(f"{alpha:g}" for alpha in alphas),
        "ss_network_dim": str(ranks[-1]),
        "ss_network_alpha": f"{alphas[-1]:g}",  # where kohya's tools look
    }
    folder = run / "export" / form if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata=metadata)
    write_atomically(folder / "README.md", model_card(run, plan, form, ranks, alphas).encode())
    write_atomically(folder / "recipe.yaml", recipes.dump(plan).encode())
    return folder


def export_merged(run: Path, model: Any, out: Path | None = None) -> Path:
    """The trained network of a run with its LoRA added to the weights, as a diffusers folder; `model` is the run's."""
    plan = recipes.read(str(run / "recipe.yaml"))
    folder = run / "export" / "merged" if out is None else out
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out: {folder} is not empty; give a new folder")
    network = model.weights.merged()
    network.save_pretrained(folder / ("unet" if plan.model.name in UNETS else "transformer"))
    rank = plan.model.lora_rank
    card = model_card(run, plan, "merged", [rank], [rank if plan.model.lora_alpha is None else plan.model.lora_alpha])
    write_atomically(folder / "README.md", card.encode())
    write_atomically(folder / "recipe.yaml", recipes.dump(plan).encode())
    return folder


def read_adapter(folder: Path) -> dict[str, Lora]:
    """Layer path -> its LoRA, from what diffusers' save_lora_adapter wrote; alpha from the file's own metadata."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder} holds no {WEIGHTS}, which a run writes at its end: finish the run first")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in list(file.keys())}
        config = json.loads(metadata["lora_adapter_metadata"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a LoRA that a run wrote ({error or type(error).__name__})") from error
    if config.get("use_dora") or config.get("use_rslora"):
        raise InputError(f"{path} is a DoRA or a rank-stabilised LoRA; only plain ones can be exported")
    own = config.get("alpha_pattern") or {}
    layers = {}
    for name, down in tensors.items():
        layer, dot, kind = name.partition(".lora_A.")
        if not dot:
            continue
        up = tensors.get(f"{layer}.lora_B.{kind}")
        if up is None:
            raise InputError(f"{path}: {name} has no lora_B beside it")
        layers[layer] = Lora(down, up, float(own.get(layer, config["lora_alpha"])))
    if 2 * len(layers) != len(tensors):
        raise InputError(f"{path}: {len(tensors) - 2 * len(layers)} of {len(tensors)} tensors belong to no LoRA layer")
    return layers


# ------------------------------------------------------------------------------------------------------- forms


def to_diffusers(layers: Mapping[str, Lora], part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under `part` ("unet" or "transformer"), and the metadata in which diffusers looks for rank and alpha."""
    first = next(iter(layers.values()))
    config = {
        f"{part}.r": first.rank,
        f"{part}.lora_alpha": first.alpha,
        f"{part}.target_modules": sorted(layers),
        f"{part}.rank_pattern": {name: lora.rank for name, lora in layers.items() if lora.rank != first.rank},
        f"{part}.alpha_pattern": {name: lora.alpha for name, lora in layers.items() if lora.alpha != first.alpha},
    }
    tensors = {}
    for name, lora in layers.items():
        tensors |= {f"{part}.{name}.lora_A.weight": lora.down, f"{part}.{name}.lora_B.weight": lora.up}
    return tensors, {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}


def to_comfyui(layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """ComfyUI's names of a transformer: diffusers' own, with an alpha tensor beside each pair."""
    tensors = {}
    for name, lora in layers.items():
        stem = f"transformer.{name}"
        tensors |= {f"{stem}.lora_A.weight": lora.down, f"{stem}.lora_B.weight": lora.up}
        tensors[f"{stem}.alpha"] = torch.tensor(lora.alpha)
    return tensors


def to_kohya(layers: Mapping[str, Lora], family: str) -> dict[str, Tensor]:
    """kohya's names: diffusers' path with underscores for UNets, the original program's for FLUX."""
    if family not in (*UNETS, "flux"):
        raise InputError(f"--format kohya: there is no such form of {family}; use comfyui or diffusers")
    plain = {name.replace(".", "_"): lora for name, lora in layers.items()}
    renamed = flux_layers(layers) if family == "flux" else plain
    tensors = {}
    for name, lora in renamed.items():
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": lora.down, f"{stem}.lora_up.weight": lora.up}
        tensors[f"{stem}.alpha"] = torch.tensor(lora.alpha)
    return tensors


_FLUX_DOUBLE = {  # the original name -> the layers of diffusers that it fuses, in the order of its rows
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}


def flux_layers(layers: Mapping[str, Lora]) -> dict[str, Lora]:
    """FLUX's layers under the names of the original program, which holds q, k, v (and a single block's MLP) in one."""
    left, renamed = dict(layers), {}
    for kind, original, parts in (
        ("transformer_blocks", "double_blocks", _FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", _FLUX_SINGLE),
    ):
        for block in sorted({name.split(".")[1] for name in layers if name.startswith(f"{kind}.")}, key=int):
            for new, names in parts.items():
                found = [left.pop(f"{kind}.{block}.{name}", None) for name in names]
                if any(lora is not None for lora in found):
                    renamed[f"{original}_{block}_{new}"] = _fused(found, _rows(found, names))
    if left:
        raise InputError(f"--format kohya: {next(iter(left))} has no name in the original FLUX; use comfyui")
    return renamed


def _rows(found: Sequence[Lora | None], names: Sequence[str]) -> list[int]:
    """Rows of each fused part. q, k, v are as wide as the model, its MLP is four times that."""
    known = [(lora.up.shape[0], name) for lora, name in zip(found, names, strict=True) if lora is not None]
    width = max(rows // 4 if name == "proj_mlp" else rows for rows, name in known)
    return [4 * width if name == "proj_mlp" else width for name in names]


def _fused(parts: Sequence[Lora | None], rows: Sequence[int]) -> Lora:
    """The LoRA of layers stacked by rows: downs stacked, ups on the diagonal, so the ranks add up."""
    present = [lora for lora in parts if lora is not None]
    if len(parts) == 1:
        return present[0]
    down = torch.cat([lora.down for lora in present])
    up = down.new_zeros(sum(rows), len(down))
    row = column = 0
    for lora, height in zip(parts, rows, strict=True):
        if lora is not None:
            up[row : row + height, column : column + lora.rank] = lora.up * (lora.alpha / lora.rank)
            column += lora.rank
        row += height
    scale = present[0].alpha / present[0].rank  # kept outside where all agree, so that alpha still means what it says
    if all(lora.alpha / lora.rank == scale for lora in present):
        return Lora(down, up / scale, scale * len(down))
    return Lora(down, up, float(len(down)))


# -------------------------------------------------------------------------------------------------------- card


def model_card(run: Path, plan: Any, form: str, ranks: Sequence[int], alphas: Sequence[float]) -> str:
    """Markdown: what it is, how to load it, the base model's licence, metrics before and after, the recipe."""
    base = plan.model.folder or plan.model.name
    use = {
        "diffusers": "pipe.load_lora_weights(folder)",
        "kohya": "place the file in the LoRA folder of your program",
        "comfyui": "place the file in ComfyUI/models/loras",
        "merged": "diffusers' class of the network: from_pretrained(folder)",
    }[form]
    what = "Merged LoRA" if form == "merged" else "LoRA"
    lines = [
        f"# {what} of {base}, trained with {plan.algorithm_name}",
        "",
        f"Format {form}, rank {', '.join(map(str, ranks))}, alpha {', '.join(f'{a:g}' for a in alphas)}. "
        f"To load: `{use}`.",
        "",
        f"Base model: {base}. Its licence holds for this file too; the published {plan.model.name} is under: "
        f"{LICENCES.get(plan.model.name, 'see its page')}.",
        "",
    ]
    evaluation = run / "evaluation.json"
    if evaluation.is_file():
        metrics = json.loads(evaluation.read_text("utf-8")).get("metrics", {})
        rows = [(name, m) for name, m in metrics.items() if m.get("value") is not None and m.get("base") is not None]
        lines += ["| metric | before | after |", "|---|---|---|"]
        lines += [*(f"| {name} | {m['base']:.3f} | {m['value']:.3f} |" for name, m in rows), ""]
    else:
        lines += ["Not evaluated: `palate evaluate` writes the metrics before and after.", ""]
    return "\n".join([*lines, "```yaml", recipes.dump(plan).rstrip(), "```", ""])


def export_one_step(model: Any, settings: Any, folder: Path | str) -> Path:
    """Write the policy, LoRA merged, as a diffusers pipeline that draws in one step; returns the folder.

    model: a trained one, loaded from a diffusers folder on this disk. settings: `DistarSettings`; its `generator` says
    t_init and input_scale. The README in the folder says how to call it; nothing of Palate is needed there.
    generator.json is for `load_one_step`. ValueError: more than one step, a time that no scheduler can be set to, or a
    folder that holds something else.
    """
    import diffusers

    generator, folder = settings.generator, Path(folder)
    if generator.steps != 1:
        raise InputError(f"generator.steps = {generator.steps}: only a generator of one step can be exported as one")
    repository = getattr(getattr(model, "parts", None), "repository", None)
    source = Path(model.folder if repository is None else repository.root)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")
    label = round(1000 * generator.t_init) if model.schedule is flow_schedule else round(1000 * generator.t_init) - 1
    index = json.loads((source / "model_index.json").read_text("utf-8"))
    denoiser = "unet" if "unet" in index else "transformer"
    scheduler, call = _one_step_scheduler(model, generator.t_init, label, denoiser)
    scale = float(model.schedule(torch.tensor([generator.t_init], dtype=torch.float64))[1])
    scale = scale if generator.input_scale is None else generator.input_scale

    if "safety_checker" in index and not _whole(source / "safety_checker"):
        index["safety_checker"] = [None, None]  # Palate fetches its configuration alone, and pipelines work without
    copied = _copied(source, index, denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    for part in copied:
        shutil.copytree(source / part, folder / part)
    network = model.weights.merged()
    network.save_pretrained(folder / denoiser)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_atomically(folder / "model_index.json", json.dumps(index, indent=1).encode())
    record = {"t_init": generator.t_init, "input_scale": scale, "steps": 1, **_how_to_load(model)}
    write_atomically(folder / "generator.json", json.dumps(record).encode())
    size, pipeline, dtype = model.latent_shape, index["_class_name"], network.dtype
    if isinstance(sides := getattr(model, "image_size", None), tuple):
        call += f", height={sides[0]}, width={sides[1]}"
    if "text_tokens" in record:
        call += f", max_sequence_length={record['text_tokens']}"
    if record["family"] == "pixart":  # its pipelines would draw at a size of their own list and rewrite the prompt
        call += ", use_resolution_binning=False, clean_caption=False"
    told, packed = record.get("distilled_guidance", 0.0), ""
    if record["family"] == "flux":  # its pipelines take latents as their network does
        packed = f"\nnoise = pipe._pack_latents(noise, 1, {size[0]}, {size[1]}, {size[2]})"
    drawn = "torch.randn" if scale == 1.0 else f"{scale:.9g} * torch.randn"
    write_atomically(
        folder / "README.md",
        f"""# One-step generator, trained with Palate

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("path/to/this/folder", torch_dtype={dtype})
noise = {drawn}(1, {size[0]}, {size[1]}, {size[2]}, dtype=pipe.dtype)  # the scale is part of the generator{packed}
image = pipe("a prompt", latents=noise, guidance_scale={told}, {call}).images[0]
```

One network evaluation an image, at time label {label}.
Made with diffusers {diffusers.__version__}, palate {version("palate")}.
""".encode(),
    )
    return folder


def one_step_folder(source: str) -> Path | None:
    """The folder of an exported generator, a path or the name of one in the package; None if it is neither."""
    packaged = Path(str(files("palate"))) / "assets" / source
    return next((folder for folder in (Path(source), packaged) if (folder / "generator.json").is_file()), None)


def load_one_step(folder: Path) -> tuple[Any, Any]:
    """(model, sampler) of what `export_one_step` wrote, for `evaluate.generate`.

    A generator.json without "family" is of the embedded model. ValueError: a family that this Palate does not have.
    """
    from palate.algorithms.distar import Generator

    file = folder / "generator.json"
    try:
        record = json.loads(file.read_text("utf-8"))
        generator = Generator(**{key: record.pop(key) for key in ("t_init", "input_scale", "steps")})
        family = record.pop("family", "emoji")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not what an export wrote ({error or type(error).__name__})") from error
    module, kind, keys = recipes.MODELS.get(str(family), (None, None, ()))
    if module is None or not record.keys() <= set(keys):
        raise InputError(
            f"{file}: this version cannot draw a generator of {family!r}; draw it with diffusers, see "
            f"{folder / 'README.md'}"
        )
    return getattr(importlib.import_module(module), kind).load(folder, training="none", **record), generator


def _how_to_load(model: Any) -> dict[str, Any]:
    """The model's family, and those of its options without which `load_one_step` would draw something else."""
    family = sys.modules[type(model).__module__].FAMILY
    if family == "emoji":
        return {"family": family}
    found = {"family": family, "image_size": list(model.image_size), "dtype": str(model.parts.dtype).split(".")[-1]}
    keys = recipes.MODELS[family][2]
    if "text_tokens" in keys:
        found["text_tokens"] = model.parts.text.limit
    if "distilled_guidance" in keys:
        found["distilled_guidance"] = float(model.distilled_guidance)
    return found


def _copied(source: Path, index: Mapping[str, Any], denoiser: str) -> list[str]:
    """The parts that a one-step pipeline takes from its base as they are; ValueError if one is not there."""
    parts = [part for part, kind in index.items() if isinstance(kind, list) and kind[0]]
    copied = [part for part in parts if part not in (denoiser, "scheduler")]
    if missing := [part for part in copied if not _whole(source / part)]:
        raise InputError(f"{source}: {', '.join(missing)} is not whole, and a pipeline needs it; complete the download")
    return copied


def _whole(part: Path) -> bool:
    """Whether a part is there, with its weights if it is a network."""
    return part.is_dir() and (not (part / "config.json").is_file() or any(part.glob("*.safetensors")))


def _one_step_scheduler(model: Any, t_init: float, label: int, denoiser: str) -> tuple[Any, str]:
    """A scheduler whose one step is x0 = D(x, t_init), and the pipeline's arguments that ask for it.

    VP: LCMScheduler, told the label; its boundary scalings change x0 by about 1e-7. Flow transformers: Euler from the
    one sigma to 0. A flow UNet, in whose pipeline Euler's scheduler does not work: DPMSolver++ of first order, whose
    step to sigma = 0 is x - sigma v, shifted so that one step begins at t_init.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

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
