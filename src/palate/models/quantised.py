"""Frozen weights in fewer bits, `model.quantize`: the large linear layers of a denoiser and of its text encoders.

    nf4    4 bits, normal-float levels over blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314); bitsandbytes
    int8   8 bits, one scale per row (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339); bitsandbytes
    fp8    torch's float8_e4m3fn as it is, cast back for every product; nothing to install

Only layers inside the repeated blocks are stored so: embeddings, time and output layers are small and sensitive. In
four bits so are some small parts of a family's blocks, its facts' `whole`: what the rest of the network starts from.
A LoRA trains on stored layers as on others, in float32, and the gradient passes through the weights as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palate.runtime.errors import InputError

METHODS = ("nf4", "int8", "fp8")
NF4_BLOCK = 64  # weights that share a scale
BYTES = {"nf4": 0.5 + 0.127 / 8, "int8": 1.0, "fp8": 1.0}  # per weight; nf4's scales are themselves quantised


class Float8Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in float8_e4m3fn and cast to the input's precision for its product."""

    @classmethod
    def of(cls, layer: nn.Linear) -> Float8Linear:
        """The same layer; its weight is rounded, its bias is not."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        made.bias = layer.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def quantisable(network: nn.Module, whole: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers that are stored in fewer bits: those inside the lists of repeated blocks, not a LoRA's own, nor
    what the network's class keeps in full: T5 casts what it hands to `wo` to the type of its weights.

    whole: parts of layers' names, as to_out, that are left out.
    """
    kept = {*whole, "lora_A", "lora_B", *(getattr(network, "_keep_in_fp32_modules", None) or ())}
    found: dict[str, nn.Linear] = {}
    for path, blocks in network.named_modules():
        if isinstance(blocks, nn.ModuleList):
            layers = {f"{path}.{name}": layer for name, layer in blocks.named_modules() if type(layer) is nn.Linear}
            found |= {name: layer for name, layer in layers.items() if not kept & set(name.split("."))}
    return found


def stored_in_fours(network: nn.Module, whole: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """What nf4 stores of `quantisable`: layers whose rows are whole blocks of 64. Published networks have no others,
    and bitsandbytes' kernel for processors (0.50.2) takes another block's scale where a row ends inside one."""
    found = quantisable(network, whole)
    return {name: layer for name, layer in found.items() if layer.in_features % NF4_BLOCK == 0}


def quantise(network: Any, method: str, dtype: torch.dtype, whole: Sequence[str] = ()) -> Any:
    """Put the layers of `quantisable` in their stored form, in place; bitsandbytes rounds when the network is moved.

    whole: of its family's facts, for nf4.
    """
    if method not in METHODS:
        raise InputError(f"model.quantize got {method!r}; expected one of {', '.join(METHODS)}")
    layers = stored_in_fours(network, whole) if method == "nf4" else quantisable(network)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        stored = Float8Linear.of(layer) if method == "fp8" else _of_bitsandbytes(layer, method, dtype)
        setattr(network.get_submodule(parent), child, stored)
    network.is_loaded_in_4bit, network.is_loaded_in_8bit = method == "nf4", method == "int8"  # PEFT asks for these
    return network


def check_installed(method: str | None) -> None:
    """InputError: what stores weights by that method is not installed. Asked before any weight loads."""
    if method in ("nf4", "int8"):
        require_bitsandbytes(f"model.quantize={method}")


def require_bitsandbytes(key: str) -> None:
    """InputError: the setting `key` needs bitsandbytes, and it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{key} needs bitsandbytes: pip install 'palate[bitsandbytes]'")


def _of_bitsandbytes(layer: nn.Linear, method: str, dtype: torch.dtype) -> nn.Linear:
    require_bitsandbytes(f"model.quantize={method}")
    import bitsandbytes

    kinds = bitsandbytes.nn
    sizes = {"input_features": layer.in_features, "output_features": layer.out_features, "bias": layer.bias is not None}
    stored: Any
    with torch.device("meta"):
        if method == "nf4":
            stored = kinds.Linear4bit(**sizes, compute_dtype=dtype, quant_type="nf4")
        else:
            stored = kinds.Linear8bitLt(**sizes, has_fp16_weights=False)
    weight = layer.weight.detach().contiguous()
    if method == "nf4":
        stored.weight = kinds.Params4bit(weight, requires_grad=False, quant_type="nf4", module=stored)
    else:
        stored.weight = kinds.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    stored.bias = layer.bias
    return stored.requires_grad_(False)
