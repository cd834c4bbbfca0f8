"""Chroma1: FLUX.1 without CLIP, pruned and open; T5 for the words, true guidance.

Where FLUX sees all of T5's tokens, Chroma is told which are words: those of the prompt and one token of padding after
them. Its pipeline adds that mask, 1 or 0, to the attention's logits, so padding weighs e times less and is not hidden;
here as there. The modulations of all blocks come from one small network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from palate.models.facts import VAE_16, ComfyUI, Facts, NetworkCall, OriginalBlocks, Published
from palate.models.families import LoadOptions
from palate.models.flux import FACTS as FLUX
from palate.models.flux import LORA_TARGETS, pack, positions, unpack
from palate.models.parts import LoadedModel, Options, TextReader, load_parts
from palate.models.repository import open_repository
from palate.models.schedules import flow_times
from palate.models.text_cache import Encode
from palate.path import Prediction, flow_schedule, from_velocity

FAMILY = "chroma"
PARTS = {
    "transformer": "ChromaTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "T5EncoderModel",
    "tokenizer": "",
    "scheduler": "",
}


class Cond(NamedTuple):
    """What prompts become: tensors (B, ...)."""

    text: Tensor  # (B, text_tokens, 4096)
    mask: Tensor  # (B, text_tokens), 1 = a word, or the first token of padding


def _condition(config: Any, tokens: int, dtype: torch.dtype) -> Cond:
    return Cond(torch.empty(1, tokens, config.joint_attention_dim, dtype=dtype), torch.empty(1, tokens, dtype=dtype))


# FLUX's names but for the modulations, which Chroma's blocks do not have
ORIGINAL = tuple(
    OriginalBlocks(kind.blocks, kind.original, {k: v for k, v in kind.layers.items() if not k.endswith("_lin")})
    for kind in FLUX.original
)
FACTS = Facts(
    FAMILY,
    PARTS,
    ChromaTransformer2DModel,
    LORA_TARGETS,
    licence="Apache-2.0",
    licences={
        "lodestones/Chroma1-HD": "apache-2.0",
        "lodestones/Chroma1-Base": "apache-2.0",
        "lodestones/Chroma1-Flash": "apache-2.0",
    },
    packing=4,
    patch=2,
    lora_loader=FluxLoraLoaderMixin,
    published=Published({}, VAE_16, 1024, 512, _condition, 4.76),
    original=ORIGINAL,
    few_steps="flash",
    packs_noise=True,
    comfyui=ComfyUI(
        "Chroma1-HD.safetensors",
        encoders=("t5xxl_fp16.safetensors",),
        kind="chroma",
        vae="ae.safetensors",
        guidance=3.0,
    ),
)


class Chroma(LoadedModel):
    """The `Model` protocol over Chroma1."""

    facts = FACTS
    schedule = staticmethod(flow_schedule)
    default_steps = 35
    default_guidance = 5.0

    @classmethod
    def load(cls, folder: str | Path, *, text_tokens: int = 512, **options: Unpack[LoadOptions]) -> Chroma:
        """From a diffusers folder or hub id; docs/models.md describes the options that all families share."""
        repository = open_repository(folder, family=FAMILY, parts=PARTS, options=options)
        tokenizer = repository.tokenizer("tokenizer", AutoTokenizer)

        def load_encoders(precision: torch.dtype, where: torch.device) -> Encode:
            t5 = repository.read("text_encoder", T5EncoderModel, precision).to(where)

            def encode(prompt: str) -> dict[str, Tensor]:
                tokens = tokenizer(
                    prompt, padding="max_length", max_length=text_tokens, truncation=True, return_tensors="pt"
                ).to(where)
                text = t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
                mask = torch.arange(text_tokens, device=where) <= tokens.attention_mask.sum()
                return {"text": text, "mask": mask.to(text.dtype)}

            return encode

        text = TextReader(load_encoders, lambda prompt: len(tokenizer(prompt).input_ids), text_tokens)
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
        patches = pack(xt)
        mask = F.pad(cond.mask, (0, patches.shape[1]), value=1.0)
        with _mask_in_recomputed_blocks(transformer, mask):
            found = transformer(
                hidden_states=patches,
                timestep=t,
                encoder_hidden_states=cond.text,
                img_ids=positions(xt),
                txt_ids=xt.new_zeros(cond.text.shape[1], 3),
                attention_mask=mask,
            ).sample
        return unpack(found, xt.shape)

    def time_grid(self, steps: int) -> Tensor:
        """The published times (steps + 1,), by the folder's scheduler."""
        return flow_times(self.scheduler, steps, patches=self.latent_shape[1] * self.latent_shape[2] // 4, even=True)


@contextmanager
def _mask_in_recomputed_blocks(transformer: Any, mask: Tensor) -> Iterator[None]:
    """diffusers leaves the mask out when it recomputes single-stream blocks; here they get it, as in plain calls."""
    recompute = vars(transformer).get("_gradient_checkpointing_func")
    if recompute is None:
        yield
        return

    def with_mask(block: Any, *args: Any) -> Any:
        if isinstance(block, ChromaSingleTransformerBlock) and len(args) == 3:
            block = partial(block, attention_mask=mask)
        return recompute(block, *args)

    transformer._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = recompute
