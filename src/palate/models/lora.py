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
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from palate.models.facts import Facts, OriginalBlocks
from palate.runtime.errors import InputError

FILE = "pytorch_lora_weights.safetensors"
FILES = (FILE, "adapter_model.safetensors")  # diffusers', PEFT's
METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration
PREFIXES = re.compile(
    r"^(?:base_model\.model\.)?(?:transformer\.|unet\.|diffusion_model\.|lora_unet_|lora_transformer_)?"
)
KINDS = {  # how a tensor's name ends -> what it is
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_A.default.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.default.weight": "up",
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "magnitude",
}
TEXT_ENCODERS = re.compile(r"^(?:lora_te\d?_|text_encoder)")
OTHER_METHODS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "diff": "a full difference", "ia3": "IA3"}


class Lora(NamedTuple):
    """One layer's change. down (rank, in, ...), up (out, rank, ...), magnitude (out,) of a DoRA."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


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
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


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
    tensors = {}
    for name, lora in layers.items():
        stem = f"{prefix}{name}"
        tensors |= {f"{stem}.lora_A.weight": lora.down, f"{stem}.lora_B.weight": lora.up}
        if lora.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = lora.magnitude
    return tensors


# -------------------------------------------------------------------------------------------------------- reading


def read(path: Path, shapes: Mapping[str, Sequence[int]], facts: Facts, key: str) -> dict[str, Lora]:
    """Layer -> its LoRA, in diffusers' names. shapes: of the network's weights by layer. key: of the recipe.

    InputError: no LoRA, one of another model, of another method, or of text encoders alone.
    """
    tensors, metadata = _open(path, key)
    own = {name: value for name, value in tensors.items() if not TEXT_ENCODERS.match(name)}
    if tensors and not own:
        raise InputError(f"{key}: {path} is a LoRA of text encoders alone; palate trains the {facts.denoiser}")
    groups = _grouped(own, path, key)
    rates = _Rates(metadata, path)
    layers: dict[str, Lora] = {}
    for stem, parts in groups.items():
        if "down" not in parts or "up" not in parts:
            raise InputError(f"{key}: {path}: {stem} has no {'lora_B' if 'down' in parts else 'lora_A'} beside it")
        name, down, up = PREFIXES.sub("", stem), parts["down"], parts["up"]
        magnitude = parts["magnitude"].flatten() if "magnitude" in parts else None
        alpha = float(parts["alpha"]) if "alpha" in parts else rates.alpha(name, down.shape[0])
        layers |= _named(name, Lora(down, up, alpha, magnitude), shapes, facts, f"{key}: {path}")
    if not layers:
        raise InputError(f"{key}: {path} has no layer of this network; expected a LoRA of {facts.name}")
    if len({lora.magnitude is None for lora in layers.values()}) > 1:
        raise InputError(f"{key}: {path} is a DoRA in some layers only; one in all of them is needed")
    return layers


def _open(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{key}: {path} is damaged or incomplete ({str(error)[:100]})") from error


def _grouped(tensors: Mapping[str, Tensor], path: Path, key: str) -> dict[str, dict[str, Tensor]]:
    """Layer's name as it stands -> what its tensors are -> tensor."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        end = next((end for end in sorted(KINDS, key=len, reverse=True) if name.endswith(f".{end}")), None)
        if end is None:
            other = next((method for mark, method in OTHER_METHODS.items() if f".{mark}" in name), None)
            what = f"holds {other}" if other else f"holds {name}, which is no part of a LoRA"
            raise InputError(f"{key}: {path} {what}; palate reads LoRA and DoRA")
        groups.setdefault(name.removesuffix(f".{end}"), {})[KINDS[end]] = value
    return groups


class _Rates:
    """What a file says of alpha if not by tensors: diffusers' metadata, or PEFT's configuration beside it."""

    def __init__(self, metadata: Mapping[str, str], path: Path):
        beside = path.parent / "adapter_config.json"
        try:
            if METADATA in metadata:
                config = json.loads(metadata[METADATA])
            else:
                config = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        except ValueError as error:
            raise InputError(f"{path}: what it says of its rank and alpha is not JSON ({error})") from error
        self.config = {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in config.items()}

    def alpha(self, layer: str, rank: int) -> float:
        """A layer's alpha; its rank where nothing says more, as all readers take it."""
        own = {PREFIXES.sub("", name): value for name, value in (self.config.get("alpha_pattern") or {}).items()}
        found = next((v for end, v in own.items() if layer == end or layer.endswith(f".{end}")), None)
        alpha = float(self.config.get("lora_alpha") or rank) if found is None else float(found)
        return alpha * rank**0.5 if self.config.get("use_rslora") else alpha  # alpha / sqrt(rank) in place of / rank


def _named(name: str, lora: Lora, shapes: Mapping[str, Sequence[int]], facts: Facts, where: str) -> dict[str, Lora]:
    """The layer, or layers where the original program holds several in one, in diffusers' names."""
    flat = {layer.replace(".", "_"): layer for layer in shapes}
    layer = name if name in shapes else flat.get(name.replace(".", "_"))
    found = {layer: lora} if layer else split(name, lora, shapes, facts.original)
    if not found:
        raise InputError(f"{where} holds a LoRA of another model; {facts.name} has no layer {name}")
    for layer, part in found.items():
        shape = shapes[layer]
        if part.down.shape[1] != shape[1] or part.up.shape[0] != shape[0]:
            got, expected = (part.up.shape[0], part.down.shape[1]), tuple(shape[:2])
            raise InputError(
                f"{where} holds a LoRA of another model; its {layer} is {got[0]} x {got[1]}, "
                f"this one's {expected[0]} x {expected[1]}"
            )
    return found


# ------------------------------------------------------------------------------------- names of original programs


def fuse(layers: Mapping[str, Lora], kinds: Sequence[OriginalBlocks]) -> dict[str, Lora]:
    """Layers under the original program's names, BLOCKS_NUMBER_LAYER, which holds some of them in one.

    InputError: a layer that has no name there, or a DoRA of layers that it fuses.
    """
    left, renamed = dict(layers), {}
    for kind in kinds:
        numbers = {name.split(".")[1] for name in layers if name.startswith(f"{kind.blocks}.")}
        for block in sorted(numbers, key=int):
            for new, names in kind.layers.items():
                found = [left.pop(f"{kind.blocks}.{block}.{name}", None) for name in names]
                if any(lora is not None for lora in found):
                    renamed[f"{kind.original}_{block}_{new}"] = _stacked(found, _rows(found, names))
    if left:
        raise InputError(f"--format kohya: {next(iter(left))} has no name in the original program; use comfyui")
    return renamed


def _rows(found: Sequence[Lora | None], names: Sequence[str]) -> list[int]:
    """Rows of each fused part. q, k, v are as wide as the model, its MLP is four times that."""
    known = [(lora.up.shape[0], name) for lora, name in zip(found, names, strict=True) if lora is not None]
    width = max(rows // 4 if name == "proj_mlp" else rows for rows, name in known)
    return [4 * width if name == "proj_mlp" else width for name in names]


def _stacked(parts: Sequence[Lora | None], rows: Sequence[int]) -> Lora:
    """The LoRA of layers stacked by rows: downs stacked, ups on the diagonal, so the ranks add up."""
    present = [lora for lora in parts if lora is not None]
    if len(parts) == 1:
        return present[0]
    if any(lora.magnitude is not None for lora in present):
        raise InputError("--format kohya: a DoRA of layers that the original program holds in one; use comfyui")
    scale = present[0].scale
    alike = all(lora.scale == scale for lora in present)  # then it stays outside: alpha still means what it says
    down = torch.cat([lora.down for lora in present])
    up = down.new_zeros(sum(rows), len(down))
    row = column = 0
    for lora, height in zip(parts, rows, strict=True):
        if lora is not None:
            up[row : row + height, column : column + lora.rank] = lora.up if alike else lora.up * lora.scale
            column += lora.rank
        row += height
    return Lora(down, up, scale * len(down) if alike else float(len(down)))


def split(
    name: str, lora: Lora, shapes: Mapping[str, Sequence[int]], kinds: Sequence[OriginalBlocks]
) -> dict[str, Lora]:
    """The inverse of `fuse` for one layer; {} if the original program has no such name.

    A part of a block-diagonal `up` keeps its own rank only, so what `fuse` wrote comes back as it was.
    """
    for kind in kinds:
        found = re.fullmatch(rf"{kind.original}_(\d+)_(\w+)", name.replace(".", "_"))
        if found is None or found[2] not in kind.layers:
            continue
        layers = [f"{kind.blocks}.{found[1]}.{layer}" for layer in kind.layers[found[2]]]
        if any(layer not in shapes for layer in layers):
            continue
        heights = [shapes[layer][0] for layer in layers]
        if sum(heights) != lora.up.shape[0]:
            return {}
        if len(layers) == 1:
            return {layers[0]: lora}
        ups = lora.up.split(heights)
        used = [(up != 0).flatten(1).any(1) if up.ndim > 2 else (up != 0).any(0) for up in ups]
        alone = sum(int(columns.sum()) for columns in used) <= lora.rank and not bool(
            (torch.stack(used).sum(0) > 1).any()
        )
        magnitudes = [None] * len(layers) if lora.magnitude is None else list(lora.magnitude.split(heights))
        parts = {}
        for layer, up, columns, magnitude in zip(layers, ups, used, magnitudes, strict=True):
            if not alone:
                parts[layer] = Lora(lora.down, up.contiguous(), lora.alpha, magnitude)
            elif columns.any():
                rank = int(columns.sum())
                parts[layer] = Lora(lora.down[columns], up[:, columns].contiguous(), lora.scale * rank, magnitude)
        return parts
    return {}
