"""Several LoRAs of one network added up into one: the cheap rival of distilling their tastes into one model.

The change of a layer is W -> W + (alpha / r) up @ down. A weighted sum of such changes is again one, of the ranks' sum:
    down = [down_1; down_2; ...],   up = [w_1 (alpha_1 / r_1) up_1, w_2 (alpha_2 / r_2) up_2, ...],   alpha = r
exact, where averaging the factors themselves would mix each adapter's up with the other's down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from palate.models import lora
from palate.models.adapters import common
from palate.models.original import Lora
from palate.runtime.errors import InputError

MERGED = "palate.merged"  # of a file's metadata: the weights of a sum


def merged(adapters: Sequence[Mapping[str, Lora]], weights: Sequence[float]) -> dict[str, Lora]:
    """Layer -> the weighted sum of the adapters' changes. A layer that an adapter lacks is not changed by it.

    InputError for a DoRA, whose change is no sum.
    """
    if len(adapters) != len(weights) or not adapters:
        raise InputError(f"merging {len(adapters)} adapters takes as many weights, got {len(weights)}")
    layers: dict[str, Lora] = {}
    for name in sorted(set().union(*adapters)):
        parts = [(adapter[name], weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter]
        if any(part.magnitude is not None for part, _ in parts):
            raise InputError("a DoRA cannot be added to another adapter; merge LoRAs")
        down = torch.cat([part.down.float() for part, _ in parts])  # a weight times a half-precision factor rounds
        up = torch.cat([weight * part.scale * part.up.float() for part, weight in parts], 1)
        layers[name] = Lora(down, up, float(down.shape[0]))
    return layers


def merge_adapters(sources: Sequence[Path | str], weights: Sequence[float], out: Path | str) -> int:
    """Write the merged LoRA of adapter folders (or runs, or files) into the folder `out`; the rank that most of
    its layers have, which is what model.start asks for.

    It is read as any adapter of a run: model.start=OUT, or a teacher. InputError for what is no LoRA in PEFT's names,
    and where the adapters have no layer in common.
    """
    if not all(map(math.isfinite, weights)):
        raise InputError(f"merge: expected finite weights, got {', '.join(f'{weight:g}' for weight in weights)}")
    _check_free(Path(out))
    paths = [lora.find_file(source, "merge") for source in sources]
    adapters = [lora.read(path, shapes_in(path), None, "merge") for path in paths]
    for path, adapter in zip(paths[1:], adapters[1:], strict=True):
        if not adapter.keys() & adapters[0].keys():
            raise InputError(f"merge: {path} has no layer in common with {paths[0]}; they are of different networks")
    layers = merged(adapters, weights)
    record = json.dumps(lora.peft_config(layers), indent=2, sort_keys=True)
    metadata = {"format": "pt", lora.METADATA: record, MERGED: " ".join(f"{weight:g}" for weight in weights)}
    lora.write(Path(out) / lora.FILE, lora.to_peft(layers), metadata)
    return common(lora.read(Path(out) / lora.FILE, shapes_in(Path(out) / lora.FILE), None, "merge"))[0]


def _check_free(out: Path) -> None:
    """InputError: the folder holds a LoRA that was not merged here, which would be written over."""
    if (out / lora.FILE).is_file() and MERGED not in lora.open_file(out / lora.FILE, "--out")[1]:
        raise InputError(f"--out: {out} holds a LoRA that would be written over; name a folder of its own")


def shapes_in(path: Path) -> dict[str, tuple[int, int]]:
    """Layer -> (out, in) of the weights that a LoRA file in PEFT's names changes."""
    tensors, _ = lora.open_file(path, "merge")
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {lora.PREFIXES.sub("", key.removesuffix(ends[0])): key for key in tensors if key.endswith(ends[0])}
    if not names:
        raise InputError(f"merge: {path} has no lora_A; palate merge reads adapters of runs and PEFT's own files")
    found = {}
    for name, key in names.items():
        other = tensors.get(key.removesuffix(ends[0]) + ends[1])
        if other is None:
            raise InputError(f"merge: {path}: {name} has no lora_B beside it")
        found[name] = (other.shape[0], tensors[key].shape[1])
    return found
