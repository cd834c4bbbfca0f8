"""What is known about a family before any weight loads; each family's file holds its own `FACTS`.

Loading, `palate plan`, `palate export` and error messages read them, and know no family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from palate.models import families
from palate.models.latents import LatentLayout
from palate.runtime.code import imported
from palate.runtime.errors import InputError


class NetworkCall(NamedTuple):
    """What a network is told beside latents, time and text."""

    image_size: tuple[int, int]  # height, width in pixels
    training_steps: int = 1000
    guidance_embed: float = 3.5  # of networks distilled from guided predictions


@dataclass(frozen=True)
class Published:
    """The architecture that `palate plan` assumes where no local folder says another.

    condition: (network's configuration, tokens of the long text encoder, dtype) -> the family's Cond of one prompt, on
    torch's default device.
    """

    config: Mapping[str, Any]  # of the denoiser's class
    vae: Mapping[str, Any]  # of the VAE's class
    image_size: int
    text_tokens: int
    condition: Callable[[Any, int, torch.dtype], Any]
    text_parameters: float  # of the text encoders, in units of 1e9


class OriginalBlocks(NamedTuple):
    """A kind of block under two names. layers: the original name -> the layers of diffusers that it fuses, by rows."""

    blocks: str  # in diffusers, "transformer_blocks"
    original: str  # "double_blocks"
    layers: Mapping[str, tuple[str, ...]]


class ComfyUI(NamedTuple):
    """Where a family's parts come from in ComfyUI, by the file names of its own examples, and how it samples there."""

    unet: str = ""  # a file of models/diffusion_models; "" = the checkpoint holds all parts
    checkpoint: str = ""
    encoders: tuple[str, ...] = ()  # files of models/text_encoders
    kind: str = ""  # of the CLIP loader
    vae: str = ""
    latent: str = "EmptySD3LatentImage"
    shift: float | None = None  # of ModelSamplingAuraFlow
    embedded: float | None = None  # FluxGuidance
    guidance: float = 4.0
    steps: int = 25
    sampler: tuple[str, str] = ("euler", "simple")
    scheduler: str = ""  # a node of its own that makes the time grid; "" = KSampler's


@dataclass(frozen=True)
class Facts:
    """name is `model.name`; parts: name in model_index.json -> class, "" = any."""

    name: str
    parts: Mapping[str, str]
    network: type[nn.Module]  # diffusers' class of the denoiser
    lora_targets: tuple[str, ...]  # ends of the names of layers that a LoRA adapts by default
    licence: str  # of the published base models; a folder of one's own may have another
    licences: Mapping[str, str] = field(default_factory=dict)  # hub id -> the hub's licence id
    optional: tuple[str, ...] = ()  # parts that may be missing
    vae: type[nn.Module] = field(default_factory=lambda: imported("diffusers", "AutoencoderKL"))
    layout: LatentLayout = field(default_factory=LatentLayout)  # of the VAE's latents
    packing: int = 1  # channels of the denoiser's input per channel of the VAE's latents
    patch: int | None = None  # side of the denoiser's patches, in latents; None = its configuration's patch_size
    published: Published | None = None
    lora_loader: Any = None  # diffusers' loader of this family's LoRAs, which translates other programs' names
    # the widths of a LoRA's layers' inputs -> what kohya's program and modelspec call the family, in a file's metadata
    listed_as: Callable[[Mapping[str, int]], Mapping[str, str]] | None = None
    original: tuple[OriginalBlocks, ...] = ()  # the names of the original program, which kohya's form uses
    one_step_call: str = ""  # what a pipeline is told besides when a one-step generator of this family draws
    few_steps: str = ""  # regular expression of the hub ids, folders and files that are distilled to few steps
    comfyui: ComfyUI | None = None  # None = ComfyUI's core does not load it, or shows no graph for it
    largest: Callable[[Mapping[str, Any]], int] | None = None  # side in latents at which the denoiser's positions end
    whole: tuple[str, ...] = ()  # parts of names of small layers that four bits leave as they are
    packs_noise: bool = False  # whether its pipelines take latents as their network does, packed

    @property
    def denoiser(self) -> str:
        """The part that is trained: "unet" or "transformer"; also the prefix of its LoRA's names in diffusers' form."""
        return "unet" if "unet" in self.parts else "transformer"


VAE_4: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAE_16: Mapping[str, Any] = {**VAE_4, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@runtime_checkable
class HasFacts(Protocol):
    """A family's class that says what it is made of; one of an installed package need not."""

    @property
    def facts(self) -> Facts: ...


def facts_of(name: str) -> Facts:
    """The facts of a family by `model.name`. InputError: it has none."""
    family = families.find(name).load_class()
    if not isinstance(family, HasFacts) or not isinstance(family.facts, Facts):
        raise InputError(f"model.name {name}: {family.__name__} says nothing about itself; give it `facts`")
    return family.facts
