"""Named weights: one diffusers network that can speak as what is trained ("policy", and any other name) or as what it
was ("reference").

LoRA (peft through diffusers): one adapter a name on one frozen network, and the reference is that network with every
adapter off. Full training: one copy of the network a name, beside a frozen one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from palate.models import delta
from palate.runtime.errors import InputError

FILES = {"lora": ("pytorch_lora_weights.safetensors",), "full": ("diffusion_pytorch_model.safetensors", delta.FILE)}


def adapter_file(folder: Path | str, training: str) -> Path:
    """What `NamedWeights.load` reads in `folder`; ValueError if it is not there."""
    for name in FILES[training]:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    other = "full" if training == "lora" else "lora"
    there = next((name for name in FILES[other] if (Path(folder) / name).is_file()), None)
    remedy = f"; it holds {there}: set model.weights={other}" if there else ""
    raise InputError(f"no {FILES[training][0]} in {folder}; expected the adapter folder of a {training} run{remedy}")


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
    ):
        if training not in ("lora", "full", "none"):
            raise InputError(f"training got {training!r}; expected lora, full or none")
        if isinstance(names, str) or len(set(names)) < len(names) or "policy" not in names or "reference" in names:
            raise InputError(f"names got {names!r}; expected different names, 'policy' one of them, 'reference' none")
        self.training, self.names = training, tuple(names)
        network.requires_grad_(False)
        self.network = network  # the policy's; with LoRA everyone's
        self.networks = dict.fromkeys((*self.names, "reference"), network)
        self._frozen: set[str] = set()
        self._speaking = "policy"
        self._adapters: list[nn.Parameter] = []
        if training == "full":
            self.networks |= {name: copy.deepcopy(network) for name in self.networks if name != "policy"}
            for name in self.names:
                self.networks[name].requires_grad_(True)
        if training == "lora":
            if rank < 1:
                raise InputError(f"lora_rank got {rank}; expected at least 1")
            layers = [layer for layer, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
            unknown = [end for end in targets if not any(f".{layer}".endswith(f".{end}") for layer in layers)]
            if unknown:
                ends = sorted({layer.rpartition(".")[2] for layer in layers if not layer[-1].isdigit()})
                raise InputError(
                    f"model.lora_targets: no layer's name ends with {', '.join(unknown)}; ends that are "
                    f"there: {', '.join(ends)}"
                )
            config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
            for name in self.names:
                with warnings.catch_warnings():  # peft warns at a second adapter
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                    network.add_adapter(copy.deepcopy(config), adapter_name=name)
            self._adapters = [p for name in self.names for p in self._own(name).values()]
            self._select("policy")
            for p in self._adapters:
                p.requires_grad_(True)

    def parameters(self, name: str = "policy") -> list[nn.Parameter]:
        """The trainable parameters of that name, in a fixed order; none for "reference" and other frozen names."""
        return list(self._own(name).values())

    def add_frozen(self, folder: Path | str, name: str = "consistency") -> None:
        """One more name, which never trains: the reference with a LoRA, folder/pytorch_lora_weights.safetensors.

        Of any rank, in diffusers' or in kohya's form (in which LCM-LoRAs are published). ValueError if it does not fit.
        """
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        if name in self.networks:
            raise InputError(f"weights {name!r} are there already; expected a new name")
        if not path.is_file():
            raise InputError(f"no {path.name} in {folder}; expected the folder of a LoRA")
        network = self.network if self.training == "lora" else copy.deepcopy(self.networks["reference"])
        flags = [p.requires_grad for p in self._adapters]
        lora: Any = load_file(path)
        form: dict[str, Any] = {"prefix": "unet" if any(key.startswith("unet.") for key in lora) else None}
        if any(key.startswith("lora_unet_") for key in lora):
            lora, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(lora, unet_config=network.config)
            form = {"prefix": "unet", "network_alphas": alphas}
        else:
            lora = str(path.parent)  # read again by diffusers, with the file's own record of rank and alpha
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
                network.load_lora_adapter(lora, adapter_name=name, weight_name=path.name, local_files_only=True, **form)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"the LoRA {path} does not fit this network: {str(error).splitlines()[0]}") from error
        finally:
            for p, flag in zip(self._adapters, flags, strict=True):
                p.requires_grad_(flag)
        if name not in getattr(network, "peft_config", {}):
            raise InputError(f"the LoRA {path} has no layer of this network; expected one of the same architecture")
        self.networks[name] = network
        self._frozen.add(name)
        added = [p for key, p in network.named_parameters() if f".{name}." in key]
        for p in added:
            p.requires_grad_(False)
        if self.training == "lora":
            self._adapters += added
            self._select(self._speaking)

    @contextmanager
    def speaking_as(self, weights: str) -> Iterator[nn.Module]:
        """The network that answers to the name.

        Selecting a LoRA adapter, or none, also flips requires_grad in all of them, and a backward that runs then skips
        the flipped ones in silence. So every flag stays as it was, inside as well, and the selection of before
        ("policy") is restored on the way out, whatever happens inside.
        """
        self._known(weights)
        before = self._speaking
        if self.training != "lora" or weights == before:
            yield self.networks[weights]
            return
        try:
            self._select(weights)
            yield self.network
        finally:
            self._select(before)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, block by block, under the weights that made them.

        diffusers' own function would recompute under whichever adapter is selected when backward runs.
        """
        for network in self._distinct():
            network.enable_gradient_checkpointing(self._checkpointed)

    def merged(self, name: str = "policy") -> nn.Module:
        """A plain network of its own that says what the name says, its adapter added to the weights."""
        network = copy.deepcopy(self.networks[name])
        if self.training == "lora" and name != "reference":
            network.fuse_lora(adapter_names=[name])
        if self.training == "lora":
            network.unload_lora()
        return network.requires_grad_(False)

    def save(self, folder: Path | str, name: str = "policy") -> None:
        """What was trained under that name: a diffusers LoRA file, or with full training a diffusers network folder."""
        if self.training == "lora":
            self.network.save_lora_adapter(folder, adapter_name=name)
        else:
            self.networks[name].save_pretrained(folder, max_shard_size="1000GB")  # one file, which `load` reads

    def load(self, folder: Path | str, name: str = "policy") -> None:
        """Read back what `save` wrote, into weights of the same training mode and rank; ValueError if not.

        With full training also a difference from the reference (`delta`).
        """
        lora = self.training == "lora"
        path = adapter_file(folder, "lora" if lora else "full")
        own = self._own(name)
        packed = path.name == delta.FILE
        saved = delta.load(Path(folder), self.networks["reference"].state_dict()) if packed else load_file(path)
        if lora:
            saved = {
                key.replace(".lora_A.", f".lora_A.{name}.").replace(".lora_B.", f".lora_B.{name}."): tensor
                for key, tensor in saved.items()
            }
        if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in saved.items()}:
            ranks, its = ({len(t) for n, t in state.items() if ".lora_A." in n} for state in (own, saved))
            remedy = f"; set model.lora_rank={min(its)}" if len(its) == 1 and its != ranks else ""
            raise InputError(
                f"the adapter in {folder} does not fit this model: another rank, target or architecture{remedy}"
            )
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
        mark = (f".lora_A.{name}.", f".lora_B.{name}.") if self.training == "lora" else ("",)
        return {key: p for key, p in self.networks[name].named_parameters() if any(m in key for m in mark)}

    def _select(self, weights: str) -> None:
        flags = [p.requires_grad for p in self._adapters]
        if weights == "reference":
            self.network.disable_adapters()
        else:
            self.network.enable_adapters()
            self.network.set_adapter(weights)
        self._speaking = weights
        for p, flag in zip(self._adapters, flags, strict=True):
            p.requires_grad_(flag)

    def _checkpointed(self, function: Any, *args: Any) -> Any:
        weights = self._speaking

        def run(*args: Any) -> Any:
            with self.speaking_as(weights):
                return function(*args)

        return checkpoint(run, *args, use_reentrant=False)

    def _distinct(self) -> list[nn.Module]:
        return list({id(network): network for network in self.networks.values()}.values())
