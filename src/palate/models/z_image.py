"""Z-Image: a rectified-flow transformer over FLUX's latents, with the words read by a Qwen3 language model.

The network outputs x0 - eps, minus the velocity, and counts its time from noise (0) to data (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.loaders import ZImageLoraLoaderMixin
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from palate.models.facts import VAE_16, ComfyUI, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
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
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 2560); the network sees only what the mask keeps
    mask: Tensor | None  # (B, text_tokens) bool; None = all


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.cap_feat_dim, dtype=dtype), None)


FACTS = Facts(
    FAMILY,
    PARTS,
    ZImageTransformer2DModel,
    LORA_TARGETS,
    licence="Apache-2.0",
    licences={"Tongyi-MAI/Z-Image-Turbo": "apache-2.0"},
    patch=2,
    lora_loader=ZImageLoraLoaderMixin,
    whole=("noise_refiner", "context_refiner", "adaLN_modulation"),
    published=Published({}, VAE_16, 1024, 512, _condition, 4.02),
    few_steps="turbo",
    comfyui=ComfyUI(
        "z_image_turbo_bf16.safetensors",
        encoders=("qwen_3_4b.safetensors",),
        kind="lumina2",
        vae="ae.safetensors",
        shift=3.0,
        guidance=1.0,
        steps=8,
    ),
)


class ZImage(LoadedModel):
    """The `Model` protocol over Z-Image. The defaults are those of Turbo; the base model wants 50 steps, guidance 5."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_steps = 8
    default_guidance = 1.0

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        text_tokens: int = 512,
        **options: Unpack[LoadOptions],
    ) -> ZImage:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)

        def as_chat(prompt: str) -> str:
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
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

        text = TextReader(load_encoders, lambda prompt: len(tokenizer(as_chat(prompt)).input_ids), text_tokens)
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
        return cls(parts, FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler")))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return from_velocity(xt, -output, *self.schedule(t))

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        frames = list(xt.unsqueeze(2).unbind(0))
        words = list(cond.text)
        if cond.mask is not None:
            words = [text[mask] for text, mask in zip(words, cond.mask, strict=True)]
        return torch.stack(transformer(frames, 1 - t, words, return_dict=False)[0]).squeeze(2)

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,)."""
        return flow_times(self.scheduler, steps, patches=self.latent_shape[1] * self.latent_shape[2] // 4, even=True)
