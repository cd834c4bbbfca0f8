"""FLUX.1: a rectified-flow transformer over 16-channel latents in 2 x 2 patches; T5 for the words, CLIP for their sum.

dev is distilled from guided predictions: it is told a guidance strength and needs no second call. That number is
`distilled_guidance` here; `guidance` keeps its usual meaning, the scale w of u + w (c - u), which FLUX can do without.
schnell is distilled to few steps and is told nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from palate.models.facts import VAE_16, ComfyUI, Facts, NetworkCall, OriginalBlocks, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "flux"
PARTS = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "T5Tokenizer",
    "scheduler": "",
}
LORA_TARGETS = (  # both streams' attention and feed-forward layers, the single stream's attention
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 4096), T5
    pooled: Tensor  # (B, 768), CLIP


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(
        torch.empty(1, tokens, config.joint_attention_dim, dtype=dtype),
        torch.empty(1, config.pooled_projection_dim, dtype=dtype),
    )


FACTS = Facts(
    FAMILY,
    PARTS,
    FluxTransformer2DModel,
    LORA_TARGETS,
    licence="FLUX.1-dev: FLUX.1 [dev] Non-Commercial License; FLUX.1-schnell: Apache-2.0",
    licences={
        "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
        "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    },
    packing=4,
    patch=2,
    lora_loader=FluxLoraLoaderMixin,
    listed_as=lambda inputs: {"ss_base_model_version": "flux1"},
    published=Published({"guidance_embeds": True}, VAE_16, 1024, 512, _condition, 4.88),
    original=(
        OriginalBlocks(
            "transformer_blocks",
            "double_blocks",
            {
                "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn_proj": ("attn.to_out.0",),
                "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn_proj": ("attn.to_add_out",),
                "img_mlp_0": ("ff.net.0.proj",),
                "img_mlp_2": ("ff.net.2",),
                "txt_mlp_0": ("ff_context.net.0.proj",),
                "txt_mlp_2": ("ff_context.net.2",),
                "img_mod_lin": ("norm1.linear",),
                "txt_mod_lin": ("norm1_context.linear",),
            },
        ),
        OriginalBlocks(
            "single_transformer_blocks",
            "single_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation_lin": ("norm.linear",),
            },
        ),
    ),
    few_steps="schnell",
    packs_noise=True,
    comfyui=ComfyUI(
        "flux1-dev.safetensors",
        encoders=("clip_l.safetensors", "t5xxl_fp16.safetensors"),
        kind="flux",
        vae="ae.safetensors",
        embedded=3.5,
        guidance=1.0,
    ),
)


class Flux(LoadedModel):
    """The `Model` protocol over FLUX.1 dev and schnell.

    distilled_guidance: what dev is told. rollout_distilled_guidance: what it is told in calls without gradient, that is
    in rollouts, previews and by the reference; None = the same. schnell reads neither.
    """

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_guidance = 1.0

    def __init__(
        self,
        parts: Parts,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        distilled_guidance: float = 3.5,
        rollout_distilled_guidance: float | None = None,
    ):
        super().__init__(parts, scheduler)
        self.distilled = parts.weights.network.config.guidance_embeds
        self.distilled_guidance, self.rollout_distilled_guidance = distilled_guidance, rollout_distilled_guidance
        self.default_steps = 28 if self.distilled else 4

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        text_tokens: int = 512,
        distilled_guidance: float = 3.5,
        rollout_distilled_guidance: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> Flux:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        clip_tokenizer = repository.tokenizer("tokenizer", CLIPTokenizer)
        t5_tokenizer = repository.tokenizer("tokenizer_2", T5Tokenizer)

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            clip = repository.read("text_encoder", CLIPTextModel, precision).to(where)
            t5 = repository.read("text_encoder_2", T5EncoderModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
                short = clip_tokenizer(prompt, max_length=clip_tokenizer.model_max_length, **options).input_ids
                long = t5_tokenizer(prompt, max_length=text_tokens, **options).input_ids
                text, pooled = t5(long.to(where)).last_hidden_state[0], clip(short.to(where)).pooler_output[0]
                return {"text": text, "pooled": pooled}

            return encode

        text = TextReader(load_encoders, lambda prompt: len(t5_tokenizer(prompt).input_ids), text_tokens)
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler"))
        return cls(
            parts,
            scheduler,
            distilled_guidance=distilled_guidance,
            rollout_distilled_guidance=rollout_distilled_guidance,
        )

    @property
    def call(self) -> NetworkCall:
        embed = self.distilled_guidance
        if self.rollout_distilled_guidance is not None and not torch.is_grad_enabled():
            embed = self.rollout_distilled_guidance
        return NetworkCall(self.image_size, guidance_embed=embed)

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return from_velocity(xt, output, *self.schedule(t))

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        guidance = torch.full_like(t, call.guidance_embed) if transformer.config.guidance_embeds else None
        patches = transformer(
            hidden_states=pack(xt),
            timestep=t,
            guidance=guidance,
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled,
            img_ids=positions(xt),
            txt_ids=xt.new_zeros(cond.text.shape[1], 3),
        ).sample
        return unpack(patches, xt.shape)

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): dev's shift grows with the image, schnell has none."""
        return flow_times(self.scheduler, steps, patches=self.latent_shape[1] * self.latent_shape[2] // 4, even=True)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): a token holds the 2 x 2 latents of a patch, channel by channel."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`; shape is that of the latents."""
    b, c, h, w = shape
    return patches.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def positions(latents: Tensor) -> Tensor:
    """(h w / 4, 3): each patch's (0, row, column), for the rotary embedding."""
    rows, columns = (torch.arange(n // 2, device=latents.device, dtype=latents.dtype) for n in latents.shape[-2:])
    return torch.cartesian_prod(rows.new_zeros(1), rows, columns)
