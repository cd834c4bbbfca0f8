"""What every family's `load` takes, and what of it cannot be, said before anything loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from palate.models.latents import ImageSize
from palate.runtime.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What every family's `load` takes, `families.LoadOptions`, with its defaults; docs/models.md describes them."""

    training: str = "lora"
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_targets: Sequence[str] | None = None
    names: Sequence[str] = ("policy",)
    dtype: str = "bfloat16"
    device: str | None = None
    gradient_checkpointing: bool = True
    image_size: ImageSize | None = None
    file: str | None = None
    quantize: str | None = None  # nf4, int8, fp8: how frozen weights are stored
    attention: str | None = None  # diffusers' name of the kernels; None = torch's own
    compile: bool = False  # the denoiser's blocks
    offload: bool = False  # the denoiser's frozen blocks wait in the host's memory
    text_cache: str | Path | None = None
    cut: bool = False  # its networks stay in the host's memory until `runtime.sharding.shard` takes them, by blocks


def check_placement(options: Options) -> None:
    """InputError for what cannot be together, before anything loads."""
    if options.quantize is not None and options.training == "full":
        raise InputError("model.quantize stores frozen weights; set model.weights=lora, or leave it out")
    if options.training != "none" and (options.attention or "").startswith("sage"):
        raise InputError(
            f"model.attention={options.attention} has no gradient, so that what stands before an attention would not "
            "learn; use it for sampling only, or leave it out"
        )
    if not options.offload:
        return
    for wrong, why in (
        (options.training == "full", "moves frozen weights; set model.weights=lora"),
        (options.compile, "moves weights while a block runs, which a compiled one cannot; leave model.compile out"),
        (options.quantize in ("nf4", "int8"), "moves plain weights; use model.quantize=fp8 or leave one of them out"),
        (not options.gradient_checkpointing and options.training != "none", "needs model.gradient_checkpointing=true"),
    ):
        if wrong:
            raise InputError(f"model.offload {why}")


def precision_of(name: str, training: str) -> torch.dtype:
    """model.dtype. InputError: there is no such one, or none to train in."""
    if name not in DTYPES:
        raise InputError(f"model.dtype got {name!r}; expected one of {', '.join(DTYPES)}")
    if name == "float16" and training != "none":
        raise InputError(
            "model.dtype float16 is for sampling only: gradients of rewards underflow in it. Train in "
            "bfloat16, or in float32 where that is missing"
        )
    return DTYPES[name]


def place_of(name: str | None, *, key: str = "model.device") -> torch.device:
    """None = the accelerator if there is one, else the CPU. InputError, which names the key: there is no such one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{key} got {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key} {name}: this torch sees no such device; leave it out, or set it to cpu")
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and device.index not in (None, own) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{key} {name}: each of several processes takes the GPU of its own number; leave it out")
    return device
