"""Stable Diffusion XL: a larger UNet, two CLIP text encoders, and the picture's size as a condition.

The network outputs eps (v for some fine-tunes, as the scheduler's configuration says).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from palate.models.facts import VAE_4, ComfyUI, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import training_step, vp_prediction, vp_times
from palate.models.text_cache import Encode
from palate.path import Prediction, vp_schedule

FAMILY = "sdxl"
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, 77, width), both encoders' last but one layers side by side
    pooled: Tensor  # (B, width) of the second encoder


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return Cond(torch.empty(1, tokens, config.cross_attention_dim, dtype=dtype), torch.empty(1, pooled, dtype=dtype))


FACTS = Facts(
    FAMILY,
    PARTS,
    UNet2DConditionModel,
    LORA_TARGETS,
    licence="CreativeML Open RAIL++-M",
    licences={"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"},
    lora_loader=StableDiffusionXLLoraLoaderMixin,
    listed_as=lambda inputs: {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
    whole=("proj_in", "proj_out"),
    published=Published(
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        VAE_4,
        1024,
        77,
        _condition,
        0.818,
    ),
    few_steps="turbo|lightning|hyper-sd|lcm|dmd",
    comfyui=ComfyUI(
        checkpoint="sd_xl_base_1.0.safetensors", latent="EmptyLatentImage", guidance=5.0, sampler=("euler", "normal")
    ),
)


class StableDiffusionXL(LoadedModel):
    """The `Model` protocol over SDXL. Images are told to be uncropped and of the size that is drawn."""

    facts = FACTS
    default_steps = 50
    default_guidance = 5.0

    def __init__(self, parts: Parts, scheduler: DDIMScheduler | EulerDiscreteScheduler):
        super().__init__(parts, scheduler)
        self.schedule = vp_schedule(scheduler.alphas_cumprod)
        self.empty_prompt_is_zero = parts.repository.index.get("force_zeros_for_empty_prompt", True)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        **options: Unpack[LoadOptions],
    ) -> StableDiffusionXL:
        """From a diffusers folder or hub id; docs/models.md describes the options, which all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        first, second = (repository.tokenizer(name, CLIPTokenizer) for name in ("tokenizer", "tokenizer_2"))
        published = repository.index["scheduler"][1]
        kind = EulerDiscreteScheduler if published == "EulerDiscreteScheduler" else DDIMScheduler
        scheduler = kind.from_config(repository.config("scheduler"))

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            encoders = (
                repository.read("text_encoder", CLIPTextModel, precision).to(where),
                repository.read("text_encoder_2", CLIPTextModelWithProjection, precision).to(where),
            )

            def encode(prompt: str) -> dict[str, Tensor]:
                layers = []
                for tokenizer, encoder in zip((first, second), encoders, strict=True):
                    ids = tokenizer(
                        prompt,
                        padding="max_length",
                        max_length=tokenizer.model_max_length,
                        truncation=True,
                        return_tensors="pt",
                    ).input_ids.to(where)
                    output = encoder(ids, output_hidden_states=True)
                    layers.append(output.hidden_states[-2][0])
                return {"text": torch.cat(layers, -1), "pooled": output.text_embeds[0]}

            return encode

        text = TextReader(load_encoders, lambda prompt: len(first(prompt).input_ids), first.model_max_length)
        parts = load_parts(repository, FACTS, text, Options(**options))
        return cls(parts, scheduler)

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        def null() -> Cond:
            return Cond(*map(torch.zeros_like, cond)) if self.empty_prompt_is_zero else self.encode_prompts([""])

        output = self._guided(weights, xt, t, cond, null, guidance)
        return vp_prediction(self.scheduler.config.prediction_type, xt, output, *self.schedule(t))

    @staticmethod
    def output(unet: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        height, width = call.image_size
        time_ids = xt.new_tensor([[height, width, 0, 0, height, width]])  # original size, crop, target size
        step = training_step(t, call.training_steps)
        added = {"text_embeds": cond.pooled, "time_ids": time_ids.expand(len(xt), -1)}
        return unet(xt, step, encoder_hidden_states=cond.text, added_cond_kwargs=added).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): leading spacing, which begins at t = .982."""
        return vp_times(self.scheduler, steps)
