"""The LoRA adapters of one network: which layers they are on, and with which of them the network speaks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from palate.models import adapters
from palate.models.original import Lora
from palate.runtime.errors import InputError


def layers_ending(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The linear and convolutional layers whose names end with one of `targets`. InputError: one names no layer."""
    layers = [layer for layer, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    unknown = [end for end in targets if not any(f".{layer}".endswith(f".{end}") for layer in layers)]
    if unknown:
        ends = sorted({layer.rpartition(".")[2] for layer in layers if not layer[-1].isdigit()})
        raise InputError(
            f"model.lora_targets: no layer's name ends with {', '.join(unknown)}; ends that are "
            f"there: {', '.join(ends)}"
        )
    return [layer for layer in layers if any(f".{layer}".endswith(f".{end}") for end in targets)]


class Adapters:
    """Those of one network, by name, of which one or none is selected.

    PEFT flips requires_grad in all of them when it selects one; here every flag stays as it was.
    """

    def __init__(self, network: Any):
        self.network = network
        self.selected = "policy"
        self.reference: str | None = None  # the adapter that the reference has; None = none
        self.companion: str | None = None  # one that joins policy and reference inside `while_training`
        self._training = False
        self._alone: set[str] = set()  # frozen adapters that nothing joins
        self._parameters: list[nn.Parameter] = []

    def put_on(self, names: Sequence[str], targets: Sequence[str], *, rank: int, alpha: float | None) -> None:
        """One adapter per name on the layers that end with one of `targets`; alpha None = rank."""
        if rank < 1:
            raise InputError(f"lora_rank got {rank}; expected at least 1")
        scale: Any = rank if alpha is None else alpha  # PEFT's type says int, its code takes any number
        config = LoraConfig(r=rank, lora_alpha=scale, target_modules=layers_ending(self.network, targets))
        for name in names:
            adapters.add(self.network, name, copy.deepcopy(config))

    def train(self, parameters: list[nn.Parameter]) -> None:
        """These parameters, all that the adapters have, train from now on; "policy" is selected."""
        self._parameters = parameters
        self.select("policy")
        for p in parameters:
            p.requires_grad_(True)

    def select(self, weights: str) -> None:
        """The network speaks as that name; as "reference" with every adapter off, or with the reference's own."""
        flags = [p.requires_grad for p in self._parameters]
        chosen = self.reference if weights == "reference" else weights
        joined = self.companion if self._training and weights not in self._alone else None
        active = [name for name in (chosen, joined) if name is not None]
        if not active:
            self.network.disable_adapters()
        else:
            self.network.enable_adapters()
            self.network.set_adapter(active)
        self.selected = weights
        for p, flag in zip(self._parameters, flags, strict=True):
            p.requires_grad_(flag)

    def add_frozen(self, name: str, layers: Mapping[str, Lora], key: str) -> None:
        """A frozen adapter beside those that train, whose flags stay as they are."""
        flags = [p.requires_grad for p in self._parameters]
        adapters.add(self.network, name, adapters.config_of(layers))
        adapters.fill(self.network, name, layers, key)
        for p, flag in zip(self._parameters, flags, strict=True):
            p.requires_grad_(flag)
        added = adapters.own_parameters(self.network, name, adapter=True).values()
        for p in added:
            p.requires_grad_(False)
        self._parameters += added
        self._alone.add(name)
        self.select(self.selected)

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Inside, the companion is active beside the policy, every other name that trains, and the reference."""
        if self.companion is None:
            yield
            return
        self._training = True
        self.select(self.selected)
        try:
            yield
        finally:
            self._training = False
            self.select(self.selected)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Inside, the policy's change of the weights counts so many times. InputError: there is none (full training).

        A DoRA's change is no multiple of its scale, at 0 neither, so what it adds to a layer's output is multiplied.
        """
        layers = adapters.adapted(self.network, "policy").values()
        if not layers:
            raise InputError("--strength: there is no LoRA here (a base model, or model.weights=full); leave it out")
        before = [layer.scaling["policy"] for layer in layers]
        hooks = []
        try:
            for layer, scale in zip(layers, before, strict=True):
                if "policy" not in layer.lora_magnitude_vector:
                    layer.scaling["policy"] = strength * scale
                elif strength != 1:
                    hooks.append(layer.register_forward_hook(_scaled(strength), with_kwargs=True))
            yield
        finally:
            for layer, scale in zip(layers, before, strict=True):
                layer.scaling["policy"] = scale
            for hook in hooks:
                hook.remove()

    def redraw(self, names: Sequence[str], seed: int) -> None:
        """The adapters of `names` as PEFT first draws them, from `seed`."""
        layers: list[Any] = [part for part in self.network.modules() if isinstance(part, BaseTunerLayer)]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in layers:
                for name in names:
                    layer.reset_lora_parameters(name, True)


def _scaled(strength: float) -> Callable[..., Any]:
    """A forward hook: what "policy" adds to the layer's output, so many times."""

    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if layer.active_adapters != ["policy"]:
            return output
        base: Tensor = layer.base_layer(*args, **kwargs)
        return base + strength * (output - base)

    return hook
