"""Krea 2, Raw and Turbo: a rectified-flow transformer over Qwen-Image's latents; twelve layers of Qwen3-VL, per token.

The prompt is padded to its full length inside a template, so that what follows it always stands at the end; padding
takes no position and is not seen. The template's first 34 tokens are dropped again. Raw wants guidance, Turbo eight
steps without and one shift for all sizes. Krea counts guidance from 0; here 1 is off, so its 3.5 is 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from diffusers.loaders import Krea2LoraLoaderMixin
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from palate.models.facts import Facts, NetworkCall, OriginalBlocks, Published
from palate.models.families import LoadOptions
from palate.models.flux import pack, positions, unpack
from palate.models.latents import LatentLayout
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.qwen_image import DROPPED, SYSTEM
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "krea2"
PARTS = {
    "transformer": "Krea2Transformer2DModel",
    "vae": "AutoencoderKLQwenImage",
    "text_encoder": "",
    "tokenizer": "",
    "scheduler": "",
}
LORA_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")  # of every attention, the text fusion's too
BEFORE, AFTER = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ADDED = 5  # tokens of AFTER, for which the prompt makes room
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # hidden states, where the folder names no others
TURBO_SHIFT = 1.15  # its logarithm


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 12, 2560)
    mask: Tensor | None  # (B, text_tokens) bool; None = all


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.num_text_layers, config.text_hidden_dim, dtype=dtype), None)


ORIGINAL = {
    "attn_wq": ("attn.to_q",),
    "attn_wk": ("attn.to_k",),
    "attn_wv": ("attn.to_v",),
    "attn_wo": ("attn.to_out.0",),
    "attn_gate": ("attn.to_gate",),
    "mlp_gate": ("ff.gate",),
    "mlp_up": ("ff.up",),
    "mlp_down": ("ff.down",),
}
FACTS = Facts(
    FAMILY,
    PARTS,
    Krea2Transformer2DModel,
    LORA_TARGETS,
    licence="Krea 2 Community License (commercial use is free for small companies only)",
    licences={"krea/Krea-2-Raw": "krea-2-community", "krea/Krea-2-Turbo": "krea-2-community"},
    vae=AutoencoderKLQwenImage,
    layout=LatentLayout(frames=True),
    packing=4,
    patch=2,
    lora_loader=Krea2LoraLoaderMixin,
    published=Published({}, {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}, 1024, 512, _condition, 4.44),
    original=(
        OriginalBlocks("transformer_blocks", "blocks", ORIGINAL),
        OriginalBlocks("text_fusion.layerwise_blocks", "txtfusion_layerwise_blocks", ORIGINAL),
        OriginalBlocks("text_fusion.refiner_blocks", "txtfusion_refiner_blocks", ORIGINAL),
    ),
    few_steps="turbo",
    packs_noise=True,
)


class Krea2(LoadedModel):
    """The `Model` protocol over Krea 2 Raw and Turbo."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)

    def __init__(self, parts: Parts, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__(parts, scheduler)
        self.distilled = bool(parts.repository.index.get("is_distilled", False))
        self.default_steps = 8 if self.distilled else 52
        self.default_guidance = 1.0 if self.distilled else 4.5

    @classmethod
    def load(cls, folder: str | Path, *, text_tokens: int = 512, **options: Unpack[LoadOptions]) -> Krea2:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)
        layers = repository.index.get("text_encoder_select_layers") or LAYERS

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            qwen = repository.read("text_encoder", AutoModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                room = text_tokens + DROPPED - ADDED
                said = tokenizer(
                    [BEFORE + prompt], padding="max_length", max_length=room, truncation=True, return_tensors="pt"
                )
                after = tokenizer([AFTER], return_tensors="pt")
                ids = torch.cat([said.input_ids, after.input_ids], 1).to(where)
                mask = torch.cat([said.attention_mask, after.attention_mask], 1).bool().to(where)
                place = (mask.long().cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)  # time, height, width alike
                output = qwen(input_ids=ids, attention_mask=mask, position_ids=place, output_hidden_states=True)
                text = torch.stack([output.hidden_states[k][0, DROPPED:] for k in layers], 1)
                return {"text": text, "mask": mask[0, DROPPED:]}

            return encode

        def count(prompt: str) -> int:
            return len(tokenizer(BEFORE + prompt).input_ids) - DROPPED + ADDED

        text = TextReader(load_encoders, count, text_tokens, settings=f"layers {list(layers)}")
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
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
        grid = positions(xt)
        patches = transformer(
            hidden_states=pack(xt),
            encoder_hidden_states=cond.text,
            timestep=t,
            position_ids=torch.cat([grid.new_zeros(cond.text.shape[1], 3), grid]),
            encoder_attention_mask=cond.mask,
        ).sample
        return unpack(patches, xt.shape)

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): Raw's shift grows with the image, Turbo has one for all sizes."""
        tokens = self.latent_shape[1] * self.latent_shape[2] // 4
        mu = TURBO_SHIFT if self.distilled else None
        return flow_times(self.scheduler, steps, patches=tokens, even=True, mu=mu)
