"""SANA: a rectified-flow transformer with linear attention over latents of 32 x 32 pixels; the words of Gemma 2.

A prompt is read behind an instruction to describe it in detail; the first and the last tokens are what the network
sees. The empty prompt of guidance has no instruction.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.loaders import SanaLoraLoaderMixin
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from palate.models.facts import Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "sana"
PARTS = {
    "transformer": "SanaTransformer2DModel",
    "vae": "AutoencoderDC",
    "text_encoder": "Gemma2Model",
    "tokenizer": "",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention
INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 2304)
    mask: Tensor  # (B, text_tokens), 1 = a token, 0 = padding


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.caption_channels, dtype=dtype), torch.empty(1, tokens, dtype=dtype))


FACTS = Facts(
    FAMILY,
    PARTS,
    SanaTransformer2DModel,
    LORA_TARGETS,
    licence="NSCL v2-custom (non-commercial); its text encoder: Gemma Terms of Use",
    licences={"Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "nscl-v2-custom"},
    vae=AutoencoderDC,
    lora_loader=SanaLoraLoaderMixin,
    published=Published(  # 1.6B
        {},
        {
            "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "latent_channels": 32,
        },
        1024,
        300,
        _condition,
        2.61,
    ),
    one_step_call=", use_resolution_binning=False, clean_caption=False",
    few_steps="sprint",
)


class Sana(LoadedModel):
    """The `Model` protocol over SANA and SANA 1.5."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_steps = 20
    default_guidance = 4.5

    @classmethod
    def load(cls, folder: str | Path, *, text_tokens: int = 300, **options: Unpack[LoadOptions]) -> Sana:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)
        before = len(tokenizer.encode(INSTRUCTION)) - 2  # tokens that are dropped again

        def as_read(prompt: str) -> str:
            said = prompt.lower().strip()
            return INSTRUCTION + said if prompt else said

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            gemma = repository.read("text_encoder", AutoModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    as_read(prompt),
                    padding="max_length",
                    padding_side="right",
                    max_length=text_tokens + (before if prompt else 0),
                    truncation=True,
                    return_tensors="pt",
                ).to(where)
                text = gemma(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0]
                chosen = [0, *range(len(text) - text_tokens + 1, len(text))]
                return {"text": text[chosen], "mask": tokens.attention_mask[0, chosen]}

            return encode

        def count(prompt: str) -> int:
            return len(tokenizer(as_read(prompt)).input_ids) - (before if prompt else 0)

        text = TextReader(load_encoders, count, text_tokens, settings=INSTRUCTION)
        parts = load_parts(repository, FACTS, text, Options(**options), default_size=1024)
        # the published scheduler is this one at order 2; its first-order form is Euler's step
        return cls(parts, DPMSolverMultistepScheduler.from_config(repository.config("scheduler"), solver_order=1))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return from_velocity(xt, output, *self.schedule(t))

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        """The network is told whole thousandths, as its scheduler tells them."""
        step = (t * call.training_steps + 1e-3).floor() * transformer.config.timestep_scale
        output = transformer(
            xt, encoder_hidden_states=cond.text, encoder_attention_mask=cond.mask, timestep=step
        ).sample
        return output[:, : xt.shape[1]]

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,): shift 3."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.sigmas.double()
