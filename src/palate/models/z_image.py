"""Z-Image: a rectified-flow transformer over FLUX's latents, with the words read by a Qwen3 language model.

The network outputs x0 - eps, minus the velocity, and counts its time from noise (0) to data (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from palate.models.autoencoder import ImageSize
from palate.models.parts import LoadedModel, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "z-image"
PARTS = {
    "transformer": "ZImageTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "Qwen3Model",
    "tokenizer": "Qwen2Tokenizer",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, refiners included


class Cond(NamedTuple):
    text: Tensor  # (B, text_tokens, 2560); the network sees only what the mask keeps
    mask: Tensor  # (B, text_tokens) bool


class ZImage(LoadedModel):
    """The `Model` protocol over Z-Image. The defaults are those of Turbo; the base model wants 50 steps, guidance 5."""

    schedule = staticmethod(flow_schedule)
    default_steps = 8
    default_guidance = 1.0

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
        text_tokens: int = 512,
    ) -> ZImage:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, file=file)
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)

        def as_chat(prompt: str) -> str:
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )

        def load_encoders(precision: torch.dtype, where: torch.device):
            qwen = repository.read("text_encoder", AutoModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    [as_chat(prompt)],
                    padding="max_length",
                    max_length=text_tokens,
                    truncation=True,
                    return_tensors="pt",
                ).to(where)
                mask = tokens.attention_mask.bool()
                output = qwen(input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True)
                return {"text": output.hidden_states[-2][0], "mask": mask[0]}

            return encode

        parts = load_parts(
            repository,
            FAMILY,
            "transformer",
            ZImageTransformer2DModel,
            targets=lora_targets or LORA_TARGETS,
            patch=2,
            default_size=1024,
            load_encoders=load_encoders,
            count_tokens=lambda prompt: len(tokenizer(as_chat(prompt)).input_ids),
            limit=text_tokens,
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
        return from_velocity(xt, -output, *self.schedule(t))

    def _output(self, transformer: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        frames = list(xt.unsqueeze(2).unbind(0))
        words = [text[mask] for text, mask in zip(cond.text, cond.mask, strict=True)]
        return torch.stack(transformer(frames, 1 - t, words, return_dict=False)[0]).squeeze(2)

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,)."""
        return flow_times(self.scheduler, steps, patches=self.latent_shape[1] * self.latent_shape[2] // 4, even=True)
