"""Stable Diffusion 3 and 3.5: a rectified-flow transformer over 16-channel latents; two CLIP encoders and T5.

T5 may be missing from the repository, as it may in diffusers: its part of the text is then zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from palate.models.autoencoder import ImageSize, sides
from palate.models.parts import LoadedModel, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.path import Prediction, flow_schedule, from_velocity
from palate.runtime.errors import InputError

FAMILY = "sd3"
PARTS = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": "T5TokenizerFast",
    "scheduler": "",
}
OPTIONAL = ("text_encoder_3", "tokenizer_3")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # attention


class Cond(NamedTuple):
    text: Tensor  # (B, 77 + text_tokens, 4096), CLIP's layers padded to T5's width, then T5
    pooled: Tensor  # (B, 2048), both CLIP encoders


class StableDiffusion3(LoadedModel):
    """The `Model` protocol over Stable Diffusion 3 and 3.5 (medium, large, large turbo)."""

    schedule = staticmethod(flow_schedule)
    default_steps = 28
    default_guidance = 7.0

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
        text_tokens: int = 256,
    ) -> StableDiffusion3:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, file=file, optional=OPTIONAL)
        config = repository.config("transformer")
        largest = config["pos_embed_max_size"] * config["patch_size"]
        if image_size is not None:
            largest *= 2 ** (len(repository.config("vae")["block_out_channels"]) - 1)
            if max(sides(image_size)) > largest:
                raise InputError(f"model.image_size got {image_size}; this network's positions end at {largest} pixels")
        clip_tokenizers = [repository.tokenizer(name, CLIPTokenizer) for name in ("tokenizer", "tokenizer_2")]
        with_t5 = "text_encoder_3" in repository
        t5_tokenizer = repository.tokenizer("tokenizer_3", T5TokenizerFast) if with_t5 else None

        def load_encoders(precision: torch.dtype, where: torch.device):
            clips = [
                repository.read(name, CLIPTextModelWithProjection, precision).to(where)
                for name in ("text_encoder", "text_encoder_2")
            ]
            t5 = repository.read("text_encoder_3", T5EncoderModel, precision).to(where) if with_t5 else None
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

            def encode(prompt: str) -> dict[str, Tensor]:
                outputs = []
                for tokenizer, clip in zip(clip_tokenizers, clips, strict=True):
                    ids = tokenizer(prompt, max_length=clip_tokenizers[0].model_max_length, **options).input_ids
                    outputs.append(clip(ids.to(where), output_hidden_states=True))
                words = torch.cat([output.hidden_states[-2][0] for output in outputs], -1)
                if t5 is not None:
                    long = t5(t5_tokenizer(prompt, max_length=text_tokens, **options).input_ids.to(where))
                    long = long.last_hidden_state[0]
                else:
                    long = words.new_zeros(text_tokens, config["joint_attention_dim"])
                words = F.pad(words, (0, long.shape[-1] - words.shape[-1]))
                pooled = torch.cat([output.text_embeds[0] for output in outputs], -1)
                return {"text": torch.cat([words, long]), "pooled": pooled}

            return encode

        reader = t5_tokenizer or clip_tokenizers[0]
        parts = load_parts(
            repository,
            FAMILY,
            "transformer",
            SD3Transformer2DModel,
            targets=lora_targets or LORA_TARGETS,
            patch=config["patch_size"],
            load_encoders=load_encoders,
            count_tokens=lambda prompt: len(reader(prompt).input_ids),
            limit=text_tokens if with_t5 else reader.model_max_length,
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
        return cls(parts, FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler")))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return from_velocity(xt, output, *self.schedule(t))

    def _output(self, transformer: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=xt, timestep=t * 1000, encoder_hidden_states=cond.text, pooled_projections=cond.pooled
        ).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): shift 3, which diffusers applies twice to the cleanest level."""
        patches = self.latent_shape[1] * self.latent_shape[2] // self.parts.weights.network.config.patch_size**2
        return flow_times(self.scheduler, steps, patches=patches, even=False)
