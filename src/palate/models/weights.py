"""Named weights: one diffusers network that can speak as what is trained ("policy", and any other name) or as what it
was ("reference").

LoRA (peft through diffusers): one adapter a name on one frozen network, and the reference is that network with every
adapter off. Full training: one copy of the network a name, beside a frozen one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from palate.models import adapters, lora
from palate.models.facts import Facts
from palate.models.original import Lora
from palate.models.saved import check_alpha, check_mergeable, check_rates, config_of, read_saved, write_saved
from palate.models.selection import Adapters
from palate.runtime.errors import InputError

STARTED = "start"  # the frozen copy of model.start that the reference is with model.reference=start


class NamedWeights:
    """A network under the names of `names`, all equal at the start, and under "reference".

    training: "lora" adds an adapter of `rank` to `targets` for each name; "full" trains every parameter of a copy for
    each name; "none" trains nothing: all names are the same frozen network. `names` holds "policy".
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        training: str,
        rank: int,
        alpha: float | None,
        targets: Sequence[str],
        names: Sequence[str] = ("policy",),
        facts: Facts | None = None,
    ):
        _check_names(training, names)
        self.training, self.names, self.facts = training, tuple(names), facts
        self._began: Path | None = None  # the file of `begin`
        network.requires_grad_(False)
        self.network: Any = network  # the policy's; with LoRA everyone's; diffusers' classes have no types
        self.networks: dict[str, Any] = dict.fromkeys((*self.names, "reference"), network)
        self._frozen: set[str] = set()
        self.selection = Adapters(network)
        if training == "full":
            self.networks |= {name: copy.deepcopy(network) for name in self.networks if name != "policy"}
            for name in self.names:
                self.networks[name].requires_grad_(True)
        if training == "lora":
            self.selection.put_on(self.names, targets, rank=rank, alpha=alpha)
            self._take_up()

    def _take_up(self) -> None:
        """The adapters of `names` train, and no other parameter."""
        self.selection.train([p for name in self.names for p in self._own(name).values()])

    def parameters(self, name: str = "policy") -> list[nn.Parameter]:
        """The trainable parameters of that name, in a fixed order; none for "reference" and other frozen names."""
        return list(self._own(name).values())

    def reset(self, seed: int = 0) -> None:
        """Untrained again: LoRA matrices as peft first draws them (from `seed`), copies as the reference is.

        InputError: the weights began with a file (`begin`); load the model again.
        """
        if self._began:
            raise InputError(f"the weights began with {self._began}; load the model again instead of resetting it")
        if self.training == "full":
            for name in self.names:
                self.networks[name].load_state_dict(self.networks["reference"].state_dict())
        if self.training == "lora":
            self.selection.redraw(self.names, seed)

    def begin(
        self, source: Path | str, *, rank: int, alpha: float | None, reference: str = "base", key: str = "model.start"
    ) -> None:
        """Have the policy begin with a LoRA, in any layout of `models.lora`; its layers, rank and alpha are the file's.

        Every name's adapter gets that form, the policy's its weights. rank, alpha: the recipe's; InputError where the
        file has others (alpha None = the file's). reference: "base", or "start" = the base with the LoRA, frozen.
        """
        if self.training != "lora":
            raise InputError(f"{key}: a LoRA can be the start of a LoRA only; set model.weights=lora")
        path = lora.find_file(source, key)
        self._began = path
        layers = lora.read(path, adapters.shapes_of(self.network), self.facts, key, config=config_of(self.network))
        check_rates(layers, path, rank, alpha, key)
        self.network.delete_adapters(list(self.names))
        for name in self.names:
            adapters.add(self.network, name, adapters.config_of(layers))
        adapters.fill(self.network, "policy", layers, key)
        for p in (p for name in self.names for p in self._own(name).values()):
            p.data = p.data.float()
        self._take_up()
        if reference == "start":
            self._add(STARTED, layers, key)
            self.selection.reference = STARTED

    def draw_first_factor(self) -> None:
        """Draw the first factor of every LoRA anew from N(0, 1/rank^2), in place of PEFT's uniform numbers; the second
        stays 0, so that every name still says what the reference says. From torch's own generator."""
        if self.training != "lora":
            raise InputError("model.lora_init: there is no LoRA with model.weights=full; leave it out")
        with torch.no_grad():
            for key, p in (pair for name in self.names for pair in self._own(name).items()):
                if ".lora_A." in key:
                    p.normal_(std=1 / p.shape[0])

    def add_frozen(self, source: Path | str, name: str = "consistency", key: str = "model.consistency") -> None:
        """One more name, which never trains: the reference with a LoRA, of any rank, in any layout of `models.lora`.

        InputError if it does not fit.
        """
        if name in self.networks:
            raise InputError(f"weights {name!r} are there already; expected a new name")
        path = lora.find_file(source, key)
        network = self.network if self.training == "lora" else self._copied("reference")
        layers = lora.read(path, adapters.shapes_of(network), self.facts, key, config=config_of(self.network))
        if self.training == "lora":
            self._add(name, layers, key)
        else:
            adapters.add(network, name, adapters.config_of(layers))
            adapters.fill(network, name, layers, key)
            self.networks[name] = network.requires_grad_(False)
            self._frozen.add(name)

    def _add(self, name: str, layers: Mapping[str, Lora], key: str) -> None:
        """A frozen adapter beside those that train, whose flags stay as they are."""
        self.selection.add_frozen(name, layers, key)
        self.networks[name] = self.network
        self._frozen.add(name)

    def _copied(self, name: str) -> Any:
        """A copy of a network. Its checkpointing function refers to this object, which is not copied with it."""
        return copy.deepcopy(self.networks[name], {id(self): self})

    @contextmanager
    def using(self, weights: str) -> Iterator[nn.Module]:
        """The network that answers to the name.

        Selecting a LoRA adapter, or none, also flips requires_grad in all of them, and a backward that runs then skips
        the flipped ones in silence. So every flag stays as it was, inside as well, and the selection of before
        ("policy") is restored on the way out, whatever happens inside.
        """
        self._known(weights)
        before = self.selection.selected
        if self.training != "lora" or weights == before:
            yield self.networks[weights]
            return
        try:
            self.selection.select(weights)
            yield self.network
        finally:
            self.selection.select(before)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, block by block, under the weights that made them.

        diffusers' own function would recompute under whichever adapter is selected when backward runs.
        """
        for network in {id(network): network for network in self.networks.values()}.values():
            network.enable_gradient_checkpointing(self._checkpointed)

    def merged(self, name: str = "policy") -> Any:
        """A plain network of its own that says what the name says, its adapter added to the weights."""
        check_mergeable(self.network)
        network = self._copied(name)
        if self.training == "lora" and name != "reference":
            network.fuse_lora(adapter_names=[name])
        if self.training == "lora":
            network.unload_lora()
        return network.requires_grad_(False)

    def save(self, folder: Path | str, name: str = "policy") -> None:
        """What was trained under that name: a diffusers LoRA file, or with full training a diffusers network folder."""
        write_saved(folder, name, self.networks[name], training=self.training)

    def load(self, folder: Path | str, name: str = "policy") -> None:
        """Read back what `save` wrote, into weights of the same training mode and rank; ValueError if not.

        With full training also a difference from the reference (`delta`).
        """
        own = self._own(name)
        saved = read_saved(folder, name, own, training=self.training, reference=self.networks["reference"])
        if self.training == "lora":
            check_alpha(self.network, name, folder)
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(saved[key])

    def save_all(self, folder: Path | str) -> None:
        """`save` of the policy into the folder, of each other name into a folder of that name in it."""
        for name in self.names:
            self.save(folder if name == "policy" else Path(folder) / name, name)

    def load_all(self, folder: Path | str) -> None:
        """Read back what `save_all` wrote."""
        for name in self.names:
            self.load(folder if name == "policy" else Path(folder) / name, name)

    def _known(self, weights: str) -> None:
        if weights not in self.networks:
            raise InputError(f"weights got {weights!r}; expected one of {', '.join(self.networks)}")

    def _own(self, name: str) -> dict[str, nn.Parameter]:
        self._known(name)
        if name == "reference" or name in self._frozen or self.training == "none":
            return {}
        return adapters.own_parameters(self.networks[name], name, adapter=self.training == "lora")

    def _checkpointed(self, function: Any, *args: Any) -> Any:
        weights = self.selection.selected

        def run(*args: Any) -> Any:
            with self.using(weights):
                return function(*args)

        return checkpoint(run, *args, use_reentrant=False)


def _check_names(training: str, names: Sequence[str]) -> None:
    if training not in ("lora", "full", "none"):
        raise InputError(f"training got {training!r}; expected lora, full or none")
    if isinstance(names, str) or len(set(names)) < len(names) or "policy" not in names or "reference" in names:
        raise InputError(f"names got {names!r}; expected different names, 'policy' one of them, 'reference' none")
