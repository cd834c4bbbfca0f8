"""LoRA files: one layer's change, the names that programs give to layers, and reading a file in any published layout.

A LoRA changes a layer's weight by (alpha / rank) up @ down; a DoRA then gives every row of the sum a norm of its own.

    diffusers     unet.PATH or transformer.PATH .lora_A.weight, .lora_B.weight; rank and alpha in the file's metadata
    PEFT          base_model.model.PATH .lora_A.weight; rank and alpha in adapter_config.json beside the file
    kohya         lora_unet_PATH .lora_down.weight, .lora_up.weight, .alpha
    ComfyUI, ai-toolkit   diffusion_model.PATH or transformer.PATH, in diffusers' or the original program's names

Palate's own names are diffusers', without a prefix.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from palate.models import sgm
from palate.models.facts import Facts
from palate.models.original import Lora, row_norms, split
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell, parse_json, write_atomically

FILE = "pytorch_lora_weights.safetensors"
FILES = (FILE, "adapter_model.safetensors")  # diffusers', PEFT's
METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration
PREFIXES = re.compile(
    r"^(?:base_model\.model\.)?(?:transformer\.|unet\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?"
)
OLD = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")  # diffusers, before its layers were PEFT's
KINDS = {  # how a tensor's name ends -> what it is
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",  # diffusers, before PEFT
    "lora.up.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.default.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",  # LyCORIS'
}
TEXT_ENCODERS = re.compile(r"^(?:lora_te\d?_|text_encoder)")
OTHER_METHODS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "diff": "a full difference", "ia3": "IA3"}


# ---------------------------------------------------------------------------------------------------------- files


def find_file(source: Path | str, key: str) -> Path:
    """The LoRA file that `source` means: itself, or the one in a folder, a run or an export. InputError: none."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{key}: {path} is no .safetensors file; convert it where you trust it")
        return path
    for folder in (path, path / "adapter"):
        known = [folder / name for name in FILES if (folder / name).is_file()]
        found = known or sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise InputError(f"{key}: {folder} holds {len(found)} .safetensors files; name one of them")
    if (path / "checkpoints").is_dir():
        raise InputError(f"{key}: the run {path} holds no LoRA yet; `palate export {in_shell(path)}` writes its newest")
    what = "does not exist" if not path.exists() else f"holds no {FILE}"
    raise InputError(f"{key}: {path} {what}; give the file of a LoRA, its folder, or the folder of a run")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A .safetensors file whose bytes depend on its content alone: safetensors writes metadata in any order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + raw[8 + size :])


def peft_config(layers: Mapping[str, Lora], prefix: str = "") -> dict[str, Any]:
    """PEFT's configuration of these layers, sorted, as diffusers looks for it; keys begin with `prefix`."""
    first = next(iter(layers.values()))
    return {
        f"{prefix}r": first.rank,
        f"{prefix}lora_alpha": first.alpha,
        f"{prefix}target_modules": sorted(layers),
        f"{prefix}rank_pattern": {name: lora.rank for name, lora in sorted(layers.items()) if lora.rank != first.rank},
        f"{prefix}alpha_pattern": {
            name: lora.alpha for name, lora in sorted(layers.items()) if lora.alpha != first.alpha
        },
        f"{prefix}use_dora": first.magnitude is not None,
    }


def to_peft(layers: Mapping[str, Lora], prefix: str = "") -> dict[str, Tensor]:
    """Tensors under PEFT's names, each beginning with `prefix`."""
    tensors: dict[str, Tensor] = {}
    for name, lora in layers.items():
        stem = f"{prefix}{name}"
        tensors |= {f"{stem}.lora_A.weight": lora.down, f"{stem}.lora_B.weight": lora.up}
        if lora.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = lora.magnitude
    return tensors


# -------------------------------------------------------------------------------------------------------- reading


def read(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    facts: Facts | None,
    key: str,
    *,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Lora]:
    """Layer -> its LoRA, in diffusers' names. shapes: of the network's weights by layer. key: of the recipe.

    config: the network's, by which diffusers translates names of other programs that Palate does not know. InputError:
    no LoRA, one of another model, of another method, or of text encoders alone.
    """
    tensors, metadata = open_file(path, key)
    own = {name: value for name, value in tensors.items() if not TEXT_ENCODERS.match(name)}
    if tensors and not own:
        raise InputError(f"{key}: {path} is a LoRA of text encoders alone; it has no layer of this network")
    if len(own) < len(tensors):
        _say_left_out(path, key)
    groups, rates = _grouped(own, path, key), Rates(metadata, path)
    if config is not None and isinstance(each := config.get("layers_per_block"), int):
        groups = {sgm.to_diffusers(PREFIXES.sub("", s).replace(".", "_"), each): parts for s, parts in groups.items()}
    layers: dict[str, Lora] = {}
    known = _known(shapes, facts)
    if facts is not None and facts.lora_loader is not None and not all(known(stem) for stem in groups):
        groups = _grouped(_translated(own, facts.lora_loader, config), path, key)
    for stem, parts in groups.items():
        if "down" not in parts or "up" not in parts:
            raise InputError(f"{key}: {path}: {stem} has no {'lora_B' if 'down' in parts else 'lora_A'} beside it")
        name, down, up = PREFIXES.sub("", stem), parts["down"], parts["up"]
        magnitude = row_norms(parts, f"{key}: {path}")
        alpha = float(parts["alpha"]) if "alpha" in parts else rates.alpha(name, down.shape[0])
        layers |= _named(name, Lora(down, up, alpha, magnitude), shapes, facts, f"{key}: {path}")
    if not layers:
        raise InputError(f"{key}: {path} has no layer of this network; expected a LoRA of the same architecture")
    if len({lora.magnitude is None for lora in layers.values()}) > 1:
        raise InputError(f"{key}: {path} is a DoRA in some layers only; one in all of them is needed")
    return layers


@cache
def _say_left_out(path: Path, key: str) -> None:
    """Once for a file, which is read again when the model is there."""
    text = "%s: %s changes text encoders too; that part is left out, so other programs draw otherwise with it"
    logging.getLogger("palate").warning(text, key, path)


def _known(shapes: Mapping[str, Sequence[int]], facts: Facts | None) -> Callable[[str], bool]:
    """Whether a layer's name, as it stands in a file, is one of diffusers' or of the family's original program."""
    flat = {layer.replace(".", "_") for layer in shapes}
    kinds = facts.original if facts is not None else ()
    originals = [re.compile(rf"{kind.original}_\d+_(?:{'|'.join(kind.layers)})") for kind in kinds]

    def known(stem: str) -> bool:
        name = PREFIXES.sub("", stem).replace(".", "_")
        return name in flat or any(pattern.fullmatch(name) for pattern in originals)

    return known


def _translated(tensors: Mapping[str, Tensor], loader: Any, config: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
    """The tensors under diffusers' names, by diffusers' own translation; as they were if it knows none."""
    options = {} if config is None else {"unet_config": SimpleNamespace(**config)}
    try:
        found = loader.lora_state_dict(dict(tensors), **options)
    except (ValueError, KeyError, RuntimeError, IndexError, NotImplementedError, AttributeError):
        return tensors  # diffusers raises any of these on names it does not know; the caller reports such a layer
    state, alphas = (found[0], found[1] or {}) if isinstance(found, tuple) else (found, {})
    if any(name.endswith(".dora_scale") for name in tensors) and not any("dora_scale" in name for name in state):
        return tensors  # diffusers leaves the norms of a DoRA out, which is then another change of the weights
    return {**state, **{name: torch.as_tensor(float(alpha)) for name, alpha in alphas.items()}}


def open_file(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file. InputError: it is cut short, or none."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{key}: {path} is damaged or incomplete ({str(error)[:100]})") from error


def _grouped(tensors: Mapping[str, Tensor], path: Path, key: str) -> dict[str, dict[str, Tensor]]:
    """Layer's name as it stands -> what its tensors are -> tensor."""
    groups: dict[str, dict[str, Tensor]] = {}
    for given, value in tensors.items():
        name = OLD.sub(lambda found: f".{found[1]}{'.0' if found[1] == 'to_out' else ''}.lora.", given)
        end = next((end for end in sorted(KINDS, key=len, reverse=True) if name.endswith(f".{end}")), None)
        if end is None:
            other = next((method for mark, method in OTHER_METHODS.items() if f".{mark}" in name), None)
            what = f"holds {other}" if other else f"holds {given}, which is no part of a LoRA"
            raise InputError(f"{key}: {path} {what}; palate reads LoRA and DoRA")
        groups.setdefault(name.removesuffix(f".{end}"), {})[KINDS[end]] = value
    return groups


class Rates:
    """What a file says of alpha if not by tensors: diffusers' metadata, or PEFT's configuration beside it."""

    def __init__(self, metadata: Mapping[str, str], path: Path):
        beside = path.parent / "adapter_config.json"
        try:
            config = parse_json(metadata.get(METADATA) or (beside.read_text("utf-8") if beside.is_file() else "{}"))
            if not isinstance(config, dict):
                raise ValueError("no mapping")
        except ValueError as error:
            told = path if METADATA in metadata else beside
            raise InputError(f"{told}: what it says of rank and alpha is not JSON of a mapping ({error})") from error
        self.config = {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in config.items()}

    @classmethod
    def of(cls, path: Path) -> Rates:
        """What the file at a path says."""
        with safe_open(path, "pt") as file:
            return cls(file.metadata() or {}, path)

    def alpha(self, layer: str, rank: int) -> float:
        """A layer's alpha; its rank where nothing says more, as all readers take it."""
        own = {PREFIXES.sub("", name): value for name, value in (self.config.get("alpha_pattern") or {}).items()}
        found = own.get(layer)
        if found is None:
            found = next((value for pattern, value in own.items() if _means(pattern, layer)), None)
        alpha = float(self.config.get("lora_alpha") or rank) if found is None else float(found)
        return alpha * rank**0.5 if self.config.get("use_rslora") else alpha  # alpha / sqrt(rank) in place of / rank


def _means(pattern: str, layer: str) -> bool:
    """Whether PEFT takes the pattern, a regular expression, for the layer: for its name, or the end of it after a
    dot."""
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer) is not None
    except re.error:
        return False


def _named(
    name: str, lora: Lora, shapes: Mapping[str, Sequence[int]], facts: Facts | None, where: str
) -> dict[str, Lora]:
    """The layer, or layers where the original program holds several in one, in diffusers' names."""
    flat = {layer.replace(".", "_"): layer for layer in shapes}
    layer = name if name in shapes else flat.get(name.replace(".", "_"))
    found = {layer: lora} if layer else split(name, lora, shapes, facts.original if facts else ())
    if not found:
        raise InputError(f"{where} holds a LoRA of another model; its layer {name} is not one of this network")
    for layer, part in found.items():
        shape = shapes[layer]
        if part.down.shape[1] != shape[1] or part.up.shape[0] != shape[0]:
            got, expected = (part.up.shape[0], part.down.shape[1]), tuple(shape[:2])
            raise InputError(
                f"{where} holds a LoRA of another model; its {layer} is {got[0]} x {got[1]}, "
                f"this one's {expected[0]} x {expected[1]}"
            )
    return found
