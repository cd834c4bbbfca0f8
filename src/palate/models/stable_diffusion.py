"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents, conditioned on one CLIP text encoder.

The network outputs eps (1.x, 2-base) or v (2.1 at 768 pixels), as the scheduler's configuration says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from palate.models.autoencoder import ImageSize
from palate.models.parts import LoadedModel, Parts, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import training_step, vp_prediction, vp_times
from palate.path import Prediction, vp_schedule
from palate.runtime.errors import InputError

FAMILY = "stable-diffusion"
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention


class Cond(NamedTuple):
    text: Tensor  # (B, 77, width)


class StableDiffusion(LoadedModel):
    """The `Model` protocol over Stable Diffusion 1.x and 2.x."""

    default_steps = 50
    default_guidance = 7.5

    def __init__(self, parts: Parts, scheduler: DDIMScheduler):
        super().__init__(parts, scheduler)
        self.schedule = vp_schedule(scheduler.alphas_cumprod)

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
    ) -> StableDiffusion:
        """From a diffusers folder or hub id; docs/models.md describes the options, which all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, file=file)
        if "text_encoder_2" in repository:
            raise InputError(f"model.folder {folder} has two text encoders; set model.name to sdxl")
        expected = repository.config("vae")["latent_channels"]
        if (got := repository.config("unet")["in_channels"]) != expected:
            raise InputError(
                f"model.folder {folder}: its UNet takes {got} channels (inpainting?); a text-to-image "
                f"model's takes {expected}"
            )
        tokenizer = repository.tokenizer("tokenizer", CLIPTokenizer)
        scheduler = DDIMScheduler.from_config(repository.config("scheduler"))  # the published PNDM is not one-step

        def load_encoders(precision: torch.dtype, where: torch.device):
            encoder = repository.read("text_encoder", CLIPTextModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    prompt,
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).to(where)
                mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
                return {"text": encoder(tokens.input_ids, attention_mask=mask).last_hidden_state[0]}

            return encode

        parts = load_parts(
            repository,
            FAMILY,
            "unet",
            UNet2DConditionModel,
            targets=lora_targets or LORA_TARGETS,
            load_encoders=load_encoders,
            count_tokens=lambda prompt: len(tokenizer(prompt).input_ids),
            limit=tokenizer.model_max_length,
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
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return vp_prediction(self.scheduler.config.prediction_type, xt, output, *self.schedule(t))

    def _output(self, unet: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        step = training_step(t, self.scheduler.config.num_train_timesteps)
        return unet(xt, step, encoder_hidden_states=cond.text).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): leading spacing, which begins at t = .982 and ends at .001."""
        return vp_times(self.scheduler, steps)
