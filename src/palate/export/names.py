"""A LoRA's tensors under the names that other programs read. Every form says its alpha: some readers assume the rank.

diffusers   unet.PATH.lora_A.weight, .lora_B.weight; alpha in the file's metadata     pipe.load_lora_weights(folder)
kohya       lora_unet_PATH.lora_down.weight, .lora_up.weight, .alpha                  sd-scripts, Forge, ComfyUI
comfyui     as kohya for UNets; transformer.PATH.lora_A / lora_B / alpha for the rest  ComfyUI's LoraLoader
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from palate.models.facts import Facts
from palate.models.lora import METADATA, peft_config, to_peft
from palate.models.original import Lora, fuse
from palate.runtime.errors import InputError

FORMATS = ("diffusers", "kohya", "comfyui")


def to_form(layers: Mapping[str, Lora], form: str, facts: Facts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata in one of FORMATS. InputError: the form does not exist, not for this family, or not for a
    DoRA, whose rows ComfyUI divides by other norms than the weights were trained with: those along the inputs, or of
    the unchanged weight."""
    if form not in FORMATS:
        raise InputError(f"--format: got {form!r}; expected one of {', '.join(FORMATS)}, merged")
    if form == "diffusers":
        return to_diffusers(layers, facts.denoiser)
    if any(lora.magnitude is not None for lora in layers.values()):
        raise InputError(f"--format {form}: this is a DoRA, which its readers draw otherwise; use diffusers or merged")
    if form == "comfyui" and facts.denoiser == "transformer":
        return to_comfyui(layers), {}
    return to_kohya(layers, facts), {}


def to_diffusers(layers: Mapping[str, Lora], part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under `part` ("unet" or "transformer"), and the metadata in which diffusers looks for rank and alpha."""
    config = peft_config(layers, f"{part}.")
    return to_peft(layers, f"{part}."), {METADATA: json.dumps(config, sort_keys=True)}


def to_comfyui(layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """ComfyUI's names of a transformer: diffusers' own, with an alpha tensor beside each pair."""
    tensors: dict[str, Tensor] = {}
    for name, lora in layers.items():
        stem = f"transformer.{name}"
        tensors |= {f"{stem}.lora_A.weight": lora.down, f"{stem}.lora_B.weight": lora.up}
        tensors[f"{stem}.alpha"] = torch.tensor(lora.alpha)
    return tensors


def to_kohya(layers: Mapping[str, Lora], facts: Facts) -> dict[str, Tensor]:
    """kohya's names: diffusers' path with underscores for UNets, the original program's for others."""
    if facts.denoiser != "unet" and not facts.original:
        raise InputError(f"--format kohya: there is no such form of {facts.name}; use comfyui or diffusers")
    plain = {name.replace(".", "_"): lora for name, lora in layers.items()}
    renamed = plain if facts.denoiser == "unet" else fuse(layers, facts.original)
    tensors: dict[str, Tensor] = {}
    for name, lora in renamed.items():
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": lora.down, f"{stem}.lora_up.weight": lora.up}
        tensors[f"{stem}.alpha"] = torch.tensor(lora.alpha)
    return tensors
