"""PixArt-alpha and PixArt-Sigma: a transformer over 4-channel latents with cross-attention to T5.

The network outputs eps and a variance, which is not used. alpha at 1024 pixels is also told the image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from palate.models.facts import VAE_4, Facts, NetworkCall, Published
from palate.models.families import LoadOptions
from palate.models.parts import LoadedModel, Options, Parts, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import training_step, vp_prediction, vp_times
from palate.models.text_cache import Encode
from palate.path import Prediction, vp_schedule

FAMILY = "pixart"
PARTS = {
    "transformer": "PixArtTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "T5EncoderModel",
    "tokenizer": "T5Tokenizer",
    "scheduler": "",
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention


class PixArtTransformer2DModel(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
    """diffusers' own, which alone among the families' networks has no methods for adapters."""


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 4096)
    mask: Tensor  # (B, text_tokens), 1 = a token, 0 = padding


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.caption_channels, dtype=dtype), torch.empty(1, tokens, dtype=dtype))


FACTS = Facts(
    FAMILY,
    PARTS,
    PixArtTransformer2DModel,
    LORA_TARGETS,
    licence="CreativeML Open RAIL++-M",
    licences={"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++"},
    published=Published(  # alpha at 512
        {"sample_size": 64, "caption_channels": 4096}, VAE_4, 512, 120, _condition, 4.76
    ),
    # its pipelines would draw at a size of their own list and rewrite the prompt
    one_step_call=", use_resolution_binning=False, clean_caption=False",
    few_steps="flash|lcm|dmd",
)


class PixArt(LoadedModel):
    """The `Model` protocol over PixArt-alpha and PixArt-Sigma."""

    facts = FACTS
    default_steps = 20
    default_guidance = 4.5

    def __init__(self, parts: Parts, scheduler: DPMSolverMultistepScheduler):
        super().__init__(parts, scheduler)
        self.schedule = vp_schedule(scheduler.alphas_cumprod)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        text_tokens: int | None = None,
        **options: Unpack[LoadOptions],
    ) -> PixArt:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share.

        text_tokens: None = 120 for alpha, 300 for Sigma, as they were trained.
        """
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        if text_tokens is None:
            text_tokens = 300 if repository.index.get("_class_name") == "PixArtSigmaPipeline" else 120
        tokenizer = repository.tokenizer("tokenizer", T5Tokenizer)

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            t5 = repository.read("text_encoder", T5EncoderModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    prompt.lower().strip(),
                    padding="max_length",
                    max_length=text_tokens,
                    truncation=True,
                    return_tensors="pt",
                ).to(where)
                text = t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
                return {"text": text, "mask": tokens.attention_mask[0]}

            return encode

        text = TextReader(load_encoders, lambda prompt: len(tokenizer(prompt).input_ids), text_tokens)
        parts = load_parts(repository, FACTS, text, Options(**options))
        # the published scheduler is this one at order 2; its first-order form is the DDIM step
        return cls(parts, DPMSolverMultistepScheduler.from_config(repository.config("scheduler"), solver_order=1))

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(**self.parts.text(prompts))

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        output = self._guided(weights, xt, t, cond, lambda: self.encode_prompts([""]), guidance)
        return vp_prediction(self.scheduler.config.prediction_type, xt, output, *self.schedule(t))

    @staticmethod
    def output(transformer: Any, xt: Tensor, t: Tensor, cond: Cond, call: NetworkCall) -> Tensor:
        step = training_step(t, call.training_steps)
        size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            height, width = call.image_size
            size = {
                "resolution": xt.new_tensor([[height, width]]).expand(len(xt), -1),
                "aspect_ratio": xt.new_full((len(xt), 1), height / width),
            }
        output = transformer(
            xt, encoder_hidden_states=cond.text, encoder_attention_mask=cond.mask, timestep=step, added_cond_kwargs=size
        ).sample
        return output[:, : xt.shape[1]]

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,)."""
        return vp_times(self.scheduler, steps)
