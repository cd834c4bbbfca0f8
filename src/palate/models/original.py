"""Layers under the names of a family's original program, which holds some of them in one, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palate.models.facts import OriginalBlocks
from palate.runtime.errors import InputError


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

    def change(self, weight: Tensor) -> Tensor:
        """What is added to a layer's weight (out, in, ...), in float32: d = (alpha / r) up @ down; of a DoRA
        m (W + d) / |W + d| - W with the norm of each row (Liu et al. 2024, arXiv 2402.09353, eq. 5), so it is no
        multiple of alpha, and two of them add up as changes of one weight only."""
        base = weight.detach().float()
        added = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).view(base.shape)
        if self.magnitude is None:
            return added
        rows = (base + added).flatten(1)
        scaled = rows * (self.magnitude.float().flatten() / rows.norm(dim=1))[:, None]
        return scaled.view(base.shape) - base


def row_norms(parts: Mapping[str, Tensor], where: str) -> Tensor | None:
    """The norms (out,) of a DoRA among a layer's tensors; None of a LoRA. InputError: LyCORIS can write norms of the
    inputs, (1, in, ...), which is another method."""
    scale = parts.get("dora_scale")
    if scale is not None and scale.shape[0] != parts["up"].shape[0]:
        raise InputError(f"{where} is a DoRA with norms of inputs; palate reads one with norms of outputs")
    norms = parts.get("magnitude", scale)
    return None if norms is None else norms.flatten()


def fuse(layers: Mapping[str, Lora], kinds: Sequence[OriginalBlocks]) -> dict[str, Lora]:
    """Layers under the original program's names, BLOCKS_NUMBER_LAYER, which holds some of them in one.

    InputError: a layer that has no name there.
    """
    left, renamed = dict(layers), {}
    for kind in kinds:
        start = f"{kind.blocks}."
        numbers = {name.removeprefix(start).split(".")[0] for name in layers if name.startswith(start)}
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

    A part of a block-diagonal `up` keeps its own rank only, so what `fuse` wrote comes back as it was, a part that is
    not trained yet too.
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
        if lora.magnitude is not None and not all(bool(columns.any()) for columns in used):
            alone = False  # a DoRA's norms count without its columns
        untrained = _untrained(used)
        parts = {}
        for layer, up, columns, magnitude in zip(layers, ups, used, magnitudes, strict=True):
            own = columns.nonzero().flatten() if columns.any() else untrained.pop(0)
            if not alone:
                parts[layer] = Lora(lora.down, up.contiguous(), lora.alpha, magnitude)
            elif len(own):
                parts[layer] = Lora(lora.down[own], up[:, own].contiguous(), lora.scale * len(own), magnitude)
        return parts
    return {}


def _untrained(used: Sequence[Tensor]) -> list[Tensor]:
    """For each part whose up is zero, those of the columns that no part uses which are its own: in order, as many for
    each, as `fuse` stacks them; all of them where they cannot be shared out."""
    idle, parts = (~torch.stack(list(used)).any(0)).nonzero().flatten(), sum(not bool(each.any()) for each in used)
    if parts == 0 or len(idle) == 0 or len(idle) % parts:
        return [idle] * parts
    return list(idle.chunk(parts))
