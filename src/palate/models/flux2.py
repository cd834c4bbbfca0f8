"""FLUX.2: a rectified-flow transformer over 32-channel latents in 2 x 2 patches; the words of a language model.

klein (4B, 9B) reads Qwen3 and is distilled to four steps; klein-base reads the same and wants guidance; dev reads
Mistral 3 and is told a guidance strength, `distilled_guidance`. The text is three of the language model's layers, side
by side. Latents are normalised by the running statistics of the VAE's batch norm, patch by patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from palate.models.facts import VAE_16, ComfyUI, Facts, NetworkCall, OriginalBlocks, Published
from palate.models.families import LoadOptions
from palate.models.latents import LatentLayout
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "flux2"
PARTS = {
    "transformer": "Flux2Transformer2DModel",
    "vae": "AutoencoderKLFlux2",
    "text_encoder": "",
    "tokenizer": "",
    "scheduler": "",
}
LORA_TARGETS = (  # both streams' attention and feed-forward layers; the single stream's are fused in two
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.linear_in",
    "ff.linear_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
    "attn.to_qkv_mlp_proj",
    "attn.to_out",
)
QWEN_LAYERS, MISTRAL_LAYERS = (9, 18, 27), (10, 20, 30)  # hidden states that are the text


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 3 x the language model's width)


def batch_norm_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """(std, mean), each (128,), of folded latents: the running statistics that the VAE's batch norm holds."""
    return torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps), vae.bn.running_mean


def empirical_mu(tokens: int, steps: int) -> float:
    """Log of the time shift for so many image tokens and steps, by the rule that FLUX.2 was published with.

    Two lines in the tokens, for 10 and for 200 steps, between which mu is linear in the steps; above 4300 tokens the
    second alone.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (few - many) * (200 - steps) / 190


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.joint_attention_dim, dtype=dtype))


FACTS = Facts(
    FAMILY,
    PARTS,
    Flux2Transformer2DModel,
    LORA_TARGETS,
    licence="klein 4B: Apache-2.0; klein 9B, dev: FLUX Non-Commercial License",
    licences={
        "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
        "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
        "black-forest-labs/FLUX.2-klein-9B": "flux-non-commercial-license",
        "black-forest-labs/FLUX.2-klein-base-9B": "flux-non-commercial-license",
        "black-forest-labs/FLUX.2-dev": "flux-dev-non-commercial-license",
    },
    vae=AutoencoderKLFlux2,
    layout=LatentLayout(fold=2, statistics=batch_norm_statistics),
    packing=4,
    patch=1,
    lora_loader=Flux2LoraLoaderMixin,
    published=Published(  # klein 4B
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        {**VAE_16, "latent_channels": 32, "use_quant_conv": True, "use_post_quant_conv": True},
        1024,
        512,
        _condition,
        4.02,
    ),
    original=(
        OriginalBlocks(
            "transformer_blocks",
            "double_blocks",
            {
                "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn_proj": ("attn.to_out.0",),
                "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn_proj": ("attn.to_add_out",),
                "img_mlp_0": ("ff.linear_in",),
                "img_mlp_2": ("ff.linear_out",),
                "txt_mlp_0": ("ff_context.linear_in",),
                "txt_mlp_2": ("ff_context.linear_out",),
            },
        ),
        OriginalBlocks(
            "single_transformer_blocks",
            "single_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    ),
    few_steps=r"klein(?!-base)",
    comfyui=ComfyUI(
        "flux-2-klein-base-4b.safetensors",
        encoders=("qwen_3_4b.safetensors",),
        kind="flux2",
        vae="flux2-vae.safetensors",
        latent="EmptyFlux2LatentImage",
        scheduler="Flux2Scheduler",
    ),
)


class Flux2(LoadedModel):
    """The `Model` protocol over FLUX.2 klein, klein-base and dev.

    distilled_guidance: what dev is told; the others read no such number.
    """

    facts = FACTS
    schedule = staticmethod(flow_schedule)

    def __init__(self, parts: Parts, scheduler: FlowMatchEulerDiscreteScheduler, *, distilled_guidance: float = 4.0):
        super().__init__(parts, scheduler)
        self.distilled_guidance = distilled_guidance
        few_steps = bool(parts.repository.index.get("is_distilled", False))
        embedded = parts.weights.network.config.guidance_embeds
        self.default_steps = 4 if few_steps else 50
        self.default_guidance = 1.0 if few_steps or embedded else 4.0

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        text_tokens: int = 512,
        distilled_guidance: float = 4.0,
        **options: Unpack[LoadOptions],
    ) -> Flux2:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        mistral = str(repository.kind("text_encoder")).startswith("Mistral3")
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)

        def as_chat(prompt: str) -> str:
            if not mistral:
                messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
                return tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
                )
            said = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            language_model = repository.read("text_encoder", AutoModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    [as_chat(prompt)],
                    padding="max_length",
                    max_length=text_tokens,
                    truncation=True,
                    add_special_tokens=not mistral,
                    return_tensors="pt",
                ).to(where)
                output = language_model(
                    input_ids=tokens.input_ids,
                    attention_mask=tokens.attention_mask,
                    output_hidden_states=True,
                    use_cache=False,
                )
                layers = MISTRAL_LAYERS if mistral else QWEN_LAYERS
                return {"text": torch.cat([output.hidden_states[k][0] for k in layers], -1)}

            return encode

        def count(prompt: str) -> int:
            return len(tokenizer(as_chat(prompt)).input_ids)

        text = TextReader(load_encoders, count, text_tokens, settings=SYSTEM_MESSAGE if mistral else "")
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(repository.config("scheduler"))
        return cls(parts, scheduler, distilled_guidance=distilled_guidance)

    @property
    def call(self) -> NetworkCall:
        return NetworkCall(self.image_size, guidance_embed=self.distilled_guidance)

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
        image, words = positions(xt, cond.text.shape[1])
        tokens = transformer(
            hidden_states=xt.flatten(2).transpose(1, 2),
            encoder_hidden_states=cond.text,
            timestep=t,
            guidance=guidance,
            img_ids=image,
            txt_ids=words,
        ).sample
        return tokens.transpose(1, 2).unflatten(2, xt.shape[-2:])

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): the shift grows with the image and falls with the number of steps."""
        tokens = self.latent_shape[1] * self.latent_shape[2]
        return flow_times(self.scheduler, steps, patches=tokens, even=True, mu=empirical_mu(tokens, steps))


def positions(latents: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """(B, h w, 4) and (B, words, 4): time, row, column of each latent; the last number counts the words."""
    rows, columns = (torch.arange(n, device=latents.device) for n in latents.shape[-2:])
    zero = rows.new_zeros(1)
    image = torch.cartesian_prod(zero, rows, columns, zero)
    text = torch.cartesian_prod(zero, zero, zero, torch.arange(words, device=latents.device))
    return image.expand(len(latents), -1, -1), text.expand(len(latents), -1, -1)
