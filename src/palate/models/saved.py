"""What named weights leave on disk: which file it is, and whether it fits the network that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from palate.models import adapters, delta, lora
from palate.models.original import Lora
from palate.models.placement import waits_on_host
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically
from palate.runtime.tensors import writing_tensors

FILES = {"lora": (lora.FILE,), "full": ("diffusion_pytorch_model.safetensors", delta.FILE)}
STORED = ("Linear4bit", "Linear8bitLt", "Float8Linear")  # layers of models.quantised


def adapter_file(folder: Path | str, training: str) -> Path:
    """What `NamedWeights.load` reads in `folder`; ValueError if it is not there."""
    for name in FILES[training]:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    other = "full" if training == "lora" else "lora"
    there = next((name for name in FILES[other] if (Path(folder) / name).is_file()), None)
    remedy = f"; it holds {there}: set model.weights={other}" if there else ""
    raise InputError(f"no {FILES[training][0]} in {folder}; expected the adapter folder of a {training} run{remedy}")


def read_saved(
    folder: Path | str, name: str, own: Mapping[str, nn.Parameter], *, training: str, reference: nn.Module
) -> dict[str, Tensor]:
    """The saved tensors of the weights `name`, by the names of its parameters `own`. InputError: they do not fit.

    reference: what a difference (`delta`) of full training is added to.
    """
    path = adapter_file(folder, training)
    packed = path.name == delta.FILE
    saved = delta.load(Path(folder), reference.state_dict()) if packed else lora.open_file(path, "adapter")[0]
    if training == "lora":
        saved = {_named(key, name): tensor for key, tensor in saved.items()}
    if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in saved.items()}:
        ranks, its = ({len(t) for n, t in state.items() if ".lora_A." in n} for state in (own, saved))
        remedy = f"; set model.lora_rank={min(its)}" if len(its) == 1 and its != ranks else ""
        raise InputError(
            f"the adapter in {folder} does not fit this model: another rank, target or architecture{remedy}"
        )
    return saved


def write_saved(folder: Path | str, name: str, network: Any, *, training: str) -> None:
    """What was trained under that name: a diffusers LoRA file, or with full training a diffusers network folder."""
    if training == "lora":
        layers = adapters.layers_of(network, name)
        record = json.dumps(lora.peft_config(layers), indent=2, sort_keys=True)
        lora.write(Path(folder) / lora.FILE, lora.to_peft(layers), {"format": "pt", lora.METADATA: record})
    else:
        save_network(network, folder, max_shard_size="1000GB")  # one file, which `read_saved` reads


def save_network(network: Any, folder: Path | str, *, max_shard_size: str = "10GB") -> None:
    """diffusers' `save_pretrained`, without the path that the network was read from: it names folders of this disk."""
    with writing_tensors(Path(folder)):
        network.save_pretrained(folder, max_shard_size=max_shard_size)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    write_atomically(file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def check_alpha(network: nn.Module, name: str, folder: Path | str) -> None:
    """InputError if the saved LoRA's alpha is not this adapter's: it would come back too strong or too weak."""
    path = adapter_file(folder, "lora")
    rates = lora.Rates.of(path)
    for layer, module in adapters.adapted(network, name).items():
        rank, alpha = module.r[name], float(module.lora_alpha[name])
        if (its := rates.alpha(layer, rank)) != alpha:
            both = f"alpha {its:g}, this model {alpha:g}"
            raise InputError(f"the adapter in {path.parent} has {both}; set model.lora_alpha={its:g}")


def check_rates(layers: Mapping[str, Lora], path: Path, rank: int, alpha: float | None, key: str) -> None:
    """InputError if a LoRA's rank or alpha are not the recipe's; alpha None = the file's."""
    its_rank, its_alpha = adapters.common(layers)
    if its_rank != rank:
        raise InputError(f"{key}: the LoRA in {path} has rank {its_rank}; set model.lora_rank={its_rank}")
    if alpha is not None and alpha != its_alpha:
        raise InputError(
            f"{key}: the LoRA in {path} has alpha {its_alpha:g}, model.lora_alpha is {alpha:g}; leave it out, and "
            "it is the file's"
        )


def check_mergeable(network: nn.Module) -> None:
    """InputError if the network is stored quantised: nothing can be added to such weights."""
    if waits_on_host(network):
        raise InputError("the weights of model.offload wait on the host; to merge, load it with model.offload=null")
    if any(type(module).__name__ in STORED for module in network.modules()):
        raise InputError("a network that is stored quantised cannot be merged; load it with model.quantize=null")


def config_of(network: Any) -> Mapping[str, Any]:
    """The configuration of one of diffusers' networks; empty for others."""
    config = getattr(network, "config", None)
    return dict(config) if config is not None else {}


def _named(key: str, name: str) -> str:
    """A tensor of a saved adapter under the name that the parameter has while the adapter is called `name`."""
    for part in ("lora_A", "lora_B"):
        key = key.replace(f".{part}.", f".{part}.{name}.")
    return key.replace(".lora_magnitude_vector", f".lora_magnitude_vector.{name}.weight")
