"""Named weights: one diffusers network that can speak as "policy" (what is trained) or "reference" (what it was).

LoRA (peft through diffusers): the policy is an adapter, the reference is the network with the adapter off. Full training:
the reference is a frozen copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig
from torch import nn

ADAPTER = "policy"


class NamedWeights:
    """A network under the names "policy" and "reference".

    training: "lora" adds an adapter of `rank` to `targets`; "full" trains every parameter beside a frozen copy; "none"
    has no policy of its own: both names are the same frozen network.
    """

    def __init__(self, network: nn.Module, *, training: str, rank: int, alpha: float | None, targets: Sequence[str]):
        if training not in ("lora", "full", "none"):
            raise ValueError(f"training got {training!r}; expected lora, full or none")
        self.network, self.training = network, training
        network.requires_grad_(False)
        self._reference = network
        if training == "full":
            self._reference = copy.deepcopy(network)
            network.requires_grad_(True)
        if training == "lora":
            if rank < 1:
                raise ValueError(f"lora_rank got {rank}; expected at least 1")
            config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
            network.add_adapter(config, adapter_name=ADAPTER)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The policy's trainable parameters, in a fixed order."""
        return [p for p in self.network.parameters() if p.requires_grad]

    @contextmanager
    def speaking_as(self, weights: str) -> Iterator[nn.Module]:
        """The network that answers to the name.

        Switching a LoRA adapter off also takes requires_grad from its parameters, and a backward that runs then skips
        them in silence; so "policy" is restored on the way out, whatever happens inside.
        """
        if weights not in ("policy", "reference"):
            raise ValueError(f"weights got {weights!r}; expected policy or reference")
        if weights == "policy" or self.training == "none":
            yield self.network
        elif self.training == "full":
            yield self._reference
        else:
            self.network.disable_adapters()
            try:
                yield self.network
            finally:
                self.network.enable_adapters()
