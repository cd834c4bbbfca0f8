"""Stable Diffusion XL: a larger UNet, two CLIP text encoders, and the picture's size as a condition.

The network outputs eps (v for some fine-tunes, as the scheduler's configuration says).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from palate.models.autoencoder import ImageSize
from palate.models.parts import LoadedModel, Parts, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import training_step, vp_prediction, vp_times
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
    text: Tensor  # (B, 77, width), both encoders' last but one layers side by side
    pooled: Tensor  # (B, width) of the second encoder


class StableDiffusionXL(LoadedModel):
    """The `Model` protocol over SDXL. Images are told to be uncropped and of the size that is drawn."""

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
        *,
        training: str = "lora",
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        names: Sequence[str] = ("policy",),
        dtype: str = "bfloat16",
        device: str | None = None,
        gradient_checkpointing: bool = True,
        image_size: ImageSize | None = None,
        file: str | None = None,
        text_cache: str | Path | None = None,
    ) -> StableDiffusionXL:
        """From a diffusers folder or hub id; docs/models.md describes the options, which all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, file=file)
        first, second = (repository.tokenizer(name, CLIPTokenizer) for name in ("tokenizer", "tokenizer_2"))
        published = repository.index["scheduler"][1]
        kind = EulerDiscreteScheduler if published == "EulerDiscreteScheduler" else DDIMScheduler
        scheduler = kind.from_config(repository.config("scheduler"))

        def load_encoders(precision: torch.dtype, where: torch.device):
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

        parts = load_parts(
            repository,
            FAMILY,
            "unet",
            UNet2DConditionModel,
            targets=lora_targets or LORA_TARGETS,
            load_encoders=load_encoders,
            count_tokens=lambda prompt: len(first(prompt).input_ids),
            limit=first.model_max_length,
            training=training,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            names=names,
            dtype=dtype,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            image_size=image_size,
            file=file,
            text_cache=text_cache,
        )
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

    def _output(self, unet: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = self.image_size
        told = xt.new_tensor([[height, width, 0, 0, height, width]])  # original size, crop, target size
        step = training_step(t, self.scheduler.config.num_train_timesteps)
        added = {"text_embeds": cond.pooled, "time_ids": told.expand(len(xt), -1)}
        return unet(xt, step, encoder_hidden_states=cond.text, added_cond_kwargs=added).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): leading spacing, which begins at t = .982."""
        return vp_times(self.scheduler, steps)
