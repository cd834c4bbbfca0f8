"""PEFT adapters on a network, put on from a LoRA's layers and read back as them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from palate.models.original import Lora
from palate.models.placement import bring_adapters
from palate.runtime.errors import InputError


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Layer -> the shape of its weight, of every layer that a LoRA can adapt, also one that is adapted already."""
    return {
        name.removesuffix(".base_layer"): (
            module.out_features,
            module.in_features,
        )  # a stored weight's shape is another
        if isinstance(module, nn.Linear)
        else tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def own_parameters(network: nn.Module, name: str, *, adapter: bool) -> dict[str, nn.Parameter]:
    """The parameters of the adapter `name`; without adapters all of the network's."""
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    mark = tuple(f".{part}.{name}." for part in parts) if adapter else ("",)
    return {key: p for key, p in network.named_parameters() if any(m in key for m in mark)}


def common(layers: Mapping[str, Lora]) -> tuple[int, float]:
    """The rank and the alpha that most layers have."""
    return (
        Counter(lora.rank for lora in layers.values()).most_common(1)[0][0],
        Counter(lora.alpha for lora in layers.values()).most_common(1)[0][0],
    )


def add(network: Any, name: str, config: LoraConfig) -> None:
    """One more adapter; PEFT's warning that there are several is not passed on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        network.add_adapter(config, adapter_name=name)
    own = own_parameters(network, name, adapter=True).values()
    for p in own:
        if p.dtype.itemsize == 1:  # PEFT gives it the precision of the layer, which may be stored in eight bits
            p.data = p.data.float()
    bring_adapters(network, own)


def config_of(layers: Mapping[str, Lora]) -> LoraConfig:
    """The configuration of an adapter that has exactly these layers, each with its rank and alpha."""
    rank, alpha = common(layers)
    scale: Any = alpha  # PEFT's type says int, its code takes any number
    return LoraConfig(
        r=rank,
        lora_alpha=scale,
        target_modules=sorted(layers),
        rank_pattern={name: lora.rank for name, lora in layers.items() if lora.rank != rank},
        alpha_pattern={name: lora.alpha for name, lora in layers.items() if lora.alpha != alpha},
        use_dora=any(lora.magnitude is not None for lora in layers.values()),
    )


def fill(network: nn.Module, name: str, layers: Mapping[str, Lora], where: str) -> None:
    """Give the adapter of that name the layers' weights. InputError: it does not have exactly these layers."""
    found = adapted(network, name)
    if found.keys() != layers.keys():
        odd = sorted(found.keys() ^ layers.keys())[0]
        raise InputError(f"{where}: the layer {odd} cannot be told apart by PEFT; the LoRA cannot be put on")
    with torch.no_grad():
        for layer, module in found.items():
            lora = layers[layer]
            module.lora_A[name].weight.copy_(lora.down.view_as(module.lora_A[name].weight))
            module.lora_B[name].weight.copy_(lora.up.view_as(module.lora_B[name].weight))
            if lora.magnitude is not None:
                vector = module.lora_magnitude_vector[name].weight
                vector.copy_(lora.magnitude.view_as(vector))


def layers_of(network: nn.Module, name: str) -> dict[str, Lora]:
    """The layers of the adapter of that name, as they are now."""
    return {
        layer: Lora(
            module.lora_A[name].weight.detach(),
            module.lora_B[name].weight.detach(),
            float(module.lora_alpha[name]),
            _magnitude(module, name),
        )
        for layer, module in adapted(network, name).items()
    }


def adapted(network: nn.Module, name: str) -> dict[str, Any]:
    """Layer -> the PEFT module that carries the adapter of that name."""
    return {
        layer: module
        for layer, module in network.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def _magnitude(module: Any, name: str) -> Tensor | None:
    if name not in module.lora_magnitude_vector:
        return None
    return module.lora_magnitude_vector[name].weight.detach().flatten()
