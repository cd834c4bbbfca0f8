"""What the model families share: the loaded parts, who is stored in which precision, guidance, adapter files.

Precision: the network is stored in `dtype`, what is trained in float32. A LoRA's own matrices then work in float32
beside the frozen ones; full training keeps float32 weights and computes in `dtype` (autocast). Latents, levels and
predictions are float32 throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from palate.models.autoencoder import Autoencoder, ImageSize, latent_shape, sides
from palate.models.repository import Repository
from palate.models.text_cache import Encode, TextCache
from palate.models.weights import NamedWeights
from palate.runtime.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """What `load_parts` has loaded."""

    repository: Repository
    denoiser: str  # the name of its part
    weights: NamedWeights
    vae: Autoencoder
    text: TextCache
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]  # height, width
    dtype: torch.dtype
    device: torch.device
    file: str | None


class LoadedModel:
    """What every family does in the same way of the `Model` protocol.

    A family adds what it is told (`encode_prompts`), its network's call (`_output`) and its times.
    """

    def __init__(self, parts: Parts, scheduler: Any):
        self.parts, self.scheduler = parts, scheduler
        self.weights, self.training = parts.weights, parts.weights.training
        self.latent_shape, self.image_size, self.device = parts.latent_shape, parts.image_size, parts.device

    def encode(self, images: Tensor) -> Tensor:
        return self.parts.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.parts.vae.decode(latents)

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        return self.weights.parameters(weights)

    def fingerprint(self) -> str:
        """SHA-256 of the files of the denoiser and the VAE; adapters and text encoders are not included."""
        return self.parts.repository.digest([self.parts.denoiser, "vae"], self.parts.file)

    def save_adapter(self, folder: Path | str) -> None:
        """What was trained: the policy's LoRA file (full training: its network), other names in folders below."""
        self.weights.save_all(folder)

    def load_adapter(self, folder: Path | str) -> None:
        """Read back what `save_adapter` wrote, into a model of the same training mode, rank and names."""
        self.weights.load_all(folder)

    def cache_prompts(self, prompts: Sequence[str]) -> None:
        """Encode all prompts to disk, then free the text encoders. Warns once about prompts that are too long."""
        self.parts.text.fill(prompts)

    def _guided(
        self, weights: str, xt: Tensor, t: Tensor, cond: Any, null: Callable[[], Any], guidance: float
    ) -> Tensor:
        """u + w (c - u) of `_output`, in one batch of twice the size; c alone at w = 1. At least float32.

        cond: a NamedTuple of tensors (B, ...). null: makes that of the empty prompt, (1, ...) or (B, ...) each. The
        network gets xt and cond in its own precision, and t as it is.
        """
        dtype = self.parts.dtype
        full = self.weights.training == "full" and dtype != torch.float32
        outside, inside = torch.promote_types(xt.dtype, torch.float32), torch.float32 if full else dtype
        if guidance != 1.0:
            xt, t = torch.cat([xt, xt]), torch.cat([t, t])
            cond = type(cond)(*(torch.cat([n.expand_as(c), c]) for n, c in zip(null(), cond, strict=True)))
        cond = type(cond)(*(c.to(inside) if c.is_floating_point() else c for c in cond))
        autocast = torch.autocast(self.device.type, dtype, enabled=full)
        with self.weights.speaking_as(weights) as network, autocast:
            output = self._output(network, xt.to(inside), t, cond).to(outside)
        if guidance == 1.0:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


def load_parts(
    repository: Repository,
    family: str,
    denoiser: str,
    kind: type,
    *,
    targets: Sequence[str],
    load_encoders: Callable[[torch.dtype, torch.device], Encode],
    count_tokens: Callable[[str], int],
    limit: int,
    training: str,
    lora_rank: int,
    lora_alpha: float | None,
    names: Sequence[str],
    dtype: str,
    device: str | None,
    gradient_checkpointing: bool,
    image_size: ImageSize | None,
    file: str | None,
    text_cache: str | Path | None,
    patch: int = 1,
    default_size: int | None = None,
) -> Parts:
    """Read VAE and denoiser; the text encoders wait until a prompt needs them. What can be wrong is checked first.

    denoiser, kind: its folder and class; targets: default LoRA targets; patch: latents a patch's side; default_size: in
    pixels, None = the size in the denoiser's configuration.
    """
    precision, where = _precision(dtype, training), _place(device)
    vae_config = repository.config("vae")
    if image_size is None:
        factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        image_size = default_size or repository.config(denoiser)["sample_size"] * factor
    shape = latent_shape(vae_config, image_size, family=family, patch=patch)
    text_parts = [p for p in repository.index if p in repository and p.startswith(("text_encoder", "tokenizer"))]
    key = hashlib.sha256(f"{family} {limit} {dtype} {repository.version(text_parts)}".encode()).hexdigest()
    text = TextCache(
        lambda: load_encoders(precision, where),
        key=key,
        count_tokens=count_tokens,
        limit=limit,
        device=where,
        folder=text_cache,
    )
    vae = Autoencoder(
        repository.read("vae", AutoencoderKL, precision), device=where, gradient_checkpointing=gradient_checkpointing
    )
    network = repository.read(denoiser, kind, precision, file=file).to(where)
    weights = NamedWeights(network, training=training, rank=lora_rank, alpha=lora_alpha, targets=targets, names=names)
    for name in names:
        if training == "full":
            weights.networks[name].float()
        for parameter in weights.parameters(name):
            parameter.data = parameter.data.float()
    if gradient_checkpointing:
        weights.checkpoint_activations()
    return Parts(repository, denoiser, weights, vae, text, shape, sides(image_size), precision, where, file)


def _precision(name: str, training: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"model.dtype got {name!r}; expected one of {', '.join(DTYPES)}")
    if name == "float16" and training != "none":
        raise InputError(
            "model.dtype float16 is for sampling only: gradients of rewards underflow in it. Train in "
            "bfloat16, or in float32 where that is missing"
        )
    return DTYPES[name]


def _place(name: str | None) -> torch.device:
    """None = the accelerator if there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"model.device got {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device {name}: this torch sees no such device; leave it out, or set it to cpu")
    return device
