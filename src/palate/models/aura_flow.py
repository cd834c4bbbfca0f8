"""AuraFlow: a rectified-flow transformer over SDXL's 4-channel latents, with the words read by UMT5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import AuraFlowLoraLoaderMixin
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from palate.models.facts import VAE_4, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.latents import factor_of
from palate.models.parts import LoadedModel, Options, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "aura-flow"
PARTS = {
    "transformer": "AuraFlowTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "UMT5EncoderModel",
    "tokenizer": "LlamaTokenizerFast",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # attention


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 2048), zero where the prompt has ended


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.joint_attention_dim, dtype=dtype))


def _largest(config: Mapping[str, Any]) -> int:
    """Side in latents at which the positions end, a square of patches."""
    return math.isqrt(config["pos_embed_max_size"]) * int(config["patch_size"])


FACTS = Facts(
    FAMILY,
    PARTS,
    AuraFlowTransformer2DModel,
    LORA_TARGETS,
    licence="Apache-2.0",
    licences={"fal/AuraFlow-v0.3": "apache-2.0"},
    lora_loader=AuraFlowLoraLoaderMixin,
    published=Published({"pos_embed_max_size": 4096}, VAE_4, 1024, 256, _condition, 1.23),
)


class AuraFlow(LoadedModel):
    """The `Model` protocol over AuraFlow."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_steps = 50
    default_guidance = 3.5

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        text_tokens: int = 256,
        **options: Unpack[LoadOptions],
    ) -> AuraFlow:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        largest = _largest(repository.config("transformer")) * factor_of(repository.config("vae"))
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            umt5 = repository.read("text_encoder", UMT5EncoderModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:  # one prompt -> the fields of Cond, without a batch axis
                tokens = tokenizer(
                    prompt, padding="max_length", max_length=text_tokens, truncation=True, return_tensors="pt"
                ).to(where)
                text = umt5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
                return {"text": (text * tokens.attention_mask[..., None])[0]}

            return encode

        text = TextReader(load_encoders, lambda prompt: len(tokenizer(prompt).input_ids), text_tokens)
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=min(1024, largest))
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
        """One call of the network: its units of time, its packing if it has one."""
        return transformer(xt, encoder_hidden_states=cond.text, timestep=t).sample

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): shift 1.73, which diffusers applies twice to the cleanest level."""
        patches = self.latent_shape[1] * self.latent_shape[2] // self.parts.weights.network.config.patch_size**2
        return flow_times(self.scheduler, steps, patches=patches, even=False)
