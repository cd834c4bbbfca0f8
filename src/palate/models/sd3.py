"""Stable Diffusion 3 and 3.5: a rectified-flow transformer over 16-channel latents; two CLIP encoders and T5.

T5 may be missing from the repository, as it may in diffusers: its part of the text is then zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from palate.models.facts import VAE_16, ComfyUI, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "sd3"
PARTS = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": "T5Tokenizer",
    "scheduler": "",
}
OPTIONAL = ("text_encoder_3", "tokenizer_3")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # attention


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, 77 + text_tokens, 4096), CLIP's layers padded to T5's width, then T5
    pooled: Tensor  # (B, 2048), both CLIP encoders


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(
        torch.empty(1, 77 + tokens, config.joint_attention_dim, dtype=dtype),
        torch.empty(1, config.pooled_projection_dim, dtype=dtype),
    )


FACTS = Facts(
    FAMILY,
    PARTS,
    SD3Transformer2DModel,
    LORA_TARGETS,
    licence="Stability AI Community License",
    licences={"stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community"},
    optional=OPTIONAL,
    lora_loader=SD3LoraLoaderMixin,
    published=Published(  # 3.5 medium
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        VAE_16,
        1024,
        256,
        _condition,
        5.58,
    ),
    few_steps="turbo|flash",
    largest=lambda config: config["pos_embed_max_size"] * config["patch_size"],
    comfyui=ComfyUI(
        checkpoint="sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors", guidance=4.5, sampler=("euler", "sgm_uniform")
    ),
)


class StableDiffusion3(LoadedModel):
    """The `Model` protocol over Stable Diffusion 3 and 3.5 (medium, large, large turbo)."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_steps = 28
    default_guidance = 7.0

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        text_tokens: int = 256,
        **options: Unpack[LoadOptions],
    ) -> StableDiffusion3:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options, optional=OPTIONAL)
        config = repository.config("transformer")
        clip_tokenizers = [repository.tokenizer(name, CLIPTokenizer) for name in ("tokenizer", "tokenizer_2")]
        with_t5 = "text_encoder_3" in repository
        t5_tokenizer: Any = repository.tokenizer("tokenizer_3", T5Tokenizer) if with_t5 else None

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
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
        text = TextReader(
            load_encoders,
            lambda prompt: len(reader(prompt).input_ids),
            text_tokens if with_t5 else reader.model_max_length,
            None if with_t5 else text_tokens,  # of zeros
        )
        parts = load_parts(repository, FACTS, text, Options(**options))
        return cls(parts, FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler")))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return from_velocity(xt, output, *self.schedule(t))

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        return transformer(
            hidden_states=xt, timestep=t * 1000, encoder_hidden_states=cond.text, pooled_projections=cond.pooled
        ).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): shift 3, which diffusers applies twice to the cleanest level."""
        patches = self.latent_shape[1] * self.latent_shape[2] // self.parts.weights.network.config.patch_size**2
        return flow_times(self.scheduler, steps, patches=patches, even=False)
