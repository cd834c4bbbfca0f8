"""Qwen-Image (the first, and 2512): a rectified-flow transformer over 16-channel latents; the words of Qwen2.5-VL.

The prompt stands in a template whose first 34 tokens, the system's, are dropped again. Guidance keeps the length of the
conditional prediction, token by token. The VAE is one of videos; an image is its first frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from palate.models.facts import ComfyUI, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.flux import pack, unpack
from palate.models.latents import LatentLayout
from palate.models.parts import LoadedModel, Options, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "qwen-image"
PARTS = {
    "transformer": "QwenImageTransformer2DModel",
    "vae": "AutoencoderKLQwenImage",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "tokenizer": "Qwen2Tokenizer",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # attention
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:"
)
TEMPLATE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"
DROPPED = 34  # tokens of the template before the user's words
EMPTY = " "  # what its authors give to guidance's other half


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 3584), zero where the prompt has ended
    mask: Tensor | None  # (B, text_tokens) bool; None = all


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.joint_attention_dim, dtype=dtype), None)


FACTS = Facts(
    FAMILY,
    PARTS,
    QwenImageTransformer2DModel,
    LORA_TARGETS,
    licence="Apache-2.0",
    licences={"Qwen/Qwen-Image": "apache-2.0", "Qwen/Qwen-Image-2512": "apache-2.0"},
    vae=AutoencoderKLQwenImage,
    layout=LatentLayout(frames=True),
    packing=4,
    patch=2,
    lora_loader=QwenImageLoraLoaderMixin,
    published=Published({}, {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}, 1024, 512, _condition, 8.29),
    few_steps="lightning|turbo",
    packs_noise=True,
    comfyui=ComfyUI(
        "qwen_image_2512_fp8_e4m3fn.safetensors",
        encoders=("qwen_2.5_vl_7b_fp8_scaled.safetensors",),
        kind="qwen_image",
        vae="qwen_image_vae.safetensors",
        shift=3.1,
    ),
)


class QwenImage(LoadedModel):
    """The `Model` protocol over Qwen-Image and Qwen-Image-2512."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_steps = 50
    default_guidance = 4.0

    @classmethod
    def load(cls, folder: str | Path, *, text_tokens: int = 512, **options: Unpack[LoadOptions]) -> QwenImage:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            qwen = repository.read("text_encoder", AutoModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    [TEMPLATE.format(prompt)], max_length=text_tokens + DROPPED, truncation=True, return_tensors="pt"
                ).to(where)
                output = qwen(
                    input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
                )
                text = output.hidden_states[-1][0, DROPPED:]
                missing = text_tokens - len(text)
                mask = torch.arange(text_tokens, device=where) < len(text)
                return {"text": F.pad(text, (0, 0, 0, missing)), "mask": mask}

            return encode

        def count(prompt: str) -> int:
            return len(tokenizer(TEMPLATE.format(prompt)).input_ids) - DROPPED

        text = TextReader(load_encoders, count, text_tokens, empty=EMPTY)
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
        return cls(parts, FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler")))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([EMPTY]), guidance)
        return from_velocity(xt, output, *self.schedule(t))

    @staticmethod
    def combine(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """u + w (c - u), each token (the latents of a patch) as long as in c."""
        plain = pack(unconditional + guidance * (conditional - unconditional))
        length = pack(conditional).norm(dim=-1, keepdim=True)
        return unpack(plain * (length / plain.norm(dim=-1, keepdim=True)), conditional.shape)

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        height, width = xt.shape[-2:]
        patches = transformer(
            hidden_states=pack(xt),
            timestep=t,
            encoder_hidden_states=cond.text,
            encoder_hidden_states_mask=cond.mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(xt),
        ).sample
        return unpack(patches, xt.shape)

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): the shift grows with the image."""
        return flow_times(self.scheduler, steps, patches=self.latent_shape[1] * self.latent_shape[2] // 4, even=True)
