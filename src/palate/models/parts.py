"""What the model families share: the loaded parts, who is stored in which precision, guidance, adapter files.

Precision: the network is stored in `dtype`, what is trained in float32. A LoRA's own matrices then work in float32
beside the frozen ones; full training keeps float32 weights and computes in `dtype` (autocast). Latents, levels and
predictions are float32 throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import FromOriginalModelMixin
from torch import Tensor, nn

from palate.models.autoencoder import Autoencoder
from palate.models.facts import Facts, NetworkCall
from palate.models.latents import factor_of, sides
from palate.models.options import Options, check_placement, place_of, precision_of
from palate.models.placement import check_compile, compile_blocks, keep_blocks_on_host, use_attention
from palate.models.quantised import check_installed
from palate.models.repository import Repository, check_call, check_channels
from palate.models.repository_checks import READERS
from palate.models.sizes import OtherSizes, shape_of
from palate.models.text_cache import TextCache, TextReader
from palate.models.weights import NamedWeights
from palate.runtime.errors import InputError


@dataclass(frozen=True)
class Parts:
    """What `load_parts` has loaded."""

    repository: Repository
    facts: Facts
    weights: NamedWeights
    vae: Autoencoder
    text: TextCache
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]  # height, width
    dtype: torch.dtype
    device: torch.device
    file: str | None


class LoadedModel(OtherSizes):
    """What every family does in the same way of the `Model` protocol.

    A family adds how it reads prompts (`encode_prompts`), its network's call (`output`), what that stands for
    (`predict`) and its times (`time_grid`).
    """

    facts: Facts

    @staticmethod
    def output(network: Any, xt: Tensor, t: Tensor, cond: Any, call: NetworkCall) -> Tensor:
        """One call of the denoiser in its own units: (B, C, h, w). `palate plan` calls it without a model."""
        raise NotImplementedError

    def __init__(self, parts: Parts, scheduler: Any):
        self.parts, self.scheduler = parts, scheduler
        self.weights, self.training = parts.weights, parts.weights.training
        self.latent_shape, self.image_size, self.device = parts.latent_shape, parts.image_size, parts.device

    @property
    def call(self) -> NetworkCall:
        """What the network is told besides; a family whose call depends on more has its own."""
        return NetworkCall(self.image_size, training_steps=self.scheduler.config.num_train_timesteps)

    def encode(self, images: Tensor) -> Tensor:
        return self.parts.vae.encode(images)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of images."""
        return self.parts.vae.posterior(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.parts.vae.decode(latents)

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        return self.weights.parameters(weights)

    def fingerprint(self) -> str:
        """SHA-256 of the files of the denoiser and the VAE; adapters and text encoders are not included."""
        return self.parts.repository.digest([self.parts.facts.denoiser, "vae"], self.parts.file)

    def save_adapter(self, folder: Path | str) -> None:
        """What was trained: the policy's LoRA file (full training: its network), other names in folders below."""
        self.weights.save_all(folder)

    def reset(self, seed: int = 0) -> None:
        """Untrained again, so that the same object can be trained once more from the start."""
        self.weights.reset(seed)

    def load_adapter(self, folder: Path | str) -> None:
        """Read back what `save_adapter` wrote, into a model of the same training mode, rank and names."""
        self.weights.load_all(folder)

    def while_training(self) -> AbstractContextManager[None]:
        """Inside, the model is what it trains as: with the adapter of `model.training_adapter`."""
        return self.weights.selection.while_training()

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Inside, the policy's LoRA counts so many times: 0 = the base model, 1 = as trained."""
        return self.weights.selection.at_strength(strength)

    def cache_prompts(self, prompts: Sequence[str]) -> None:
        """Encode all prompts to disk, then free the text encoders. Warns once about prompts that are too long."""
        self.parts.text.fill(prompts)

    def _guided(
        self, weights: str, xt: Tensor, t: Tensor, cond: Any, null: Callable[[], Any], guidance: float
    ) -> Tensor:
        """u + w (c - u) of `output`, in one batch of twice the size; c alone at w = 1. At least float32.

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
        # a cache of cast weights would be a second network beside the activations
        autocast = torch.autocast(self.device.type, dtype, enabled=full, cache_enabled=False)
        with self.weights.using(weights) as network, autocast:
            output = self.output(network, xt.to(inside), t, cond, self.call).to(outside)
        if guidance == 1.0:
            return output
        unconditional, conditional = output.chunk(2)
        return self.combine(unconditional, conditional, guidance)

    @staticmethod
    def combine(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """u + w (c - u), both (B, C, h, w); a family that was published with another rule has its own."""
        return unconditional + guidance * (conditional - unconditional)


def load_parts(
    repository: Repository, facts: Facts, text: TextReader, options: Options, *, default_size: int | None = None
) -> Parts:
    """Read VAE and denoiser; the text encoders wait until a prompt needs them. What can be wrong is checked first.

    default_size: in pixels, None = the size in the denoiser's configuration.
    """
    precision, where = precision_of(options.dtype, options.training), place_of(options.device)
    check_channels(repository, facts)
    check_call(repository, facts)
    check_placement(options)
    check_installed(options.quantize)
    if options.compile:
        check_compile(facts.network)
    if options.file is not None and not issubclass(facts.network, FromOriginalModelMixin):
        raise InputError(f"model.file: diffusers reads no single file of {facts.name}; give its folder as model.folder")
    vae_config, image_size = repository.config("vae"), options.image_size
    if image_size is None:
        image_size = default_size or repository.config(facts.denoiser)["sample_size"] * factor_of(vae_config)
    shape = shape_of(repository, facts, image_size)
    cache = _text_cache(repository, facts.name, text, options, precision, where)
    precise = torch.float32 if precision == torch.float16 else precision  # SDXL's VAE overflows in float16
    vae = Autoencoder(
        repository.read("vae", facts.vae, precise),
        device=where,
        gradient_checkpointing=options.gradient_checkpointing,
        layout=facts.layout,
    )
    network = repository.read(facts.denoiser, facts.network, precision, file=options.file, whole=facts.whole)
    network = network if options.offload or options.cut else network.to(where)
    weights = named_weights(network, facts, options)
    place(weights, options, where)
    return Parts(repository, facts, weights, vae, cache, shape, sides(image_size), precision, where, options.file)


def named_weights(network: nn.Module, facts: Facts, options: Options) -> NamedWeights:
    """The network under its names; what is trained in float32, activations recomputed if the options say so."""
    weights = NamedWeights(
        network,
        training=options.training,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        targets=options.lora_targets or facts.lora_targets,
        names=options.names,
        facts=facts,
    )
    for name in options.names:
        if options.training == "full":
            weights.networks[name].float()
        for parameter in weights.parameters(name):
            parameter.data = parameter.data.float()
    if options.gradient_checkpointing:
        weights.checkpoint_activations()
    return weights


def place(weights: NamedWeights, options: Options, where: torch.device) -> None:
    """How the blocks of the loaded networks run, as the options say. InputError: two of them exclude each other."""
    for network in {id(network): network for network in weights.networks.values()}.values():
        if options.attention is not None:
            use_attention(network, options.attention)
        if options.compile:
            compile_blocks(network)
        if options.offload:
            keep_blocks_on_host(network, where)


def _text_cache(
    repository: Repository,
    family: str,
    text: TextReader,
    options: Options,
    precision: torch.dtype,
    where: torch.device,
) -> TextCache:
    read = [p for p in repository.index if p in repository and p.startswith(("text_encoder", *READERS))]
    key = f"{family} {text.limit} {options.dtype} {repository.version(read)}"
    key += f" {options.quantize}" if options.quantize else ""
    key += f" text_tokens {text.text_tokens}" if text.text_tokens is not None else ""
    key += f" {text.settings}" if text.settings else ""
    return TextCache(
        text,
        lambda: text.load(precision, where),
        key=hashlib.sha256(key.encode()).hexdigest(),
        device=where,
        folder=options.text_cache,
    )
