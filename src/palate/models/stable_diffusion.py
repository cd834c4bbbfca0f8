"""Stable Diffusion 1.x and 2.x: a UNet over 4-channel latents, conditioned on one CLIP text encoder.

The network outputs eps (1.x, 2-base) or v (2.1 at 768 pixels), as the scheduler's configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from palate.models.facts import VAE_4, ComfyUI, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import training_step, vp_prediction, vp_times
from palate.models.text_cache import Encode
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
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, 77, width)


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.cross_attention_dim, dtype=dtype))


def _listed_as(inputs: Mapping[str, int]) -> dict[str, str]:
    """A text has 768 numbers a token in 1.x and 1024 in 2.x; nothing where no layer of the LoRA reads the text."""
    text = {width for layer, width in inputs.items() if layer.endswith(("attn2.to_k", "attn2.to_v"))}
    if text == {1024}:
        return {"ss_v2": "True", "ss_base_model_version": "sd_v2"}
    named = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
    return {"ss_v2": "False", **named} if text == {768} else {}


FACTS = Facts(
    FAMILY,
    PARTS,
    UNet2DConditionModel,
    LORA_TARGETS,
    licence="CreativeML Open RAIL-M (1.x), CreativeML Open RAIL++-M (2.x)",
    licences={"stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m"},
    lora_loader=StableDiffusionXLLoraLoaderMixin,
    listed_as=_listed_as,
    whole=("to_out",),
    published=Published(  # 1.5
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, VAE_4, 512, 77, _condition, 0.123
    ),
    few_steps="turbo|hyper-sd|lcm",
    comfyui=ComfyUI(
        checkpoint="v1-5-pruned-emaonly-fp16.safetensors",
        latent="EmptyLatentImage",
        guidance=7.0,
        sampler=("euler", "normal"),
    ),
)


class StableDiffusion(LoadedModel):
    """The `Model` protocol over Stable Diffusion 1.x and 2.x."""

    facts = FACTS
    default_steps = 50
    default_guidance = 7.5

    def __init__(self, parts: Parts, scheduler: DDIMScheduler):
        super().__init__(parts, scheduler)
        self.schedule = vp_schedule(scheduler.alphas_cumprod)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        **options: Unpack[LoadOptions],
    ) -> StableDiffusion:
        """From a diffusers folder or hub id; docs/models.md describes the options, which all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        if "text_encoder_2" in repository:
            raise InputError(f"model.folder {folder} has two text encoders; set model.name to sdxl")
        tokenizer = repository.tokenizer("tokenizer", CLIPTokenizer)
        scheduler = DDIMScheduler.from_config(repository.config("scheduler"))  # the published PNDM is not one-step

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
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

        text = TextReader(load_encoders, lambda prompt: len(tokenizer(prompt).input_ids), tokenizer.model_max_length)
        parts = load_parts(repository, FACTS, text, Options(**options))
        return cls(parts, scheduler)

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return vp_prediction(self.scheduler.config.prediction_type, xt, output, *self.schedule(t))

    @staticmethod
    def output(unet: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        step = training_step(t, call.training_steps)
        return unet(xt, step, encoder_hidden_states=cond.text).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): leading spacing, which begins at t = .982 and ends at .001."""
        return vp_times(self.scheduler, steps)
